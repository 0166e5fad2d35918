"""The LLM-only sweep over all layers, against one encode of its texts, and against one run per layer.

    python -m benchmarks.sweep --dataset-root DIR

Each repeat times, one after the other in this process: a stock SentenceTransformer of the whole LLM encoding the texts
of the sweep, and the sweep with an empty cache, from loading the LLM to the last layer's scores. `--separate` then runs
every layer on its own, without a cache and through `mteb.evaluate`, and compares the scores.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mteb
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from backbones import OFFLINE_ENCODER, OFFLINE_LLM
from benchmarks.common import stock_model, write_result
from sweep import Point, Sweep
from tasks import task_splits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="AmazonCounterfactual")
    parser.add_argument("--llm", default=OFFLINE_LLM)
    parser.add_argument("--dataset-root", help="a local folder laid out as the Hub below datasets/")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--separate", action="store_true", help="also run every layer on its own (18 passes of the LLM)"
    )
    parser.add_argument("--output", default="results/benchmarks/sweep.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:

        def make(name):
            directory = Path(work, name)
            return Sweep(
                args.task, args.llm, OFFLINE_ENCODER, "validation", directory / "results", args.dataset_root,
                str(directory / "states"),
            )  # fmt: skip

        first = make("texts")
        texts = list(dict.fromkeys([*first.mteb_texts, *task_splits(first.task)["validation"]["text"]]))
        points = [Point("llm", 33, (layer,)) for layer in range(1, first.depth + 1)]
        whole = stock_model(args.llm)
        encodes, sweeps = [], []
        for repeat in range(args.repeats):
            encodes.append(timed(lambda: whole.encode(texts, batch_size=32, show_progress_bar=False)))
            sweep = make(f"sweep-{repeat}")
            sweeps.append(timed(lambda: sweep.run(points)))
            print(f"encode {encodes[-1]:.1f} s, sweep of {len(points)} layers {sweeps[-1]:.1f} s", flush=True)
        result = {
            "task": first.task.metadata.name,
            "llm": args.llm,
            "texts": len(texts),
            "layers": len(points),
            "encode_seconds": encodes,
            "sweep_seconds": sweeps,
            "sweep_to_encode": statistics.median(s / e for s, e in zip(sweeps, encodes)),
        }
        print(f"sweep / encode: {result['sweep_to_encode']:.2f} (median of {args.repeats})")
        if args.separate:
            swept = [point["accuracy"] for point in sweep.run(points)]
            seconds, alone = 0.0, []
            for point in points:
                start = time.perf_counter()
                alone.append(accuracy_alone(make(point.name), point))
                seconds += time.perf_counter() - start
            result |= {
                "separate_seconds": seconds,
                "separate_to_sweep": seconds / statistics.median(sweeps),
                "largest_difference_in_accuracy": max(abs(a - b) for a, b in zip(swept, alone)),
            }
            print(f"separate runs / sweep: {result['separate_to_sweep']:.1f}")
            print(f"largest difference in accuracy: {result['largest_difference_in_accuracy']:.6f}")
    write_result(args.output, result)


def accuracy_alone(sweep: Sweep, point: Point) -> float:
    """The accuracy of one layer with nothing kept from the others: its own LLM, its own statistics, no cached states."""
    module = sweep.build(point)
    module.cache = None
    model = SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())])
    return (
        mteb.evaluate(model, sweep.task, cache=None, show_progress_bar=False)
        .task_results[0]
        .scores["test"][0]["accuracy"]
    )


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
