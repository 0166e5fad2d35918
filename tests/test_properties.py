"""From text to embedding, for any text: finite, and the same in every batch, order and padding."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import encoder_configs, llm_configs, make_llm_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer

import encoding
from configuration_hybrid import HybridConfig
from modeling_hybrid import HybridModel

PROFILE = settings(deadline=None, max_examples=40, derandomize=True, database=None)
TOLERANCE = 1e-5

# Any characters, those that are easily got wrong more often; no lone surrogates, which no tokenizer takes.
CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\0\u200b\u200d\ufeff\u202e\u0301aé👍🏽ﷺ")
TEXT = st.text(CHARACTERS, max_size=80) | st.sampled_from(["", " ", "the lid " * 40])
TEXTS = st.lists(TEXT, min_size=1, max_size=5)


@cache
def with_bos(directory: str):
    return AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory, trust_remote_code=True)


@cache
def without_bos():
    """Qwen's tokenizer puts nothing in front, so that an empty text has no token at all."""
    tokenizer = make_llm_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    config = HybridConfig(llm_configs()["qwen3"], encoder_configs()["modernbert"], llm_layers=[1, 3])
    return tokenizer, HybridModel(config).eval()


@pytest.fixture(params=["with BOS", "without BOS"])
def pair(request, trained_run):
    return with_bos(str(trained_run)) if request.param == "with BOS" else without_bos()


def embed(tokenizer, model, texts, **padding):
    """Embeddings (texts, dim) of one batch."""
    batch = tokenizer(texts, truncation=True, return_tensors="pt", **{"padding": True, **padding})
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output


def test_alone_or_in_any_batch_order_and_padding(pair):
    tokenizer, model = pair

    @PROFILE
    @given(texts=TEXTS, side=st.sampled_from(["left", "right"]), length=st.sampled_from([None, 64]), data=st.data())
    @example(texts=[""], side="left", length=None, data=None)
    @example(texts=["", "the lid"], side="left", length=None, data=None)
    @example(texts=["", "the lid"], side="right", length=64, data=None)
    def holds(texts, side, length, data):
        alone = torch.cat([embed(tokenizer, model, [text]) for text in texts])
        assert alone.shape == (len(texts), model.config.hidden_size) and torch.isfinite(alone).all()
        order = data.draw(st.permutations(range(len(texts)))) if data else range(len(texts))
        padding = {"padding": "max_length", "max_length": length} if length else {}
        together = embed(tokenizer, model, [texts[i] for i in order], padding_side=side, **padding)
        torch.testing.assert_close(together, alone[list(order)], atol=TOLERANCE, rtol=TOLERANCE)

    holds()


@pytest.fixture(scope="module")
def model(trained_run):
    return SentenceTransformer(str(trained_run), trust_remote_code=True, device="cpu")


def test_encode_gives_what_each_text_has_alone(model, trained_run):
    @PROFILE
    @given(texts=TEXTS, tokens_per_batch=st.integers(1, 200))
    def holds(texts, tokens_per_batch):
        alone = torch.cat([embed(*with_bos(str(trained_run)), [text]) for text in texts]).numpy()
        for embeddings in (model.encode(texts), encoding.encode(model, texts, tokens_per_batch)):
            np.testing.assert_allclose(embeddings, alone, atol=TOLERANCE, rtol=TOLERANCE)

    holds()


def test_lone_surrogates_are_refused(model):
    @PROFILE
    @given(st.text(max_size=20), st.characters(categories=["Cs"]), st.text(max_size=20))
    def holds(before, surrogate, after):
        with pytest.raises(ValueError, match="Text 1 has a lone surrogate"):
            encoding.encode(model, ["fine", before + surrogate + after])
        with pytest.raises(TypeError):
            model.encode([before + surrogate + after])

    holds()
