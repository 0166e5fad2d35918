"""Processes killed at any moment: the same command again ends in what an undisturbed one does."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import faults_worker
import hub as hub_module
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TEXTS
from hub import TOKEN, USER, Hub
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

import llm_cache
from llm_cache import LLMStateCache, write_whole
from modeling_hybrid import HybridModel
from repository import written_whole
from trainer import last_complete_checkpoint

LAYERS = [2, 5]
REPO = f"{USER}/tiny-hybrid"
WORDS = "the lid bus river pan owner book door café street lamp coat".split()
# What a checkpoint consists of; one that lacks a part is unfinished, and removed by the next start.
CHECKPOINT = {"trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def sentences(count: int) -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(2, 20))) + f" {i}" for i in range(count)]


# Without killing: what a killed process leaves behind


@pytest.fixture
def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(dead, tmp_path):
    host = socket.gethostname()
    others = {f".results.json.{host}.{os.getppid()}.tmp", f".results.json.elsewhere.{dead}.tmp"}
    for name in [f".results.json.{host}.{dead}.tmp", f".other.json.{host}.{dead}.tmp", *others]:
        (tmp_path / name).write_text('{"acc')
    write_whole(tmp_path / "results.json", lambda path: path.write_text("{}"))
    assert names(tmp_path) == others | {"results.json"}


def test_a_directory_is_looked_through_once_and_not_at_every_write(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(llm_cache, "remove_leftovers", looked.append)
    for i in range(3):
        write_whole(tmp_path / f"{i}.json", lambda path: path.write_text("{}"))
    assert looked == [tmp_path]


def test_a_directory_is_replaced_whole(dead, tmp_path, monkeypatch):
    final, host = tmp_path / "final", socket.gethostname()
    for text in ("old", "new"):
        for leftover in (
            f".final.{host}.{dead}.tmp",
            f".final.old.{host}.{dead}.tmp",
            f".final.{host}.{os.getpid()}.tmp",
        ):
            (tmp_path / leftover).mkdir()
        llm_cache._LOOKED_THROUGH.clear()  # as in another process
        removed = []
        rmtree = shutil.rmtree
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda path, **k: removed.append(Path(path)) or rmtree(path, **k))
            with written_whole(final) as work:
                (work / "config.json").write_text(text)
        assert final not in removed  # it takes a while, and a kill could come in the middle of it
        assert (final / "config.json").read_text() == text
        assert names(tmp_path) == {"final"}


def test_a_half_deleted_checkpoint_is_none(tmp_path):
    """The trainer deletes the last checkpoint at the end of a training, and a kill may come in the middle."""
    for step in (4, 8):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        for name in CHECKPOINT:
            (directory / name).write_text(json.dumps({"global_step": step}))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert last_complete_checkpoint(tmp_path, num_processes=2) is None and not names(tmp_path)
    for missing in CHECKPOINT:
        for step in (4, 8):
            directory = tmp_path / f"checkpoint-{step}"
            directory.mkdir(exist_ok=True)
            for name in CHECKPOINT:
                (directory / name).write_text(json.dumps({"global_step": step}))
        (tmp_path / "checkpoint-8" / missing).unlink()
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
        assert names(tmp_path) == {"checkpoint-4"}


def test_two_processes_fill_one_cache_at_once(tiny_llm, llm_tokenizer, tmp_path):
    texts = sentences(150)
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import llm_cache
from modeling_hybrid import HybridModel
from transformers import AutoTokenizer
llm_cache.TOKENS_PER_SHARD, llm_cache.suitable_tokens_per_batch = 60, lambda device: 60
model = HybridModel.from_backbones({tiny_llm!r}, None, llm_layers={LAYERS})
tokenizer = AutoTokenizer.from_pretrained({tiny_llm!r})
Path(sys.argv[1]).touch()
while not Path({str(tmp_path / "go")!r}).exists():
    time.sleep(0.001)
cache = llm_cache.LLMStateCache({str(tmp_path / "states")!r}, {{}}, {LAYERS})
cache.fill(model, tokenizer, {texts!r}, max_length=64)
"""
    ready = [tmp_path / "ready-1", tmp_path / "ready-2"]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for path in ready]
    deadline = time.time() + 120
    while not all(path.exists() for path in ready) and time.time() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    cache = LLMStateCache(tmp_path / "states", {}, LAYERS)
    stored = 0
    for path in cache.directory.glob("layer-02/*"):
        with safe_open(path, framework="pt") as shard:
            stored += len(shard.get_tensor("keys"))
    assert stored > len(texts)  # they did get in each other's way
    assert all(path.suffix == ".safetensors" for path in cache.directory.glob("layer-*/*"))
    model = HybridModel.from_backbones(tiny_llm, None, llm_layers=LAYERS)
    for text in texts:
        encoded = llm_tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        expected = model.hidden_states(encoded["input_ids"], encoded["attention_mask"])[0]
        torch.testing.assert_close(cache.states(text), expected, atol=1e-5, rtol=1e-5)


