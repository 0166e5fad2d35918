"""Embeds a corpus, of any size, into Parquet shards of ids and embeddings, on one machine or a Ray cluster.

    python encode_corpus.py texts.parquet embeddings --model runs/mine/final
    python encode_corpus.py 'crawl/*.jsonl' embeddings --model owner/name --id-column url --precision int8
    python encode_corpus.py owner/dataset embeddings --model owner/name --split train --address auto

INPUT is a Parquet or JSON-lines file, a pattern, or a dataset (directory or Hub id). OUTPUT, a directory that every
machine of the cluster sees, gets `shard-00000000.parquet`, ... and `manifest.json`, which says what made them. A shard
appears whole or not at all, and the same command again does only those that are missing.

What travels through Ray Data are descriptions of shards (file, rows), not texts: a worker reads its shard, embeds it and
writes it, so that memory does not depend on the size of the corpus, and a worker that dies costs the shard it was at.
"""

import argparse
import json
import logging
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

import backbones
import corpus
import encoding
import llm_cache
from backbones import backbone_revision, explained_load_errors, resolve_backbone
from corpus import PRECISIONS, Shard, embedding_columns, find_files, is_text, plan_shards, read_shard, write_shard
from encoding import encode
from llm_cache import remove_leftovers, write_whole
from repository import refuse_unwritable, write_json

logger = logging.getLogger(__name__)

# A CPU worker's threads: more workers of fewer threads waste less on waiting for each other, and take more memory.
THREADS_PER_WORKER = 4
# Ray keeps a few bytes for each task; beyond this many shards a task is more than one.
MAX_TASKS = 10_000
# For descriptions of shards alone.
OBJECT_STORE_BYTES = 128 << 20


class ShardEncoder:
    """A worker: holds the model, and turns one description of a shard into its file."""

    def __init__(self, model: str, revision: str | None, output: str, text_column, id_column, precision, threads):
        if threads:
            torch.set_num_threads(threads)
        self.output, self.precision = Path(output), precision
        self.text_column, self.id_column = text_column, id_column
        remove_leftovers(output)  # of a worker that died on this machine
        self.error = ""
        try:
            with explained_load_errors(model):
                self.model = SentenceTransformer(model, revision=revision, trust_remote_code=True)
        except (ValueError, OSError) as error:
            self.error = str(error)

    def __call__(self, row: dict) -> dict:
        """Returns how many rows are done, and a failure as text: Ray would bury the exception under its own."""
        shard, without_embedding = Shard(**row), 0
        path = self.output / shard.name
        if self.error:
            return {"rows": 0, "without_embedding": 0, "error": self.error}
        try:
            if not path.exists():  # it does if the worker before this one died after writing it
                without_embedding = self._encode(shard, path)
        except (ValueError, OSError) as error:
            return {"rows": 0, "without_embedding": 0, "error": f"{shard.file}, from row {shard.first_row}: {error}"}
        return {"rows": shard.rows, "without_embedding": without_embedding, "error": ""}

    def _encode(self, shard: Shard, path: Path) -> int:
        ids, texts = read_shard(shard, self.text_column, self.id_column)
        present = np.array([is_text(text) for text in texts], dtype=bool)
        embeddings = encode(self.model, [text for text in texts if is_text(text)])
        if not np.isfinite(embeddings).all():
            raise ValueError("embeddings contain NaN or infinity. Check the model's weights.")
        write_shard(path, ids, embedding_columns(embeddings, present, self.precision))
        return int((~present).sum())


