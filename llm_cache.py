"""A disk cache of the frozen LLM's hidden states: computed once, then read by every epoch, seed and layer choice.

Layout, all tensors in safetensors files, memory-mapped when read:

    <cache_dir>/<hash of the key>/key.json             what the states depend on: LLM, revision, precision, length
    <cache_dir>/<hash of the key>/layer-07/<id>.safetensors
        keys    (texts, 16) uint8                      a hash of each text
        ends    (texts,) int64                         where each text's tokens end
        states  (tokens, LLM hidden size)              the texts' states, one after the other, without padding

A shard is written under a temporary name and renamed, so a killed run loses at most the shard it was at, and several
processes may fill one cache at once: at worst a text is stored twice. Those of one distributed run share the work.
"""

import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers.util import get_rank, get_world_size
from torch import distributed
from tqdm.auto import tqdm

from encoding import suitable_tokens_per_batch, token_batches

TOKENS_PER_SHARD = 16384


def text_key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class LLMStateCache:
    """The states of one LLM at some of its layers.

    Args:
        cache_dir: the directory of all caches.
        key: JSON values that the states depend on, apart from text and layer. Another key is another cache.
        llm_layers: the layers to store and read, in the order in which [`states`] stacks them.
        dtype: precision on disk. bfloat16 halves the space and rounds.
    """

    def __init__(self, cache_dir, key: dict, llm_layers: list[int], dtype: torch.dtype = torch.float32):
        self.cache_dir, self.key = cache_dir, key
        key = {**key, "dtype": str(dtype)}
        text = json.dumps(key, indent=2, sort_keys=True)
        self.directory = Path(cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.llm_layers = llm_layers
        self.dtype = dtype
        for directory in (self.directory, *map(self._layer_directory, llm_layers)):
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(directory)
        key_file = self.directory / "key.json"
        if not key_file.exists():
            write_whole(key_file, lambda path: path.write_text(text))
        elif key_file.read_text() != text:
            raise ValueError(
                f"{self.directory} holds the states of another model: {key_file} names it. Delete the directory."
            )
        self._read_indices()

    def __contains__(self, text: str) -> bool:
        key = text_key(text)
        return all(key in index for index in self._index.values())

    def of_layers(self, llm_layers: list[int]) -> "LLMStateCache":
        """The same cache, reading other layers."""
        return LLMStateCache(self.cache_dir, self.key, llm_layers, self.dtype)

    def fill(self, model, tokenizer, texts, max_length: int):
        """Computes and stores the states of those `texts` that are not there yet, with a progress bar.

        `model` is a [`HybridModel`] with (at least) this cache's layers; `tokenizer` is its LLM's. In a distributed run
        all processes call this with the same texts: each computes its share, and afterwards each knows all states.
        """
        texts = list(dict.fromkeys(texts))
        absent = torch.tensor([text not in self for text in texts], dtype=torch.uint8, device=model.device)
        if get_world_size() > 1:
            # The first process says what is missing: the others may have looked while another run was writing.
            distributed.broadcast(absent, src=0)
        missing = [text for text, is_absent in zip(texts, absent.tolist()) if is_absent]
        if missing:
            self._compute_share(model, tokenizer, missing, max_length)
        if get_world_size() > 1:
            distributed.barrier()
            self._read_indices()

    def _compute_share(self, model, tokenizer, texts: list[str], max_length: int):
        """Computes and stores the states of this process's share of `texts`."""
        rows = [model.config.llm_layers.index(layer) for layer in self.llm_layers]
        lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]]
        # Whole batches are dealt out, so that the states are, to the last bit, those that one process computes.
        batches = list(token_batches(lengths, suitable_tokens_per_batch(model.device)))
        share = fair_shares([len(batch) * lengths[batch[0]] for batch in batches], get_world_size())[get_rank()]
        batches = [batches[i] for i in share]
        total = sum(lengths[i] for batch in batches for i in batch)
        shard, shard_tokens = [], 0
        with tqdm(total=total, desc="LLM states", unit=" tokens", unit_scale=True, disable=get_rank() > 0) as progress:
            for batch in batches:
                batch_texts = [texts[i] for i in batch]
                encoded = tokenizer(
                    batch_texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
                ).to(model.device)
                states = model.hidden_states(encoded["input_ids"], encoded["attention_mask"])[:, rows]
                if not torch.isfinite(states).all():
                    raise ValueError("The LLM's states contain NaN or infinity: check its weights and its precision.")
                states = states.to("cpu", self.dtype)
                for i, text in enumerate(batch_texts):
                    shard.append((text_key(text), states[i][:, encoded["attention_mask"][i].bool().cpu()]))
                    shard_tokens += shard[-1][1].shape[1]
                progress.update(sum(lengths[i] for i in batch))
                if shard_tokens >= TOKENS_PER_SHARD:
                    self._write_shard(shard)
                    shard, shard_tokens = [], 0
            if shard:
                self._write_shard(shard)

    def states(self, text: str) -> torch.Tensor:
        """The stored states of `text`: (layers, tokens, hidden size), in the cache's precision."""
        key = text_key(text)
        rows = []
        for layer in self.llm_layers:
            path, start, end = self._index[layer][key]
            if path not in self._shards:
                self._shards[path] = safe_open(path, framework="pt")
            rows.append(self._shards[path].get_slice("states")[start:end])
        return torch.stack(rows)

    def batch(self, texts, attention_mask: torch.Tensor) -> torch.Tensor:
        """The states of `texts`, padded as `attention_mask` (batch, tokens) is: (batch, layers, tokens, hidden size)."""
        states = [self.states(text) for text in texts]
        layers, _, hidden_size = states[0].shape
        padded = torch.zeros(len(texts), layers, attention_mask.shape[1], hidden_size, dtype=self.dtype)
        for i, text_states in enumerate(states):
            padded[i][:, attention_mask[i].bool()] = text_states
        return padded

    def _layer_directory(self, layer: int) -> Path:
        return self.directory / f"layer-{layer:02d}"

    def _read_indices(self):
        self._index = {layer: {} for layer in self.llm_layers}  # text hash -> (shard, first token, end)
        self._shards = {}
        for layer in self.llm_layers:
            for path in sorted(self._layer_directory(layer).glob("*.safetensors")):
                self._read_index(layer, path)

    def _read_index(self, layer: int, path: Path):
        try:
            with safe_open(path, framework="pt") as shard:
                keys, ends = shard.get_tensor("keys").numpy(), shard.get_tensor("ends").tolist()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} in the cache of LLM states is damaged ({error}). Delete it and run again."
            ) from error
        start = 0
        for key, end in zip(keys, ends):
            self._index[layer][key.tobytes()] = (path, start, end)
            start = end

    def _write_shard(self, shard):
        name = f"{uuid.uuid4().hex}.safetensors"
        for row, layer in enumerate(self.llm_layers):
            new = [(key, states[row]) for key, states in shard if key not in self._index[layer]]
            if not new:
                continue
            tensors = {
                "keys": torch.frombuffer(bytearray(b"".join(key for key, _ in new)), dtype=torch.uint8).view(-1, 16),
                "ends": torch.tensor([len(states) for _, states in new]).cumsum(0),
                "states": torch.cat([states for _, states in new]),
            }
            path = self._layer_directory(layer) / name
            write_whole(path, partial(save_file, tensors))
            self._read_index(layer, path)


def fair_shares(costs: list[int], workers: int) -> list[list[int]]:
    """Deals tasks with `costs` out, each to the worker with the least so far: for each worker its indices in `costs`."""
    shares, loads = [[] for _ in range(workers)], [0] * workers
    for i, cost in enumerate(costs):
        worker = loads.index(min(loads))
        shares[worker].append(i)
        loads[worker] += cost
    return shares


def write_whole(path: Path, write):
    """`write` fills a temporary file, which then takes its name, so that nothing half-written ever bears it."""
    temporary = temporary_path(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk, e.g., and not every library names the file
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Where this process writes what will become `path`; see also [`remove_leftovers`]."""
    if path.parent not in _LOOKED_THROUGH:
        _LOOKED_THROUGH.add(path.parent)
        remove_leftovers(path.parent)
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


# Before this process's first file alone: a directory of a million shards takes a while to list.
_LOOKED_THROUGH = set()


def remove_leftovers(directory: Path):
    """Removes the temporary files and directories of this machine's killed processes."""
    for path in Path(directory).glob(f".*.{glob.escape(socket.gethostname())}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
