"""Two processes on CPUs, started by accelerate, train as one does with the same global batch."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from conftest import ROOT, encoder_configs, make_encoder_tokenizer, save_backbone
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file

import trainer
from llm_cache import fair_shares
from train import parse_arguments, train
from trainer import EpochBatchSampler

ACCELERATE = ROOT / "configs/accelerate"
WORDS = "the lid bus river pan owner book door café street lamp coat".split()
# Distance of the trained weights of two runs, as a share of the way that training took them: rounding in other batches.
NOISE = 1e-3


def write_texts(path: Path, count: int, seed: int) -> str:
    """`count` different sentences; the label is whether they wish."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        body = " ".join(generator.choices(WORDS, k=generator.randint(2, 12)))
        rows.append({"text": f"I wish {body} {i} had come." if i % 2 else f"{body} {i} is here.", "label": i % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def options(tiny_llm, tmp_path_factory) -> list[str]:
    """69 texts, so that of the nine batches of eight the last has five; nothing is dropped at random."""
    directory = tmp_path_factory.mktemp("distributed")
    config = encoder_configs()["roberta"]
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    encoder = save_backbone(directory / "encoder", config, make_encoder_tokenizer(), seed=1)
    return [
        *("--llm", tiny_llm, "--encoder", encoder, "--llm_layers", "2", "5", "--max_seq_length", "64"),
        *("--train_file", write_texts(directory / "train.jsonl", 69, 0)),
        *("--validation_file", write_texts(directory / "validation.jsonl", 16, 1)),
        *("--num_train_epochs", "2", "--logging_steps", "1", "--use_cpu", "--layer_dropout", "0"),
    ]


def alone(*options) -> Path:
    """A training by this process; its output directory."""
    _, _, args = arguments = parse_arguments([str(option) for option in options])
    train(*arguments)
    return Path(args.output_dir)


def command(*options, script=ROOT / "train.py") -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE / "cpu.yaml"]
    return [str(part) for part in [*launch, script, *options]]


def in_two_processes(*options, script=ROOT / "train.py") -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*options, script=script), env=environment, capture_output=True, text=True, timeout=300
    )