# Kills at random moments


class Attempt:
    """One attempt at a command, in a child of the fork server, with a directory for its output."""

    def __init__(self, log: Path, function: str, *arguments):
        self.log = log
        self.process = multiprocessing.get_context("forkserver").Process(
            target=faults_worker.run, args=(function, list(arguments), str(log))
        )
        self.process.start()

    def kill_after(self, seconds: float) -> bool:
        """Whether it was killed; if not, it was done before."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet the head of its group, or just gone
                with suppress(ProcessLookupError):
                    self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def finish(self) -> float:
        start = time.perf_counter()
        self.process.join(300)
        assert self.process.exitcode == 0, self.log.read_text()[-5000:]
        return time.perf_counter() - start


@pytest.fixture(scope="module")
def fork_server():
    """Starts the fork server, which imports everything once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(faults_worker.PRELOADED)
        first = context.Process(target=int)
        first.start()
        first.join()
        yield


@dataclass
class Door:
    """A command that is killed: `start(output)` begins it, `results(output)` is what it made, compared with `==`, or with
    `same` where rounding may differ."""

    start: callable
    results: callable
    kills: int
    prepare: callable = lambda output: output.mkdir()
    check: callable = lambda output: None
    same: callable = lambda ours, theirs: ours == theirs
    # Temporary files and directories that may stay at the end.
    documented: str = r"(?!)"


FAULTS = Counter()
FINISHED, LOST = Counter(), Counter()


def assert_readable(directory: Path):
    """Everything below `directory` that has its final name can be read. Names with a dot in front are temporary."""
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_dir() or any(part.startswith(".") for part in parts):
            continue
        checkpoint = next((part for part in parts if part.startswith("checkpoint-")), None)
        if checkpoint and not CHECKPOINT <= names(directory / Path(*parts[: parts.index(checkpoint) + 1])):
            continue  # unfinished
        match path.suffix:
            case ".safetensors":
                load_file(path)
            case ".json":
                if checkpoint and path.name == "trainer_state.json":
                    with suppress(ValueError):  # written last, so this checkpoint is unfinished
                        json.loads(path.read_text())
                else:
                    json.loads(path.read_text())
            case ".parquet":
                pq.read_table(path)
            case ".onnx":
                onnxruntime.InferenceSession(path)
            case ".pt" | ".pth":
                torch.load(path, weights_only=False)
            case ".py" | ".md" | ".txt" | ".jsonl" | "":
                assert path.stat().st_size > 0
            case _:
                raise AssertionError(f"a file of a kind that this test does not know: {path}")


