import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXTS

from llm_cache import LLMStateCache
from modeling_hybrid import HybridModel

LAYERS = [2, 5]


@pytest.fixture(scope="module")
def model(tiny_llm):
    return HybridModel.from_backbones(tiny_llm, None, llm_layers=LAYERS)


def files(cache):
    return sorted(path.relative_to(cache.directory) for path in cache.directory.rglob("*.safetensors"))


def test_states_come_back_as_the_llm_gave_them(model, llm_tokenizer, tmp_path):
    cache = LLMStateCache(tmp_path, {"llm": "tiny"}, LAYERS)
    cache.fill(model, llm_tokenizer, TEXTS, max_length=16)
    read_anew = LLMStateCache(tmp_path, {"llm": "tiny"}, LAYERS)
    for states in (cache.states, read_anew.states):
        for text in TEXTS:
            encoded = llm_tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            expected = model.hidden_states(encoded["input_ids"], encoded["attention_mask"])[0]
            torch.testing.assert_close(states(text), expected, atol=1e-5, rtol=1e-5)


def test_batch_is_padded_like_the_mask(model, llm_tokenizer, tmp_path):
    cache = LLMStateCache(tmp_path, {}, LAYERS)
    cache.fill(model, llm_tokenizer, TEXTS, max_length=64)
    for side in ("left", "right"):
        encoded = llm_tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        expected = model.hidden_states(encoded["input_ids"], encoded["attention_mask"])
        torch.testing.assert_close(cache.batch(TEXTS, encoded["attention_mask"]), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_computed_twice(model, llm_tokenizer, tmp_path, monkeypatch):
    computed = []
    original = HybridModel.hidden_states
    monkeypatch.setattr(
        HybridModel, "hidden_states", lambda self, ids, mask: computed.append(len(ids)) or original(self, ids, mask)
    )
    LLMStateCache(tmp_path, {}, [2]).fill(model, llm_tokenizer, TEXTS[:3] + TEXTS[:3], max_length=64)
    assert sum(computed) == 3
    cache = LLMStateCache(tmp_path, {}, [2])
    cache.fill(model, llm_tokenizer, TEXTS[:4], max_length=64)
    assert sum(computed) == 4
    before = files(cache)
    both = LLMStateCache(tmp_path, {}, LAYERS)
    both.fill(model, llm_tokenizer, TEXTS[:4], max_length=64)
    # Layer 2 was there already: only layer 5 is added.
    assert {path.parent.name for path in set(files(both)) - set(before)} == {"layer-05"}
    both.fill(model, llm_tokenizer, TEXTS[:4], max_length=64)
    assert sum(computed) == 8


def test_another_llm_or_length_is_another_cache(tmp_path):
    caches = [
        LLMStateCache(tmp_path, {"llm": llm, "max_seq_length": n}, LAYERS) for llm, n in (("a", 8), ("b", 8), ("a", 9))
    ]
    caches.append(LLMStateCache(tmp_path, {"llm": "a", "max_seq_length": 8}, LAYERS, dtype=torch.bfloat16))
    assert len({cache.directory for cache in caches}) == 4


def test_bfloat16_halves_the_space(model, llm_tokenizer, tmp_path):
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        cache = LLMStateCache(tmp_path, {}, LAYERS, dtype=dtype)
        cache.fill(model, llm_tokenizer, TEXTS, max_length=64)
        assert cache.states(TEXTS[0]).dtype == dtype
        sizes[dtype] = sum((cache.directory / path).stat().st_size for path in files(cache))
    assert sizes[torch.bfloat16] < 0.6 * sizes[torch.float32]


def test_a_killed_fill_leaves_whole_shards_and_goes_on(model, tiny_llm, llm_tokenizer, tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import llm_cache
from modeling_hybrid import HybridModel
from transformers import AutoTokenizer
llm_cache.TOKENS_PER_SHARD, llm_cache.suitable_tokens_per_batch = 20, lambda device: 20
model = HybridModel.from_backbones({tiny_llm!r}, None, llm_layers={LAYERS})
write, left = llm_cache.save_file, [3]
def dies(tensors, path):
    if not left[0]:
        open(path, "wb").write(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(tensors, path)
llm_cache.save_file = dies
cache = llm_cache.LLMStateCache({str(tmp_path)!r}, {{}}, {LAYERS})
cache.fill(model, AutoTokenizer.from_pretrained({tiny_llm!r}), {TEXTS!r}, max_length=64)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    cache = LLMStateCache(tmp_path, {}, LAYERS)
    assert 0 < sum(text in cache for text in TEXTS) < len(TEXTS)
    cache.fill(model, llm_tokenizer, TEXTS, max_length=64)
    undisturbed = LLMStateCache(tmp_path / "undisturbed", {}, LAYERS)
    undisturbed.fill(model, llm_tokenizer, TEXTS, max_length=64)
    for text in TEXTS:
        torch.testing.assert_close(cache.states(text), undisturbed.states(text), atol=1e-5, rtol=1e-5)


def test_damaged_shard_says_what_to_do(model, llm_tokenizer, tmp_path):
    cache = LLMStateCache(tmp_path, {}, LAYERS)
    cache.fill(model, llm_tokenizer, TEXTS, max_length=64)
    shard = cache.directory / files(cache)[0]
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged.*Delete it"):
        LLMStateCache(tmp_path, {}, LAYERS)


def test_nan_never_enters_the_cache(tiny_llm, llm_tokenizer, tmp_path):
    broken = HybridModel.from_backbones(tiny_llm, None, llm_layers=LAYERS)
    with torch.no_grad():
        broken.llm.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    cache = LLMStateCache(tmp_path, {}, LAYERS)
    with pytest.raises(ValueError, match="NaN"):
        cache.fill(broken, llm_tokenizer, TEXTS, max_length=64)
    assert not files(cache)
