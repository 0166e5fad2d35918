"""Peak memory, size on disk and start-up of the hybrid at several depths, against its whole LLM in float32.

    python -m benchmarks.memory

Each model is loaded as a SentenceTransformer and encodes 64 sentences in a process of its own, whose peak resident memory
counts; the libraries alone, imported in one more process, are shown beside it. Times are medians of --repeats processes:
the imports (for a hybrid with its modeling files, which import torch and transformers alone), the model alone, the whole
SentenceTransformer with its tokenizer, and its first text.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from backbones import OFFLINE_ENCODER, OFFLINE_LLM, resolve_backbone
from benchmarks.common import write_result
from modeling_hybrid import HybridModel
from repository import save_repository

# Run in the process that is measured: argv is "hybrid" or "llm" with a directory, or "imports".
MEASURED = """
import json, sys, time
start = time.perf_counter()
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel
times = {"import_seconds": time.perf_counter() - start}

kind, directory = sys.argv[1], sys.argv[2]
if kind != "imports":
    # The model alone first, to time it; it is gone before the whole is loaded.
    options = {"trust_remote_code": True} if kind == "hybrid" else {"dtype": torch.float32}
    start = time.perf_counter()
    model = AutoModel.from_pretrained(directory, **options)
    times["model_load_seconds"] = time.perf_counter() - start
    del model
    start = time.perf_counter()
    if kind == "hybrid":
        model = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
    else:
        transformer = Transformer(directory, model_kwargs={"dtype": torch.float32})
        model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    times["load_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    model.encode(["I wish the lid had fitted the pan."])
    times["first_text_seconds"] = time.perf_counter() - start
    model.encode([f"Sentence number {i}: I wish the lid had fitted the pan." for i in range(64)])
# Not getrusage, whose peak is inherited from the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(json.dumps({"peak_mib": peak, **times}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default=OFFLINE_LLM)
    parser.add_argument("--encoder", default=OFFLINE_ENCODER)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 7, 10, 18])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/benchmarks/memory.json")
    args = parser.parse_args()

    llm = resolve_backbone(args.llm)
    with tempfile.TemporaryDirectory() as work:
        models = {"libraries alone": ("imports", "-"), "whole LLM, float32": ("llm", llm)}
        for layer in args.layers:
            directory = Path(work, f"layer-{layer}")
            hybrid = HybridModel.from_backbones(args.llm, args.encoder, [layer])
            save_repository(directory, hybrid, AutoTokenizer.from_pretrained(llm), max_seq_length=256)
            models[f"hybrid, layer {layer}"] = ("hybrid", str(directory))
        del hybrid
        runs = {name: [] for name in models}
        for _ in range(args.repeats):
            for name, (kind, directory) in models.items():
                runs[name].append(measure(kind, directory))
        whole = statistics.median(run["peak_mib"] for run in runs["whole LLM, float32"])
        rows = {}
        for name, (_, directory) in models.items():
            row = {measured: statistics.median(run[measured] for run in runs[name]) for measured in runs[name][0]}
            row["peak_to_whole_llm"] = row["peak_mib"] / whole
            weights = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
            row["weights_mib"] = weights / 2**20
            rows[name] = row
    print(
        "| | peak memory, MiB | of the whole LLM's | weights on disk, MiB | imports, s | model, s | all, s | 1st text, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        keys = ("import_seconds", "model_load_seconds", "load_seconds", "first_text_seconds")
        loads = [f"{row[key]:.1f}" if key in row else "" for key in keys]
        print(
            f"| {name} | {row['peak_mib']:.0f} | {row['peak_to_whole_llm']:.2f} | {row['weights_mib']:.0f} | "
            f"{' | '.join(loads)} |"
        )
    settings = {"llm": args.llm, "encoder": args.encoder, "repeats": args.repeats}
    write_result(args.output, {**settings, "models": rows})


def measure(kind: str, directory: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, kind, directory], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
