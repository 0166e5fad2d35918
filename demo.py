"""The demo behind `make demo`: a hybrid and its two baselines on the bundled sample, then the hybrid in use."""

import csv
import json
import subprocess
import sys
from pathlib import Path

RUNS = {
    "LLM alone (frozen, classifier trained)": ["--encoder", "none", "--output_dir", "runs/demo-llm"],
    "encoder alone (fine-tuned)": ["--llm", "none", "--output_dir", "runs/demo-encoder"],
    "hybrid": ["--output_dir", "runs/demo-hybrid"],
}
QUERIES = [
    "If the zip had been longer, I would have kept the bag.",
    "The train leaves at nine and arrives before noon.",
    "I wish someone had told me about the stairs.",
]


def main():
    accuracies = {}
    for name, options in RUNS.items():
        print(f"\n=== {name} ===", flush=True)
        subprocess.run([sys.executable, "train.py", "configs/demo.yaml", *options], check=True)
        results = json.loads((Path(options[-1]) / "results.json").read_text())
        accuracies[name] = results["metrics"]["test"]

    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer("runs/demo-hybrid/final", trust_remote_code=True)
    with open("data/counterfactual_sample/test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    embeddings = model.encode([row["text"] for row in rows], convert_to_tensor=True)

    print("\nHeld-out sentences of the sample (120: one is 0.8 points, so this compares nothing; see the README)")
    print(f"{'':<42}{'accuracy':>10}{'F1':>8}")
    for name, metrics in accuracies.items():
        print(f"{name:<42}{metrics['accuracy']:>10.3f}{metrics['f1']:>8.3f}")
    print("\nNearest held-out sentences, by the hybrid loaded through SentenceTransformer")
    for query, hits in zip(
        QUERIES, util.semantic_search(model.encode(QUERIES, convert_to_tensor=True), embeddings, top_k=3)
    ):
        print(f"\n  {query}")
        for hit in hits:
            row = rows[hit["corpus_id"]]
            print(f"    {hit['score']:.2f}  {row['label_text']:<14}  {row['text']}")


if __name__ == "__main__":
    main()
