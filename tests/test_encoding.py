import random

import numpy as np
import pytest
from conftest import TEXTS
from sentence_transformers import SentenceTransformer

from encoding import MAX_PADDING, encode, token_batches


@pytest.fixture(scope="module")
def model(trained_run):
    return SentenceTransformer(str(trained_run), trust_remote_code=True, device="cpu")


def computed_texts(model, monkeypatch) -> list[str]:
    """Collects what is tokenized for the model's forward passes."""
    computed = []
    preprocess = type(model).preprocess
    monkeypatch.setattr(
        type(model),
        "preprocess",
        lambda self, inputs, *a, **k: computed.extend(inputs) or preprocess(self, inputs, *a, **k),
    )
    return computed


def test_the_embeddings_are_those_of_one_text_at_a_time(model, monkeypatch):
    one_at_a_time = np.stack([model.encode(text) for text in TEXTS])
    texts = [*TEXTS, *reversed(TEXTS)]
    computed = computed_texts(model, monkeypatch)
    for tokens_per_batch in (None, 20):
        computed.clear()
        embeddings = encode(model, texts, tokens_per_batch)
        np.testing.assert_allclose(embeddings, np.concatenate([one_at_a_time, one_at_a_time[::-1]]), atol=1e-5)
        assert sorted(computed) == sorted(TEXTS), "each text once"


def test_arguments_of_encode_are_handed_on(model):
    embeddings = encode(model, TEXTS, normalize_embeddings=True, truncate_dim=8)
    assert embeddings.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_batches_keep_to_the_budget_and_pad_little():
    generator = random.Random(0)
    lengths = [max(1, round(generator.lognormvariate(3, 1))) for _ in range(500)] + [3000]
    batches = list(token_batches(lengths, 512))
    assert sorted(i for batch in batches for i in batch) == list(range(501))
    assert batches[0] == [500], "longer than the budget, so alone"
    for batch in batches[1:]:
        computed = len(batch) * max(lengths[i] for i in batch)
        assert computed <= 512
        assert computed - sum(lengths[i] for i in batch) <= MAX_PADDING * computed


def test_what_is_not_a_text_is_refused(model):
    assert encode(model, []).shape == (0, 24)
    with pytest.raises(TypeError, match="Text 1 is not a string but NoneType"):
        encode(model, ["", None])
    assert np.isfinite(encode(model, ["", " "])).all()
