"""What the benchmarks share: what they ran on, where their figures go, and the model that others would use."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from backbones import resolve_backbone
from repository import write_json

# The precision of the hybrid on a CPU; the one on disk, bfloat16, takes minutes there without the units.
FLOAT32 = {"dtype": torch.float32}


def stock_model(backbone: str) -> SentenceTransformer:
    """The whole `backbone` with mean pooling, as sentence-transformers runs it."""
    transformer = Transformer(resolve_backbone(backbone), model_kwargs=FLOAT32)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def write_result(path: str, result: dict):
    """Writes a benchmark's figures with the machine that they were measured on."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(path), {**result, "machine": machine()})


def machine() -> dict:
    """Processor, threads, and versions of the libraries that the figures depend on."""
    names = [
        line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")
    ]
    libraries = ("torch", "transformers", "sentence-transformers", "mteb")
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {library: version(library) for library in libraries},
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
