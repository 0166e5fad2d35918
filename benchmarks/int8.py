"""Texts per second of one hybrid in torch float32, ONNX float32 and ONNX int8, side by side.

    python -m benchmarks.int8 runs/counterfactual-7/final --dataset-root DIR

The directory has been through `export_onnx.py`. Within a repeat the three encode the same texts, each in the batches of
`encoding.py`; the texts are those of `benchmarks.encode`. What int8 costs in accuracy is measured by
`evaluate_mteb.py run --onnx model_qint8.onnx`.
"""

import argparse
import statistics
import time
from pathlib import Path

from sentence_transformers import SentenceTransformer

from benchmarks.common import write_result
from benchmarks.encode import varied_texts
from encoding import encode
from onnx_embedder import load_onnx


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="final/ of a trained hybrid, with its onnx/")
    parser.add_argument("--dataset-root", help="a local folder laid out as the Hub below datasets/")
    parser.add_argument("--texts", type=int, default=2010, help="of all repeats together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/benchmarks/int8.json")
    args = parser.parse_args()

    models = {
        "torch float32": SentenceTransformer(str(args.directory), trust_remote_code=True, device="cpu"),
        "ONNX float32": load_onnx(args.directory, "model.onnx"),
        "ONNX int8": load_onnx(args.directory, "model_qint8.onnx"),
    }
    texts = varied_texts(args.dataset_root, args.texts)
    rates = {name: [] for name in models}
    for repeat in range(args.repeats):
        share = texts[repeat :: args.repeats]
        for name, model in models.items():
            start = time.perf_counter()
            encode(model, share)
            rates[name].append(len(share) / (time.perf_counter() - start))
            print(f"repeat {repeat + 1}, {name}: {rates[name][-1]:.1f} texts/s", flush=True)
    int8 = rates["ONNX int8"]
    ratios = {
        name: [ours / theirs for ours, theirs in zip(int8, rates[name])] for name in ("torch float32", "ONNX float32")
    }
    layers = models["torch float32"][0].auto_model.config.llm_layers
    write_result(args.output, {"llm_layers": layers, "texts_per_second": rates, "int8_times_as_fast_as": ratios})
    for name, values in ratios.items():
        print(
            f"int8 is {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) times as fast as {name}"
        )


if __name__ == "__main__":
    main()