def encode_corpus(
    source: str,
    output: str,
    model: str,
    revision: str | None = None,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    id_column: str | None = None,
    precision: str = "float32",
    rows_per_shard: int = 10_000,
    address: str | None = None,
    workers: int | None = None,
) -> dict:
    """Embeds what is still missing, and returns the manifest.

    Args:
        source, config, split: see [`find_files`].
        output: the directory of the shards.
        model: a SentenceTransformer directory or Hub id, with `revision` of the latter.
        text_column: a value there that is not a text (null, a number, a lone surrogate) gets a null embedding.
        id_column: copied into the shards; without it ids are row numbers.
        precision: of the stored embeddings, one of `PRECISIONS`; see [`embedding_columns`].
        address: of a Ray cluster, `auto` on one of its machines; by default Ray runs on this machine alone.
        workers: by default one a GPU, or on CPUs one for each `THREADS_PER_WORKER` of a machine.

    Raises:
        ValueError: `output` was made from other texts, by another model or with other settings; or see [`corpus`].
            Also where a worker could not read, embed or write a shard; the finished ones stay.
        OSError: a file or the model is not found, or `output` cannot be written.
    """
    output = Path(output).resolve()
    refuse_unwritable(output)
    files = find_files(source, config, split)
    path = resolve_backbone(model)
    with explained_load_errors(model):
        commit = backbone_revision(model, revision or "main")
    manifest = {
        "model": {"name": model, "revision": commit},
        "input": {"source": source, "config": config, "split": split, "files": [_state(file) for file in files]},
        "settings": {
            "text_column": text_column,
            "id_column": id_column,
            "precision": precision,
            "rows_per_shard": rows_per_shard,
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    _refuse_other(output / "manifest.json", manifest)
    remove_leftovers(output)
    shards = _plan(output, files, rows_per_shard, [text_column] + [id_column] * (id_column is not None))
    write_json(output / "manifest.json", {**manifest, "complete": False})

    missing = [shard for shard in shards if not (output / shard.name).exists()]
    if missing:
        path = str(Path(path).resolve()) if Path(path).is_dir() else path
        arguments = (path, None if Path(path).is_dir() else commit, str(output), text_column, id_column, precision)
        _run(missing, sum(shard.rows for shard in shards), arguments, address, workers)
        remove_leftovers(output)  # of workers that died meanwhile
    manifest |= {"complete": True, "rows": sum(shard.rows for shard in shards), "shards": len(shards)}
    write_json(output / "manifest.json", manifest)
    return manifest


def _run(missing: list[Shard], total: int, arguments: tuple, address: str | None, workers: int | None):
    """Encodes the missing shards, with a progress bar over all rows of the corpus."""
    without_embedding = 0
    initial = total - sum(shard.rows for shard in missing)
    with (
        closing(_encoded(missing, arguments, address, workers)) as encoded,
        tqdm(total=total, initial=initial, desc="Encoding", unit=" texts", unit_scale=True) as progress,
    ):
        for row in encoded:
            if row["error"]:
                raise ValueError(row["error"])
            progress.update(row["rows"])
            without_embedding += row["without_embedding"]
    if without_embedding:
        logger.warning("%d rows hold no text and have a null embedding.", without_embedding)


def _encoded(missing: list[Shard], arguments: tuple, address: str | None, workers: int | None):
    """Yields what workers, made with `arguments`, return of the missing shards, in the order in which they are done."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    local = {} if address else {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    ray.init(address=address or "local", logging_level=logging.ERROR, **local)
    try:
        send_code_along(ray.cloudpickle)
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        workers, resources = _resources(ray.nodes(), workers)
        shards = from_items([asdict(shard) for shard in missing], override_num_blocks=min(len(missing), MAX_TASKS))
        yield from shards.map(
            ShardEncoder,
            fn_constructor_args=(*arguments, int(resources.get("num_cpus", 0))),
            compute=ActorPoolStrategy(size=min(workers, len(missing)), max_tasks_in_flight_per_actor=2),
            **resources,
        ).iter_rows()
    finally:
        ray.shutdown()


def send_code_along(cloudpickle):
    """The machines of a cluster need the packages, but no checkout.

    What travels is what [`ShardEncoder`] names, and that must be functions: of a module that it named, all would travel.
    """
    for module in (backbones, corpus, encoding, llm_cache, sys.modules[ShardEncoder.__module__]):
        cloudpickle.register_pickle_by_value(module)


def _resources(nodes: list[dict], workers: int | None) -> tuple[int, dict]:
    """How many workers, and what Ray gives each: a GPU, or some threads of one machine."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in alive))
    if gpus:
        return workers or gpus, {"num_gpus": 1}
    cpus = [int(node["CPU"]) for node in alive if node.get("CPU", 0) >= 1]
    if not cpus:
        raise ValueError("The Ray cluster offers neither GPU nor CPU.")
    if workers:
        return workers, {"num_cpus": max(1, min(sum(cpus) // workers, *cpus))}
    threads = min(THREADS_PER_WORKER, *cpus)
    return sum(count // threads for count in cpus), {"num_cpus": threads}


def _plan(output: Path, files, rows_per_shard, columns) -> list[Shard]:
    """The shards, as an earlier run of the same manifest found them, or found now."""
    path = output / ".plan.parquet"
    if (output / "manifest.json").exists() and path.exists():
        return [Shard(**row) for row in pq.read_table(path).to_pylist()]
    shards = plan_shards(files, rows_per_shard, columns)
    if not shards:
        raise ValueError(f"{files[0]}{' and the others' * (len(files) > 1)}: there are no rows.")
    table = pa.Table.from_pylist([asdict(shard) for shard in shards])
    write_whole(path, lambda temporary: pq.write_table(table, temporary))
    return shards


def _state(file: str) -> dict:
    """What tells a changed file from the one that was read; files of the Hub have their commit in their name."""
    filesystem, path = fsspec.core.url_to_fs(file)
    info = filesystem.info(path)
    return {"file": file, "bytes": info["size"], "modified": str(info.get("mtime") or info.get("LastModified"))}


def _refuse_other(path: Path, manifest: dict):
    if not path.exists():
        return
    earlier, ours = json.loads(path.read_text()), json.loads(json.dumps(manifest))
    changed = [name for name in ours if earlier.get(name) != ours[name]]
    if changed:
        raise ValueError(
            f"{path.parent} holds embeddings made otherwise (another {' and another '.join(changed)}: compare "
            f"{path.name}). Name another directory, or delete it."
        )


def main():
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="INPUT", help="file, pattern, directory of a dataset, or Hub id")
    parser.add_argument("output", metavar="OUTPUT", help="directory for the shards")
    parser.add_argument("--model", required=True, help="a SentenceTransformer directory or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a model on the Hub")
    parser.add_argument("--config", help="configuration of a dataset that has several")
    parser.add_argument("--split", default="train", help="of a dataset")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--id-column", help="kept beside the embeddings; row numbers by default")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="int8: each with its own scale")
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument("--address", help="of a Ray cluster; auto on one of its machines")
    parser.add_argument("--workers", type=int, help="one a GPU, or one for every four cores of a machine, by default")
    try:
        manifest = encode_corpus(**vars(parser.parse_args()))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"encode_corpus.py: {error}")
    print(json.dumps({name: manifest[name] for name in ("model", "rows", "shards")}, indent=2))


if __name__ == "__main__":
    main()
