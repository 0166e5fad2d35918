"""What a benchmark ran on."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch


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
