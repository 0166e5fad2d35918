"""What `encode_corpus.py` costs: texts per second against `encode` in one process, and bytes per text on disk.

    python -m benchmarks.corpus --dataset-root DIR

A hybrid on layer 7 embeds AmazonCounterfactual's test texts with their words moved around, so that none comes twice.
Within a repeat both embed the same texts, one after the other. The time of `encode_corpus` is from the first shard that
is there to the last, so that starting Ray and loading the model, shown beside it, do not depend on the number of texts.

What a shard costs beside its texts is the time of shards that hold none. Planning reads the footer of a Parquet file,
whatever its rows, and every line of JSON lines.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from backbones import OFFLINE_ENCODER, OFFLINE_LLM, resolve_backbone
from benchmarks.common import write_result
from benchmarks.encode import MAX_TOKENS, varied_texts
from corpus import PRECISIONS, embedding_columns, plan_shards, write_shard
from encoding import encode
from modeling_hybrid import HybridModel
from repository import save_repository

LAYER = 7
CORPUS = 10_000_000_000
EMPTY_SHARDS = 200
PLANNED = 500_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default=OFFLINE_LLM)
    parser.add_argument("--encoder", default=OFFLINE_ENCODER)
    parser.add_argument("--dataset-root", help="a local folder laid out as the Hub below datasets/")
    parser.add_argument("--texts", type=int, default=1200, help="of each repeat")
    parser.add_argument("--rows-per-shard", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/benchmarks/corpus.json")
    args = parser.parse_args()

    texts = varied_texts(args.dataset_root, args.texts * args.repeats)
    runs = []
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work, "model")
        hybrid = HybridModel.from_backbones(args.llm, args.encoder, [LAYER])
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(args.llm))
        save_repository(directory, hybrid, tokenizer, max_seq_length=MAX_TOKENS)
        model = SentenceTransformer(str(directory), trust_remote_code=True, device="cpu")
        for repeat in range(args.repeats):
            share = texts[repeat :: args.repeats]
            run, embeddings = measure(model, directory, share, args.rows_per_shard, Path(work, str(repeat)))
            runs.append(run)
            print(f"repeat {repeat + 1} of {args.repeats} done", flush=True)
        stored = {precision: bytes_per_text(embeddings, precision, Path(work)) for precision in PRECISIONS}
        per_shard = shard_seconds(directory, Path(work, "empty"))
        planning = planning_seconds(texts, Path(work))

    speed = statistics.median(run["corpus_texts_per_second"] for run in runs)
    result = {
        "llm": args.llm,
        "encoder": args.encoder,
        "texts_per_second": speed,
        "to_encode": statistics.median(
            run["corpus_texts_per_second"] / run["encode_texts_per_second"] for run in runs
        ),
        "start_seconds": statistics.median(run["start_seconds"] for run in runs),
        "seconds_per_shard": per_shard,
        "planning_seconds": planning,
        "bytes_per_text": stored,
        "ten_billion_texts": {
            "machine_hours": CORPUS / speed / 3600,
            "terabytes": {precision: CORPUS * size / 1e12 for precision, size in stored.items()},
        },
        "runs": runs,
    }
    write_result(args.output, result)
    print(
        f"{speed:.1f} texts/s, {result['to_encode']:.2f} times those of encode; start {result['start_seconds']:.0f} s"
    )
    print(f"a shard costs {per_shard * 1000:.0f} ms beside its texts")
    print(
        f"planning: {planning['parquet_file'] * 1000:.1f} ms a Parquet file, {planning['json_line'] * 1e6:.2f} µs a line"
    )
    print(f"10 billion texts: {CORPUS / speed / 3600:,.0f} hours of this machine")
    for precision, size in stored.items():
        print(f"{precision}: {size:.0f} bytes a text, 10 billion texts {CORPUS * size / 1e12:.1f} TB")


def measure(model, directory: Path, texts: list[str], rows_per_shard: int, work: Path):
    start = time.perf_counter()
    embeddings = encode(model, texts)
    seconds = time.perf_counter() - start

    start = time.time()
    written = written_shards(directory, texts, rows_per_shard, work)
    later = len(texts) - rows_per_shard
    return {
        "encode_texts_per_second": len(texts) / seconds,
        "corpus_texts_per_second": later / (written[-1] - written[0]),
        "start_seconds": written[0] - start - rows_per_shard * (written[-1] - written[0]) / later,
    }, embeddings


def written_shards(directory: Path, texts: list, rows_per_shard: int, work: Path) -> list[float]:
    """When one worker of `encode_corpus.py` wrote each shard of `texts`."""
    work.mkdir()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), work / "texts.parquet")
    command = [sys.executable, "encode_corpus.py", work / "texts.parquet", work / "out", "--model", directory]
    options = ["--rows-per-shard", str(rows_per_shard), "--workers", "1"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return sorted(path.stat().st_mtime for path in (work / "out").glob("shard-*"))


def shard_seconds(directory: Path, work: Path) -> float:
    """The time of a shard whose rows are null (in which the model embeds one empty text, for the width)."""
    written = written_shards(directory, [None] * EMPTY_SHARDS, 1, work)
    return (written[-1] - written[0]) / (EMPTY_SHARDS - 1)


def planning_seconds(texts: list[str], work: Path) -> dict[str, float]:
    """For a Parquet file, and for a line of JSON lines."""
    texts = [texts[i % len(texts)] for i in range(PLANNED)]
    pq.write_table(pa.table({"text": texts}), work / "planned.parquet")
    (work / "planned.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    seconds = {}
    for suffix in ("parquet", "jsonl"):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            plan_shards([str(work / f"planned.{suffix}")], 10_000, ["text"])
            times.append(time.perf_counter() - start)
        seconds[suffix] = statistics.median(times)
    return {"parquet_file": seconds["parquet"], "json_line": seconds["jsonl"] / PLANNED}


def bytes_per_text(embeddings, precision: str, work: Path) -> float:
    columns = embedding_columns(embeddings, embeddings[:, 0] == embeddings[:, 0], precision)
    write_shard(work / "shard.parquet", pa.array(range(len(embeddings)), pa.int64()), columns)
    return (work / "shard.parquet").stat().st_size / len(embeddings)


if __name__ == "__main__":
    main()
