import csv
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TEXTS
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import corpus
from corpus import find_files, plan_shards, read_shard
from encode_corpus import ShardEncoder, encode_corpus, send_code_along

COUNT = 50


def texts_of(count: int) -> list[str]:
    return [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(count)]


@pytest.fixture
def parquet(tmp_path) -> str:
    """Texts with names, in row groups that do not end where shards do."""
    table = pa.table({"name": [f"n{i}" for i in range(COUNT)], "text": texts_of(COUNT)})
    pq.write_table(table, tmp_path / "texts.parquet", row_group_size=7)
    return str(tmp_path / "texts.parquet")


@pytest.fixture
def model(trained_run):
    return SentenceTransformer(str(trained_run), trust_remote_code=True, device="cpu")


def read_output(output) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(output).glob("shard-*.parquet")))


def write_json_lines(path: Path, texts, end="\n") -> str:
    path.write_text("\n".join(json.dumps({"text": text, "n": i}) for i, text in enumerate(texts)) + end)
    return str(path)


@pytest.mark.parametrize("rows_per_shard", [1, 7, 8, 49, 50, 1000])
@pytest.mark.parametrize("read_bytes", [5, 1 << 20])
def test_shards_hold_every_row_once_and_in_order(parquet, tmp_path, rows_per_shard, read_bytes, monkeypatch):
    monkeypatch.setattr(corpus, "_READ_BYTES", read_bytes)
    texts = texts_of(COUNT)
    first = write_json_lines(tmp_path / "a.jsonl", texts[:14])
    second = write_json_lines(tmp_path / "b.jsonl", texts[14:], end="")
    (tmp_path / "c.jsonl").touch()
    for source in (parquet, str(tmp_path / "*.jsonl")):
        shards = plan_shards(find_files(source), rows_per_shard, ["text"])
        assert [shard.number for shard in shards] == list(range(len(shards)))
        ids, found = [], []
        for shard in shards:
            some_ids, some_texts = read_shard(shard, "text", None)
            assert len(some_texts) <= rows_per_shard
            ids += some_ids.to_pylist()
            found += some_texts
        assert found == texts and ids == list(range(COUNT))
    assert {Path(shard.file).name for shard in shards} == {Path(first).name, Path(second).name}


def test_blank_lines_are_no_rows_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    (shard,) = plan_shards(find_files(str(path)), 10, ["text"])
    ids, texts = read_shard(shard, "text", None)
    assert (ids.to_pylist(), texts) == ([0, 2], ["a", "b"])
    path.write_text('{"text": "a"}\n{"text": \n')
    (shard,) = plan_shards(find_files(str(path)), 10, ["text"])
    with pytest.raises(ValueError, match="texts.jsonl, line 2 is not JSON"):
        read_shard(shard, "text", None)


def test_a_dataset_directory_with_its_splits(dataset_root):
    directory = f"{dataset_root}/datasets/mteb/amazon_counterfactual"
    shards = plan_shards(find_files(directory, "en", "test"), 20, ["text"])
    assert [shard.rows for shard in shards] == [20, 20, 8]
    with pytest.raises(ValueError, match="no split 'dev'"):
        find_files(directory, "en", "dev")