def inject_faults(name: str, door: Door, directory: Path, seed: int):
    """Kills `door.kills` attempts, and compares every result that was finished nevertheless with an undisturbed one."""
    generator = random.Random(seed)
    door.prepare(directory / "undisturbed")
    seconds = door.start(directory / "undisturbed", directory / "log").finish()
    assert_readable(directory / "undisturbed")
    expected = door.results(directory / "undisturbed")

    def assert_result(output: Path):
        FINISHED[name] += 1
        assert_readable(output)
        door.check(output)
        LOST[name] += not (kept := door.same(door.results(output), expected))
        assert kept, f"{output} is not as undisturbed"
        temporary = [str(path.relative_to(output)) for path in output.rglob(".*")]
        assert not [path for path in temporary if not re.fullmatch(door.documented, path)]

    for round in range(10 * door.kills):
        output = directory / f"round-{round}"
        door.prepare(output)
        start, is_first = time.perf_counter(), True
        while FAULTS[name] < door.kills:
            if not (attempt := door.start(output, directory / "log")).kill_after(generator.uniform(0, seconds)):
                attempt.finish()  # that is, it must have ended well
                if is_first:  # the machine is less busy than it was, and later kills would come too late as well
                    seconds = min(seconds, time.perf_counter() - start)
                break
            is_first = False
            FAULTS[name] += 1
            assert_readable(output)
            door.check(output)
        else:
            door.start(output, directory / "log").finish()
        assert_result(output)
        shutil.rmtree(output)
        if FAULTS[name] == door.kills:
            return
    raise AssertionError(f"only {FAULTS[name]} kills landed")


@pytest.mark.long
def test_caching(fork_server, tiny_llm, tmp_path):
    texts = sentences(1500)

    def results(output):
        cache = LLMStateCache(output, {"llm": "tiny"}, LAYERS)
        return [cache.states(text) for text in texts]

    def same(ours, theirs):
        """To rounding: what is computed in one batch depends on what is missing."""
        return all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(ours, theirs, strict=True))

    def start(output, log):
        return Attempt(log, "cache_states", tiny_llm, LAYERS, texts, str(output))

    inject_faults("caching", Door(start, results, kills=14, same=same), tmp_path, seed=1)


@pytest.fixture(scope="module")
def training(tiny_llm, tiny_encoder, tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("training")
    rows = [{"text": f"I wish {t}" if i % 2 else t, "label": i % 2} for i, t in enumerate(sentences(84))]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--llm", tiny_llm, "--encoder", tiny_encoder, "--llm_layers", "2", "5", "--max_seq_length", "64"),
        *("--train_file", str(directory / "train.jsonl"), "--validation_share", "0.2", "--num_train_epochs", "3"),
        *("--per_device_train_batch_size", "8", "--eval_strategy", "steps", "--save_strategy", "steps"),
        *("--eval_steps", "4", "--save_steps", "4", "--early_stopping_patience", "3"),
        # The states are those of the first run: bit-identical weights need bit-identical states.
        *("--llm_cache_dir", str(directory / "states"), "--use_cpu"),
    ]


@pytest.mark.long
def test_training(fork_server, training, tmp_path):
    def results(output):
        weights = load_file(output / "final/model.safetensors")
        return {
            "metrics": json.loads((output / "results.json").read_text())["metrics"],
            "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
            "files": sorted(str(path.relative_to(output)) for path in (output / "final").rglob("*")),
            "settings": json.loads((output / "settings.json").read_text()),
        }

    def start(output, log):
        return Attempt(log, "command", "train", *training, "--output_dir", str(output))

    inject_faults("training", Door(start, results, kills=14), tmp_path, seed=2)


@pytest.mark.long
def test_sweep(fork_server, tiny_llm, tiny_encoder, dataset_root, tmp_path):
    states = tmp_path / "states"

    def results(output):
        points = {}
        for path in output.rglob("*.json"):
            point = json.loads(path.read_text())
            points[str(path.relative_to(output))] = {k: v for k, v in point.items() if not k.endswith("seconds")}
        assert len(points) == 4
        return points

    def start(output, log):
        arguments = ["sweep", "AmazonCounterfactual", "--llm", tiny_llm, "--encoder", tiny_encoder]
        arguments += ["--dataset-root", dataset_root, "--train-split", "train", "--layers", "2", "5", "--seeds", "1"]
        arguments += ["--kinds", "llm", "hybrid", "--results", str(output), "--llm-cache-dir", str(states)]
        return Attempt(log, "command", "evaluate_mteb", *arguments)

    inject_faults("sweep", Door(start, results, kills=8), tmp_path, seed=3)


