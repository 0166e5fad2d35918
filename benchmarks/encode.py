"""Texts and tokens per second of the hybrid at several depths, of its competitors, and of their matrix products alone.

    python -m benchmarks.encode --dataset-root DIR

The texts are those of AmazonCounterfactual's test split with their words moved around, so that none comes twice and their
lengths stay real; every repeat takes its own share of them. Within a repeat all models encode the same texts, one model
after the other, at batch sizes 1 and 32 (every fourth text), and in the batches that suit them best (all texts): for the
hybrids those of `encoding.py`, for the others the best size in a pilot. The floor of a run is the time for the products of its linear
layers alone, at the same shapes.

The report's loop is its LLM's part alone, without projector and encoder: the causal LM at full depth with its vocabulary
head, all hidden states, batches of 32 in the given order, padded to the longest of the batch.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from backbones import OFFLINE_ENCODER, OFFLINE_LLM, resolve_backbone
from benchmarks.common import FLOAT32, stock_model, write_result
from encoding import encode
from export_onnx import export
from modeling_hybrid import HybridModel
from onnx_embedder import load_onnx
from repository import save_repository
from tasks import get_task, task_splits

MAX_TOKENS = 256
ONNX_LAYER = 7
PILOT_SIZES = (8, 16, 32, 64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default=OFFLINE_LLM)
    parser.add_argument("--encoder", default=OFFLINE_ENCODER)
    parser.add_argument("--dataset-root", help="a local folder laid out as the Hub below datasets/")
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 7, 10, 18])
    parser.add_argument("--texts", type=int, default=2010, help="of all repeats together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/benchmarks/encode.json")
    args = parser.parse_args()

    texts = varied_texts(args.dataset_root, args.texts)
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(args.llm))
    settings = {
        "llm": args.llm,
        "encoder": args.encoder,
        "texts": len(texts),
        "padding_of_the_reports_batches": padding_in_order(tokenizer, texts[:: args.repeats]),
    }
    with tempfile.TemporaryDirectory() as work:
        runs = competitors(args, tokenizer, texts[:: args.repeats], Path(work))
        measured = {name: {way: [] for way in ways} for name, ways in runs.items()}
        for repeat in range(args.repeats):
            share = texts[repeat :: args.repeats]
            for name, ways in runs.items():
                for way, (function, model) in ways.items():
                    part = share if way == "best" else share[::4]
                    # The floors of the others, which no one is held to, are measured once.
                    shapes_of = model if way == "best" and (name.startswith("hybrid") or repeat == 0) else None
                    with LinearShapes(shapes_of) as shapes:
                        start = time.perf_counter()
                        function(part)
                        seconds = time.perf_counter() - start
                    run = {"seconds": seconds, "texts": len(part), "tokens": tokens_of(tokenizer, part)}
                    measured[name][way].append(run | ({"floor_seconds": shapes.seconds()} if shapes.counts else {}))
            result = {**settings, "repeats": repeat + 1, **summary(measured)}
            write_result(args.output, result)  # after every repeat: they take minutes
            print(f"repeat {repeat + 1} of {args.repeats} done", flush=True)
    print_table(result)


def summary(measured: dict) -> dict:
    """Medians over the repeats, and how many times as fast as its competitors each hybrid is, repeat by repeat."""
    models = {}
    for name, ways in measured.items():
        models[name] = {}
        for way, runs in ways.items():
            models[name][way] = {
                "texts_per_second": statistics.median(run["texts"] / run["seconds"] for run in runs),
                "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in runs),
                "runs": runs,
            }
            floors = [run["seconds"] / run["floor_seconds"] for run in runs if "floor_seconds" in run]
            if floors:
                models[name][way]["time_to_floor"] = statistics.median(floors)
    ratios = {}
    for name in (name for name in measured if name.startswith("hybrid")):
        for other in ("the report's loop", "LLM, stock", f"hybrid, layer {ONNX_LAYER}"):
            if other == name:
                continue
            pairs = zip(measured[other]["best"], measured[name]["best"])
            ratios[f"{name} / {other}"] = statistics.median(
                theirs["seconds"] / ours["seconds"] for theirs, ours in pairs
            )
    return {"models": models, "speed_ratios": ratios}


def competitors(args, tokenizer, pilot_texts, work: Path) -> dict:
    """For each model the ways to run it: `{"1": (function of texts, model), "32": ..., "best": ...}`."""
    runs = {}
    for layer in args.layers:
        directory = work / f"layer-{layer}"
        hybrid = HybridModel.from_backbones(args.llm, args.encoder, [layer])
        save_repository(directory, hybrid, tokenizer, max_seq_length=MAX_TOKENS)
        model = SentenceTransformer(str(directory), trust_remote_code=True, device="cpu")
        runs[f"hybrid, layer {layer}"] = ways(model, partial(encode, model))
    export(work / f"layer-{ONNX_LAYER}", int8=False)  # which benchmarks.int8 measures
    model = load_onnx(work / f"layer-{ONNX_LAYER}")
    # Its products are not torch's, so there is no floor beside it.
    runs[f"hybrid, layer {ONNX_LAYER}, ONNX float32"] = ways(model, partial(encode, model))

    llm = AutoModelForCausalLM.from_pretrained(resolve_backbone(args.llm), **FLOAT32).eval()
    runs["the report's loop"] = {"best": (partial(report_loop, llm, tokenizer), llm)}
    stock = {
        "LLM, stock": stock_model(args.llm),
        "encoder alone": stock_model(args.encoder),
        "EmbeddingGemma-300m's architecture": embedding_gemma(tokenizer, work / "embedding-gemma"),
    }
    for name, model in stock.items():
        model.max_seq_length = MAX_TOKENS
        times = {}
        for size in PILOT_SIZES:
            start = time.perf_counter()
            model.encode(pilot_texts, batch_size=size)
            times[size] = time.perf_counter() - start
        runs[name] = ways(model, partial(model.encode, batch_size=min(times, key=times.get)))
        print(f"{name}: batch size {min(times, key=times.get)}", flush=True)
    return runs


def ways(model, best) -> dict:
    return {
        "1": (partial(model.encode, batch_size=1), model),
        "32": (partial(model.encode, batch_size=32), model),
        "best": (best, model),
    }


def embedding_gemma(tokenizer, directory: Path) -> SentenceTransformer:
    """EmbeddingGemma-300m (Vera et al. 2025, arXiv:2509.20354) with random weights: its time is that of the real one."""
    config = Gemma3TextConfig(
        hidden_size=768,
        num_hidden_layers=24,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=1152,
        vocab_size=262144,
        sliding_window=512,
        use_bidirectional_attention=True,
    )
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    transformer = Transformer(str(directory), model_kwargs=FLOAT32)
    identity = torch.nn.Identity()
    heads = [Dense(768, 3072, bias=False, activation_function=identity)]
    heads.append(Dense(3072, 768, bias=False, activation_function=identity))
    return SentenceTransformer(modules=[transformer, Pooling(768), *heads, Normalize()], device="cpu")


@torch.no_grad()
def report_loop(llm, tokenizer, texts):
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, max_length=MAX_TOKENS)
        llm(**batch.convert_to_tensors("pt"), output_hidden_states=True)


def varied_texts(dataset_root, count: int) -> list[str]:
    """`count` different texts: the test texts, then the same with their words turned by one, by two, ..."""
    task = get_task("AmazonCounterfactual", dataset_root=dataset_root)
    task.load_data()
    originals = list(dict.fromkeys(task_splits(task)["test"]["text"]))
    texts, turn = {}, 0
    while len(texts) < count:
        for text in originals:
            words = text.split()
            by = turn % len(words)
            texts[" ".join(words[by:] + words[:by])] = None
        turn += 1
    return list(texts)[:count]


def tokens_of(tokenizer, texts) -> int:
    return sum(len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"])


def padding_in_order(tokenizer, texts) -> float:
    """The share of padding in batches of 32 in the given order."""
    computed = 0
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        computed += len(batch) * max(map(len, batch))
    return 1 - tokens_of(tokenizer, texts) / computed


class LinearShapes:
    """Counts, while it is entered, the shapes (rows, in, out) of the products of `model`'s linear layers."""

    def __init__(self, model):
        self.counts, self.hooks, self.model = Counter(), [], model

    def __enter__(self):
        for module in self.model.modules() if self.model is not None else ():
            if isinstance(module, torch.nn.Linear):
                self.hooks.append(module.register_forward_hook(self._count))
        return self

    def _count(self, linear, args, output):
        rows = args[0].shape[:-1].numel()
        self.counts[rows, linear.in_features, linear.out_features, linear.bias is not None] += 1

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def seconds(self) -> float:
        """The time for these products alone."""
        total = 0.0
        for (rows, inputs, outputs, has_bias), count in self.counts.items():
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            bias = torch.randn(outputs) if has_bias else None
            if (times := min(count, 2)) > 1:
                torch.nn.functional.linear(x, weight, bias)  # the first of several is slower
            start = time.perf_counter()
            for _ in range(times):
                torch.nn.functional.linear(x, weight, bias)
            total += (time.perf_counter() - start) / times * count
        return total


def print_table(result):
    print("| | texts/s, batch 1 | 32 | best | tokens/s, best | time / floor |\n|---|---|---|---|---|---|")
    for name, row in result["models"].items():
        cells = [f"{row[way]['texts_per_second']:.1f}" if way in row else "" for way in ("1", "32", "best")]
        floor = f"{row['best']['time_to_floor']:.2f}" if "time_to_floor" in row["best"] else ""
        print(f"| {name} | {' | '.join(cells)} | {row['best']['tokens_per_second']:.0f} | {floor} |")
    for name, ratio in result["speed_ratios"].items():
        print(f"{name}: {ratio:.2f} times the texts/s")


if __name__ == "__main__":
    main()