def metrics(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["metrics"]


def losses(output: Path) -> list[float]:
    """The logged losses, from the newest checkpoint."""
    newest = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return [entry["loss"] for entry in json.loads(newest.read_text())["log_history"] if "loss" in entry]


def weights(output: Path) -> torch.Tensor:
    """The trained weights, one after the other, without the biases of attention's keys: their gradient is zero but for
    rounding, of which Adam makes whole steps."""
    state = load_file(output / "final/model.safetensors")
    trained = [name for name in sorted(state) if ".llm." not in name and not name.endswith("key.bias")]
    return torch.cat([state[name].flatten().double() for name in trained])


def assert_same_training(one: Path, two: Path, start: Path):
    """`start` is the output of the same training with steps of no length."""
    assert metrics(two) == metrics(one)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    first, second, untrained = weights(one), weights(two), weights(start)
    way = (first - untrained).norm()
    assert way > 0.01
    distance = ((second - first).norm() / way).item()
    assert distance < NOISE


def untrained(options, directory: Path) -> Path:
    """The training whose steps have no length."""
    rates = [f"--{name}learning_rate=0" for name in ("", "projector_", "head_")]
    rates += ["--weight_decay", "0", "--max_steps", "1"]
    return alone(*options, *rates, "--llm_cache_dir", directory / "states", "--output_dir", directory / "untrained")


@pytest.fixture(scope="module")
def one(options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one")
    batch = ["--per_device_train_batch_size", "8"]
    return alone(*options, *batch, "--llm_cache_dir", output / "states", "--output_dir", output / "run")


def stored(states: Path) -> dict[str, list[Counter]]:
    """For each layer directory of a cache: the number of times that each of its files has each text."""
    layers = {}
    for path in sorted(states.glob("*/layer-*/*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            keys = Counter(key.numpy().tobytes() for key in shard.get_tensor("keys"))
        layers.setdefault(path.parent.name, []).append(keys)
    return layers


def test_two_processes_train_as_one_with_the_same_global_batch(options, one, tmp_path):
    batch = ["--per_device_train_batch_size", "4", "--llm_cache_dir", tmp_path / "states"]
    done = in_two_processes(*options, *batch, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"validation": {') == 1, done.stdout  # one process speaks
    assert_same_training(one, tmp_path / "run", untrained(options, one.parent))
    # Both processes computed states, and none computed what the other did.
    layers = stored(tmp_path / "states")
    assert set(layers) == {"layer-02", "layer-05"}
    for shards in layers.values():
        assert len(shards) == 2 and all(shards)
        assert set(sum(shards, Counter()).values()) == {1} and len(sum(shards, Counter())) == 69 + 16


@pytest.mark.parametrize("count", [64, 69, 65, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_batches_of_one(count, processes, monkeypatch):
    generator = random.Random(0)
    dataset = Dataset.from_dict({"text": ["a" * generator.randint(1, 50) for _ in range(count)]})

    def batches(process, processes, epoch=3):
        monkeypatch.setattr(trainer, "get_rank", lambda: process)
        monkeypatch.setattr(trainer, "get_world_size", lambda: processes)
        sampler = EpochBatchSampler(dataset, batch_size=8 // processes, drop_last=False, seed=1)
        sampler.set_epoch(epoch)
        listed = list(sampler)
        assert len(listed) == len(sampler)
        return listed

    whole = batches(0, 1)
    assert sorted(i for batch in whole for i in batch) == list(range(count))
    for batch, *parts in zip(whole, *(batches(process, processes) for process in range(processes)), strict=True):
        if len(batch) < processes:
            assert all(part == batch for part in parts)
        else:
            assert sorted(i for part in parts for i in part) == sorted(batch)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shares_are_fair():
    generator = random.Random(0)
    costs = sorted((generator.randint(1, 1024) for _ in range(100)), reverse=True)
    for workers in (1, 2, 7):
        shares = fair_shares(costs, workers)
        assert sorted(i for share in shares for i in share) == list(range(100))
        loads = [sum(costs[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs)
    assert fair_shares([5], 2) == [[0], []]


@pytest.mark.parametrize("name,kind", [("cpu", "MULTI_GPU"), ("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_the_configurations(name, kind):
    path = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType(kind)
    launch, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    )
    assert (launch.multi_gpu, launch.use_fsdp) == (kind == "MULTI_GPU", kind == "FSDP")
    assert launch.num_processes == (2 if name == "cpu" else 8)
    assert launch.mixed_precision == ("no" if name == "cpu" else "bf16")
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= options
    assert name in {path.stem for path in ACCELERATE.glob("*.yaml")} == {"cpu", "ddp", "fsdp"}


def test_processes_that_would_not_work_together_are_refused(options, tmp_path, monkeypatch):
    arguments = parse_arguments([*options, "--output_dir", str(tmp_path / "run")])
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="2 processes were started.*--use_cpu"):
        patch.setenv("WORLD_SIZE", "2")
        train(*arguments)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="FSDP.*ddp.yaml"):
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        train(*arguments)
    assert not (tmp_path / "run").exists()


# One process starts from other weights and statistics: all must train the first one's.
ASTRAY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train
if os.environ["RANK"] == "1":
    build_hybrid = train.build_hybrid
    def astray(*args):
        module, fit = build_hybrid(*args)
        with torch.no_grad():
            for tensor in [*module.model.projector.parameters(), *module.model.standardizer.buffers()]:
                tensor += 1
        return module, fit
    train.build_hybrid = astray
train.main()
"""


@pytest.mark.long
def test_all_train_the_model_of_the_first_and_a_last_batch_of_one_text(options, tmp_path):
    """Also: gradients accumulated over two batches, no contrastive loss, and a cache that lacks a part."""
    script = tmp_path / "astray.py"
    script.write_text(ASTRAY)
    states = ["--llm_cache_dir", tmp_path / "states"]
    train_file = write_texts(tmp_path / "train.jsonl", 65, 0)
    options = [*options, "--train_file", train_file, "--contrastive_weight", "0", "--gradient_accumulation_steps", "2"]
    batch = ["--per_device_train_batch_size", "8"]
    one = alone(*options, *batch, *states, "--output_dir", tmp_path / "one")
    start = untrained(options, tmp_path)
    before = stored(tmp_path / "states")
    shards = sorted(tmp_path.glob("states/*/layer-05/*.safetensors"))
    shards[0].unlink()
    batch = ["--per_device_train_batch_size", "4"]
    for output in ("two", "two-again"):  # first with a cache that lacks a layer, then with all of it
        done = in_two_processes(*options, *batch, *states, "--output_dir", tmp_path / output, script=script)
        assert done.returncode == 0, done.stderr
        assert_same_training(one, tmp_path / output, start)
        after = stored(tmp_path / "states")
        assert {layer: sum(files, Counter()) for layer, files in after.items()} == {
            layer: sum(files, Counter()) for layer, files in before.items()
        }


@pytest.mark.long
def test_two_killed_processes_go_on_in_the_middle_of_an_epoch(options, tmp_path):
    steps = [f"--{name}_strategy=steps" for name in ("eval", "save")] + ["--eval_steps", "4", "--save_steps", "4"]
    batch = ["--per_device_train_batch_size", "4", "--llm_cache_dir", tmp_path / "states"]
    options = [*options, *steps, *batch, "--early_stopping_patience", "100"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    done = in_two_processes(*options, "--output_dir", undisturbed)
    assert done.returncode == 0, done.stderr
    process = psutil.Popen(
        command(*options, "--output_dir", output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not list(output.glob("checkpoint-4/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.01)
    workers = process.children(recursive=True)
    for killed in [process, *workers]:
        killed.kill()
    psutil.wait_procs([process, *workers])
    process.wait()
    assert not (output / "results.json").exists()
    resumed = in_two_processes(*options, "--output_dir", output)
    assert resumed.returncode == 0 and resumed.stderr.count("Going on from") == 1, resumed.stderr
    assert metrics(output) == metrics(undisturbed)
    ours, theirs = (load_file(path / "final/model.safetensors") for path in (output, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would train on the GPUs")
def test_processes_without_gpus_are_told_to_use_the_cpu(options, tmp_path):
    options = [option for option in options if option != "--use_cpu"]
    done = in_two_processes(*options, "--output_dir", tmp_path / "run")
    assert done.returncode != 0 and "add --use_cpu" in done.stderr
    assert not (tmp_path / "run").exists()