@pytest.mark.long
def test_export(fork_server, trained_run, tmp_path):
    """The directory has an older export, which the new one replaces."""
    tokenizer = AutoTokenizer.from_pretrained(trained_run, trust_remote_code=True)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="np"))

    def prepare(output):
        shutil.copytree(trained_run, output)
        with written_whole(output / "onnx") as work:
            (work / "README.md").write_text("An older export.\n")

    def results(output):
        return {
            path.name: onnxruntime.InferenceSession(path).run(None, batch)[1].tobytes()
            for path in sorted((output / "onnx").iterdir())
        }

    def check(output):
        if (output / "onnx").exists():
            assert names(output / "onnx") in ({"README.md"}, {"model.onnx", "model_qint8.onnx"})

    def start(output, log):
        return Attempt(log, "command", "export_onnx", str(output))

    inject_faults("export", Door(start, results, 6, prepare, check), tmp_path, seed=4)


@pytest.mark.long
def test_upload(fork_server, trained_run, tmp_path, monkeypatch):
    """Every request takes a while, so that kills fall into each."""
    monkeypatch.setattr(hub_module, "SLOW_SECONDS", 0.1)
    hubs = {}

    def prepare(output):
        shutil.copytree(trained_run, output)
        hubs[output] = stack.enter_context(Hub())
        for method in ("GET", "HEAD", "POST", "PUT"):
            hubs[output].fail(method, "", "slow", times=1_000_000)

    def results(output):
        return hubs[output].repositories[REPO].files

    def check(output):
        if repository := hubs[output].repositories.get(REPO):
            assert set(repository.files) == {".gitattributes"} or "model.safetensors" in repository.files
            for _, _, files in repository.commits[1:]:
                assert files == repository.files  # the upload, or once more the same

    def start(output, log):
        folders = ["--results", str(tmp_path / "none"), "--sweep", str(tmp_path / "none")]
        return Attempt(log, "upload", hubs[output].url, TOKEN, str(output), REPO, *folders)

    with ExitStack() as stack:
        inject_faults("upload", Door(start, results, 8, prepare, check), tmp_path, seed=5)


@pytest.mark.long
def test_corpus(fork_server, trained_run, tmp_path):
    texts = sentences(400)
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))

    def results(output):
        assert json.loads((output / "manifest.json").read_text())["complete"]
        tables = {path.name: pq.read_table(path) for path in sorted(output.glob("shard-*.parquet"))}
        assert len(tables) == 20
        return tables

    def start(output, log):
        arguments = ["--model", str(trained_run), "--id-column", "id", "--rows-per-shard", "20", "--workers", "1"]
        return Attempt(log, "command", "encode_corpus", str(source), str(output), *arguments)

    # The list of the shards, which the next start reads.
    door = Door(start, results, kills=8, documented=r"\.plan\.parquet")
    inject_faults("corpus", door, tmp_path, seed=6)


@pytest.mark.long
def test_fifty_faults_and_no_result_lost(capsys):
    doors = {"caching", "training", "sweep", "export", "upload", "corpus"}
    if set(FAULTS) != doors:
        pytest.skip("counts the faults of the tests above, of which not all ran")
    with capsys.disabled():
        print(f"\nfaults injected: {FAULTS.total()} {dict(FAULTS)}; results: {FINISHED.total()}; lost: {LOST.total()}")
    assert FAULTS.total() >= 50 and set(FINISHED) == doors and not LOST.total()