def test_ids_embeddings_and_manifest(parquet, trained_run, model, tmp_path):
    output = tmp_path / "out"
    manifest = encode_corpus(parquet, str(output), str(trained_run), id_column="name", rows_per_shard=20)
    table = read_output(output)
    assert table["id"].to_pylist() == [f"n{i}" for i in range(COUNT)]
    embeddings = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(embeddings, model.encode(texts_of(COUNT)), atol=1e-5)
    assert manifest["rows"] == COUNT and manifest["shards"] == 3
    assert json.loads((output / "manifest.json").read_text()) == manifest
    assert sorted(path.name for path in output.iterdir()) == [
        ".plan.parquet",
        "manifest.json",
        *(f"shard-{i:08d}.parquet" for i in range(3)),
    ]

    # Again: only what is missing.
    kept = output / "shard-00000000.parquet"
    before, lost = kept.stat().st_mtime_ns, (output / "shard-00000001.parquet").read_bytes()
    (output / "shard-00000001.parquet").unlink()
    encode_corpus(parquet, str(output), str(trained_run), id_column="name", rows_per_shard=20)
    assert kept.stat().st_mtime_ns == before and (output / "shard-00000001.parquet").read_bytes() == lost

    for changed in ({"precision": "int8"}, {"rows_per_shard": 10}, {"id_column": None}):
        with pytest.raises(ValueError, match="made otherwise .another settings"):
            encode_corpus(
                parquet, str(output), str(trained_run), **{"id_column": "name", "rows_per_shard": 20, **changed}
            )
    pq.write_table(pa.table({"name": ["a"], "text": ["another"]}), parquet)
    with pytest.raises(ValueError, match="another input"):
        encode_corpus(parquet, str(output), str(trained_run), id_column="name", rows_per_shard=20)


@pytest.mark.long
def test_a_worker_needs_no_checkout(parquet, trained_run, tmp_path, fresh_process):
    from ray import cloudpickle

    (shard,) = plan_shards(find_files(parquet), COUNT, ["text"])
    (tmp_path / "out").mkdir()
    arguments = (str(trained_run), None, str(tmp_path / "out"), "text", "name", "float32", 1)
    send_code_along(cloudpickle)
    (tmp_path / "pickle").write_bytes(cloudpickle.dumps((ShardEncoder, arguments, asdict(shard))))
    code = f"import pickle; worker, arguments, row = pickle.load(open({str(tmp_path / 'pickle')!r}, 'rb')); "
    assert "'rows': 50" in fresh_process(code + "print(worker(*arguments)(row))")
    assert len(read_output(tmp_path / "out")) == COUNT


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_smaller_precisions(precision, model):
    embeddings = model.encode(TEXTS)
    present = np.array([True] * 3 + [False] + [True] * (len(TEXTS) - 3))
    embeddings[5] = 0
    columns = corpus.embedding_columns(embeddings, present, precision)
    assert columns["embedding"].type == pa.list_(pa.from_numpy_dtype(precision), embeddings.shape[1])
    assert [value is not None for value in columns["embedding"].to_pylist()] == present.tolist()
    values = np.array([value for value in columns["embedding"].to_pylist() if value is not None], np.float32)
    if precision == "int8":
        values *= np.array([s for s in columns["scale"].to_pylist() if s is not None])[:, None]
    np.testing.assert_allclose(values, embeddings, atol=np.abs(embeddings).max() / 250)


@pytest.mark.long
def test_values_that_are_no_texts_have_a_null_embedding(trained_run, model, tmp_path, caplog):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"text": "A pan."}\n{"text": null}\n{"text": 7}\n{"text": "\\ud800"}\n{"other": 1}\n{"text": ""}\n'
    )
    encode_corpus(str(path), str(tmp_path / "out"), str(trained_run), precision="int8")
    table = read_output(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(6))
    assert [value is not None for value in table["embedding"].to_pylist()] == [True, False, False, False, False, True]
    assert "4 rows hold no text" in caplog.text


def nan_in_weights(path: Path):
    weights = load_file(path)
    name = next(name for name in weights if "projector" in name)
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, path, {"format": "pt"})


