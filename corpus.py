"""A corpus of texts cut into shards: which rows each shard holds, reading one, and writing its embeddings.

A shard is some rows of one file, so that any worker can read it by itself and no worker reads more than it needs. The
files are Parquet or JSON lines, wherever fsspec reads: local, `s3://`, or those of a dataset on the Hub (`hf://`).
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_cache import write_whole

JSON_LINES = (".jsonl", ".json", ".ndjson")
PRECISIONS = ("float32", "float16", "int8")
_READ_BYTES = 1 << 23


@dataclass(frozen=True)
class Shard:
    """`rows` rows of `file` from `first_row` on, both counted in this file; `first_id` is the corpus's number of the first.

    `offset` is the byte in which the first row begins in JSON lines, -1 in Parquet.
    """

    number: int
    file: str
    first_row: int
    rows: int
    first_id: int
    offset: int

    @property
    def name(self) -> str:
        return f"shard-{self.number:08d}.parquet"


def find_files(source: str, config: str | None = None, split: str = "train") -> list[str]:
    """The files of `source`: a file, a pattern with `*`, or a dataset (a directory or a Hub id) with its split's files.

    Files of a dataset on the Hub are named with its commit.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the dataset has no such split, or a file is neither Parquet nor JSON lines.
    """
    if "*" in source or source.endswith((".parquet", *JSON_LINES)):
        filesystem, path = fsspec.core.url_to_fs(source)
        files = [filesystem.unstrip_protocol(found) for found in sorted(filesystem.glob(path))]
    else:
        from datasets import load_dataset_builder  # takes a second to import, and workers do not need it

        data_files = load_dataset_builder(source, config).config.data_files or {}
        if split not in data_files:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(map(str, data_files)) or 'none'}.")
        files = list(data_files[split])
    if not files:
        raise FileNotFoundError(f"There is no file {source}.")
    for file in files:
        if not file.endswith((".parquet", *JSON_LINES)):
            raise ValueError(
                f"{file} is neither Parquet nor JSON lines (uncompressed). For a dataset on the Hub in another format, "
                "download its Parquet copy (revision refs/convert/parquet) and name the files."
            )
    return files


def plan_shards(files: list[str], rows_per_shard: int, columns: list[str]) -> list[Shard]:
    """Cuts the files into shards of at most `rows_per_shard` rows.

    Reads the footers of Parquet files, and JSON lines once from end to end, for where their lines begin.

    Raises:
        ValueError: a file lacks one of `columns`, or is damaged.
    """
    shards, first_id = [], 0
    for file in files:
        plan = _plan_parquet if file.endswith(".parquet") else _plan_json_lines
        rows, offsets = plan(file, rows_per_shard, columns)
        for first_row, offset in zip(range(0, rows, rows_per_shard), offsets):
            size = min(rows_per_shard, rows - first_row)
            shards.append(Shard(len(shards), file, first_row, size, first_id + first_row, offset))
        first_id += rows
    return shards


def _plan_parquet(file, rows_per_shard, columns) -> tuple[int, list[int]]:
    with fsspec.open(file) as handle:
        try:
            parquet = pq.ParquetFile(handle)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        _require_columns(file, columns, parquet.schema_arrow.names)
        rows = parquet.metadata.num_rows
    return rows, [-1] * -(-rows // rows_per_shard)


def _plan_json_lines(file, rows_per_shard, columns) -> tuple[int, list[int]]:
    """The number of lines, and the byte in which each `rows_per_shard`th begins."""
    with fsspec.open(file) as handle:
        first = handle.readline()
        if first.strip():
            _require_columns(file, columns, _parse_line(first, file, 0))
        handle.seek(0)
        offsets, rows, position, last = [], 0, 0, b"\n"
        while chunk := handle.read(_READ_BYTES):
            if position == 0:
                offsets.append(0)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + 1 + position
            # After its nth end a line begins that is the first of a shard, if n is a multiple.
            first_end = rows_per_shard - rows % rows_per_shard - 1
            offsets += ends[first_end::rows_per_shard].tolist()
            rows, position, last = rows + len(ends), position + len(chunk), chunk[-1:]
    return rows + (last != b"\n"), offsets


def read_shard(shard: Shard, text_column: str, id_column: str | None) -> tuple[pa.Array, list]:
    """The ids and the values of `text_column`. Without `id_column` ids are the corpus's row numbers, from 0.

    Blank lines of JSON lines are left out, but counted in the numbers.
    """
    if shard.file.endswith(".parquet"):
        table = _read_parquet(shard, [text_column] + [id_column] * (id_column is not None))
        numbers = range(shard.first_id, shard.first_id + shard.rows)
        texts = table[text_column].to_pylist()
        ids = table[id_column].combine_chunks() if id_column else pa.array(numbers, pa.int64())
        return ids, texts
    numbers, rows = _read_json_lines(shard)
    texts = [row.get(text_column) for row in rows]
    if id_column is None:
        return pa.array(numbers, pa.int64()), texts
    try:
        return pa.array([row.get(id_column) for row in rows]), texts
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"The values of {id_column!r} are not all of one type: {error}") from error


def _read_parquet(shard: Shard, columns: list[str]) -> pa.Table:
    with fsspec.open(shard.file) as handle:
        parquet = pq.ParquetFile(handle)
        batches, start, end = [], shard.first_row, shard.first_row + shard.rows
        group_start = 0
        for group in range(parquet.num_row_groups):
            group_end = group_start + parquet.metadata.row_group(group).num_rows
            if group_start < end and group_end > start:
                row = group_start
                for batch in parquet.iter_batches(row_groups=[group], columns=columns):
                    first, last = max(start - row, 0), min(end - row, batch.num_rows)
                    if first < last:
                        batches.append(batch.slice(first, last - first))
                    row += batch.num_rows
                    if row >= end:
                        break
            group_start = group_end
        return pa.Table.from_batches(batches)


def _read_json_lines(shard: Shard) -> tuple[list[int], list[dict]]:
    numbers, rows = [], []
    with fsspec.open(shard.file) as handle:
        handle.seek(shard.offset)
        for number in range(shard.rows):
            line = handle.readline()
            if line.strip():
                numbers.append(shard.first_id + number)
                rows.append(_parse_line(line, shard.file, shard.first_row + number))
    return numbers, rows


def _parse_line(line: bytes, file: str, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number + 1} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number + 1} is not a JSON object.")
    return row


def _require_columns(file, columns, present):
    for column in columns:
        if column not in present:
            raise ValueError(f"{file} has no column {column!r}; it has {', '.join(present)}.")


def is_text(value) -> bool:
    """Whether `value` is a string that has a UTF-8 form: a lone surrogate has none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def embedding_columns(embeddings: np.ndarray, present: np.ndarray, precision: str) -> dict[str, pa.Array]:
    """The columns of a shard beside its ids.

    Args:
        embeddings (texts that are present, dim): float32.
        present (rows): whether a row has an embedding; the others are null.
        precision: `int8` divides each embedding by a `scale` of its own, its largest value / 127. Cosine similarities
            need no scale.
    """
    columns = {}
    if precision == "int8":
        scale = np.abs(embeddings).max(axis=1, keepdims=True) / 127
        embeddings = np.round(embeddings / np.where(scale > 0, scale, 1))
        scales = np.zeros(len(present), np.float32)
        scales[present] = scale[:, 0]
        columns["scale"] = pa.array(scales, mask=~present)
    values = np.zeros((len(present), embeddings.shape[1]), dtype=precision)
    values[present] = embeddings
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1], mask=pa.array(~present))
    return {"embedding": lists, **columns}


def write_shard(path: Path, ids: pa.Array, columns: dict[str, pa.Array]):
    """Writes a shard, which appears whole or not at all."""
    # Floats hardly ever come twice, and a dictionary of them is space and time for nothing; int8 has 256 values.
    dictionary = [] if pa.types.is_floating(columns["embedding"].type.value_type) else ["embedding.list.element"]
    table = pa.table({"id": ids, **columns})
    write_whole(path, partial(pq.write_table, table, compression="zstd", use_dictionary=dictionary))
