"""An epoch of the hybrid with cached LLM states, without, of the encoder alone, and of the report's loop.

    python -m benchmarks.train --dataset-root DIR

All train on the same texts in batches of 32, the first three with `train.py` itself. The cache is filled before, and how
long that took is said beside. The report's loop runs the causal LM at full depth in every step, with its vocabulary head
and all hidden states, over batches in the given order, padded to the longest of the batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backbones import OFFLINE_ENCODER, OFFLINE_LLM, resolve_backbone
from benchmarks.common import FLOAT32, write_result
from modeling_hybrid import HybridModel, masked_mean
from tasks import get_task, task_splits
from train import fit, parse_arguments
from trainer import HybridModule

BATCH_SIZE = 32


class WithoutCache(HybridModule):
    def __init__(self, model, tokenizer, max_seq_length, cache):
        super().__init__(model, tokenizer, max_seq_length)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default=OFFLINE_LLM)
    parser.add_argument("--encoder", default=OFFLINE_ENCODER)
    parser.add_argument("--layer", type=int, default=7)
    parser.add_argument("--dataset-root", help="a local folder laid out as the Hub below datasets/")
    parser.add_argument("--texts", type=int, default=512, help="of the train split of AmazonCounterfactual")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/benchmarks/train.json")
    args = parser.parse_args()

    task = get_task("AmazonCounterfactual", dataset_root=args.dataset_root)
    task.load_data()
    split = task_splits(task)["train"]
    texts, labels = list(split["text"])[: args.texts], list(split["label"])[: args.texts]
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "texts.jsonl")
        file.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in zip(texts, labels)))

        def epoch(llm: str, module=HybridModule) -> float:
            options = [
                *("--llm", llm, "--encoder", args.encoder, "--llm_layers", str(args.layer)),
                *("--train_file", str(file), "--validation_share", "0", "--llm_cache_dir", f"{work}/states"),
                *("--num_train_epochs", "1", "--per_device_train_batch_size", str(BATCH_SIZE)),
                *("--output_dir", f"{work}/run", "--save_strategy", "no", "--report_to", "none"),
                # One reading and one view of each text, as the report's loop has it.
                *("--no_read_words", "--consistency_weight", "0"),
            ]
            return fit(*parse_arguments(options), {}, module)[1]["train_seconds"]

        start = time.perf_counter()
        epoch(args.llm)  # fills the cache
        print(f"the first epoch, with loading and filling the cache: {time.perf_counter() - start:.0f} s", flush=True)
        kinds = {
            "hybrid, cached": lambda: epoch(args.llm),
            "hybrid, not cached": lambda: epoch(args.llm, WithoutCache),
            "encoder alone": lambda: epoch("none"),
            "the report's loop": lambda: report_epoch(args, texts, labels),
        }
        seconds = {kind: [] for kind in kinds}
        for _ in range(args.repeats):
            for kind, run in kinds.items():
                seconds[kind].append(run())
            print(", ".join(f"{kind} {times[-1]:.1f} s" for kind, times in seconds.items()), flush=True)
            ratios = {
                kind: statistics.median(t / s for t, s in zip(times, seconds["hybrid, cached"]))
                for kind, times in seconds.items()
            }
            result = {
                "llm": args.llm,
                "encoder": args.encoder,
                "layer": args.layer,
                "texts": len(texts),
                "seconds": seconds,
                "relative_to_cached": ratios,
            }
            write_result(args.output, result)  # after every repeat: they take minutes
    print("| | seconds an epoch | relative to the cached hybrid |\n|---|---|---|")
    for kind, times in seconds.items():
        print(f"| {kind} | {statistics.median(times):.1f} | {ratios[kind]:.2f} |")


def report_epoch(args, texts, labels) -> float:
    """One epoch as the report's notebook trained; loading the models does not count."""
    path = resolve_backbone(args.llm)
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = AutoModelForCausalLM.from_pretrained(path, **FLOAT32).eval()
    hybrid = HybridModel.from_backbones(args.llm, args.encoder, [args.layer]).train()
    head = torch.nn.Linear(hybrid.config.hidden_size, len(set(labels)))
    trained = [*hybrid.projector.parameters(), *hybrid.encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(trained, lr=1e-5)
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer(
            texts[first : first + BATCH_SIZE], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.no_grad():
            states = llm(**batch, output_hidden_states=True).hidden_states[args.layer]
        output = hybrid.encoder(
            inputs_embeds=hybrid.projector(states), attention_mask=batch["attention_mask"]
        ).last_hidden_state
        pooled = masked_mean(output, torch.ones_like(batch["attention_mask"]))
        loss = torch.nn.functional.cross_entropy(head(pooled), torch.tensor(labels[first : first + BATCH_SIZE]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