def half_of_weights(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.long
@pytest.mark.parametrize("spoil,message", [(nan_in_weights, "NaN"), (half_of_weights, "are damaged")])
def test_a_damaged_model_stops_it_with_one_clear_line(spoil, message, parquet, final, tmp_path):
    spoil(final / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        encode_corpus(parquet, str(tmp_path / "out"), str(final))
    assert not list((tmp_path / "out").glob("shard-*"))


def command(source, output, model, *options):
    return [sys.executable, "encode_corpus.py", str(source), str(output), "--model", str(model), *map(str, options)]


def test_bad_input_is_one_clear_line(parquet, trained_run, tmp_path):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "empty.jsonl").touch()
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "columns.parquet")
    for source, output, message in (
        (tmp_path / "no.parquet", "out", "There is no file"),
        (tmp_path / "damaged.parquet", "out", "is damaged"),
        (tmp_path / "empty.jsonl", "out", "there are no rows"),
        (tmp_path / "columns.parquet", "out", "has no column 'text'; it has other"),
        (parquet, parquet, "is a file. Name another"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            encode_corpus(str(source), str(tmp_path / output), str(trained_run))
    done = subprocess.run(
        command(parquet, tmp_path / "out", tmp_path / "nowhere"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "encode_corpus.py: " in done.stderr and "Traceback" not in done.stderr


def many_texts(path: Path, count: int) -> str:
    """The sample's sentences again and again, each time with another number, as a Parquet file."""
    with open(ROOT / "data/counterfactual_sample/train.csv") as file:
        sentences = [row["text"] for row in csv.DictReader(file)]
    texts = [f"{sentences[i % len(sentences)]} ({i})" for i in range(count)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=5000)
    return str(path)


def workers() -> list[psutil.Process]:
    """The processes of Ray's actors that encode."""
    found = []
    for process in psutil.process_iter():
        try:
            if "ShardEncoder" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def memory_mib(driver: psutil.Process) -> Counter:
    """What the driver, its workers and Ray's own processes have written to memory, and what of all is resident.

    The former leaves out pages of files, such as the libraries', and divides what several share among them.
    """
    memory = Counter()
    for process in [driver, *driver.children(recursive=True)]:
        try:
            name = "driver" if process == driver else "workers" if "ShardEncoder" in process.cmdline()[0] else "Ray"
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except (OSError, psutil.Error, IndexError):  # it has just ended
            continue
        size = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines}
        memory[name] += size["Pss_Anon:"] + size["Pss_Shmem:"]
        memory["resident"] += size["Rss:"]
    return memory + Counter(written=memory.total() - memory["resident"])


@pytest.mark.long
def test_two_machines_one_worker_killed_and_every_text_is_there_once(trained_run, model, tmp_path):
    from ray.cluster_utils import Cluster

    count = 200_000
    source = many_texts(tmp_path / "texts.parquet", count)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        driver = subprocess.Popen(
            [*command(source, tmp_path / "out", trained_run, "--rows-per-shard", 4000), "--address", cluster.address],
            cwd=ROOT,
        )
        deadline = time.monotonic() + 300
        while len(list((tmp_path / "out").glob("shard-*"))) < 5:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        encoding = workers()
        assert len(encoding) == 2, "one on each machine"
        encoding[0].kill()
        assert driver.wait(900) == 0
    finally:
        cluster.shutdown()
    table = read_output(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(count))
    assert table["embedding"].null_count == 0
    texts = pq.read_table(source)["text"]
    some = range(0, count, 997)
    expected = model.encode([texts[i].as_py() for i in some])
    np.testing.assert_allclose(np.stack([table["embedding"][i].values.to_numpy() for i in some]), expected, atol=1e-5)


@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus(trained_run, tmp_path):
    peaks = {}
    for count in (20_000, 200_000):
        source = many_texts(tmp_path / f"{count}.parquet", count)
        options = ("--rows-per-shard", 2000, "--workers", 2)
        driver = psutil.Popen(command(source, tmp_path / f"out-{count}", trained_run, *options), cwd=ROOT)
        peaks[count] = Counter()
        while driver.poll() is None:
            peaks[count] |= memory_mib(driver)  # the larger of each
            time.sleep(1)
        assert driver.wait() == 0
    print("\npeak memory in MiB:", {count: {k: round(v) for k, v in peak.items()} for count, peak in peaks.items()})
    for name in ("driver", "workers", "written", "resident"):
        assert peaks[200_000][name] <= 1.05 * peaks[20_000][name]
