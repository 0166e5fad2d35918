import numpy as np
import pytest
import torch
from conftest import TEXTS, make_encoder_tokenizer
from sklearn.linear_model import Ridge
from transformers import AutoModel, AutoTokenizer

import projector_fit
from llm_cache import LLMStateCache
from modeling_hybrid import HybridModel

LAYERS = [2, 5]


@pytest.fixture(scope="module")
def fitted(tiny_llm, tiny_encoder, llm_tokenizer, tmp_path_factory):
    model = HybridModel.from_backbones(tiny_llm, tiny_encoder, llm_layers=LAYERS)
    cache = LLMStateCache(tmp_path_factory.mktemp("cache"), {}, LAYERS)
    cache.fill(model, llm_tokenizer, TEXTS, max_length=64)
    projector_fit.fit_standardizer(model, cache, llm_tokenizer, TEXTS)
    report = projector_fit.fit_projector(model, cache, llm_tokenizer, tiny_encoder, TEXTS, max_length=64)
    return model, cache, report


def test_statistics_are_those_of_all_tokens_but_bos(fitted):
    model, cache, _ = fitted
    tokens = torch.cat([cache.states(text)[:, 1:] for text in TEXTS], dim=1).double()
    torch.testing.assert_close(model.standardizer.mean, tokens.mean(1).float())
    torch.testing.assert_close(model.standardizer.deviation, tokens.std(1, unbiased=False).float())
    assert model.standardizer.clip == 5


def test_statistics_of_dimensions_far_from_zero(fitted, llm_tokenizer):
    """A massive dimension: E[x^2] - E[x]^2 of the raw values would lose its deviation to rounding."""
    model, _, _ = fitted
    model = HybridModel(model.config)
    states = {text: torch.randn(2, 6, 32, dtype=torch.float64) * 1e-3 + 1e6 for text in TEXTS}

    class Cache:
        def states(self, text):
            return states[text]

    projector_fit.fit_standardizer(model, Cache(), llm_tokenizer, TEXTS)
    expected = torch.cat([states[text][:, 1:] for text in TEXTS], dim=1).std(1, unbiased=False)
    torch.testing.assert_close(model.standardizer.deviation, expected.float(), rtol=1e-4, atol=0)


def test_projector_is_the_ridge_regression(fitted, llm_tokenizer, tiny_encoder):
    model, cache, report = fitted
    embeddings = AutoModel.from_pretrained(tiny_encoder).get_input_embeddings().weight.detach()
    encoder_tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    inputs, targets = [], []
    for text in TEXTS:
        rows, target = projector_fit.aligned_targets(text, llm_tokenizer, encoder_tokenizer, embeddings, 64)
        inputs.append(model.merge_layers(cache.states(text)[None])[0, rows])
        targets.append(target)
    inputs, targets = torch.cat(inputs).double().numpy(), torch.cat(targets).double().numpy()
    assert report["tokens"] == len(inputs)
    assert report["ridge"] in projector_fit.RIDGES
    penalty = report["ridge"] * inputs.var(0).mean() * len(inputs)
    reference = Ridge(alpha=penalty).fit(inputs, targets)
    np.testing.assert_allclose(model.projector[-1].weight.detach().numpy(), reference.coef_, atol=1e-5)
    np.testing.assert_allclose(model.projector[-1].bias.detach().numpy(), reference.intercept_, atol=1e-5)


def test_layers_side_by_side_are_fitted_each_alone(fitted, tiny_llm, tiny_encoder, llm_tokenizer):
    """What their projector makes of a token is the mean of what the projectors of the single layers make of it."""
    _, cache, _ = fitted
    projectors, reports = {}, {}
    for layers in ([2], [5], LAYERS):
        model = HybridModel.from_backbones(
            tiny_llm, tiny_encoder, llm_layers=layers, layer_pooling="concat", layer_dropout=0.5 * (len(layers) > 1)
        ).train()
        of_layers = cache.of_layers(layers)
        projector_fit.fit_standardizer(model, of_layers, llm_tokenizer, TEXTS)
        reports[len(layers), layers[0]] = projector_fit.fit_projector(
            model, of_layers, llm_tokenizer, tiny_encoder, TEXTS, max_length=64
        )
        projectors[tuple(layers)] = model.projector[-1]
        assert model.training
    both, one, other = projectors[2, 5], projectors[2,], projectors[5,]
    torch.testing.assert_close(both.weight, torch.cat([one.weight, other.weight], dim=1))
    torch.testing.assert_close(both.bias, (one.bias + other.bias) / 2)
    states = cache.states(TEXTS[0])
    each = [projectors[layer,](model.eval().standardizer(states[None])[0, row]) for row, layer in enumerate(LAYERS)]
    torch.testing.assert_close(both(model.merge_layers(states[None]))[0], sum(each) / 2, atol=1e-5, rtol=1e-4)
    assert reports[2, 2]["r2"] == [reports[1, 2]["r2"], reports[1, 5]["r2"]]


def test_r2_is_that_of_held_out_tokens():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def sample(n):
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        return x, x @ weight + torch.randn(n, 3, generator=generator, dtype=torch.float64) + 7

    fitted, held_out = projector_fit._Moments(), projector_fit._Moments()
    fitted.add(*sample(400)), fitted.flush()
    x, y = sample(100)
    held_out.add(x, y), held_out.flush()
    w, b = fitted.solve(1e-3)
    residual, total = ((y - x @ w - b) ** 2).sum(), ((y - y.mean(0)) ** 2).sum()
    assert held_out.r2(w, b) == pytest.approx(1 - (residual / total).item(), abs=1e-9)


def test_alignment_by_characters(llm_tokenizer):
    """Every LLM token's target is the mean over the encoder tokens that share a character with it."""
    encoder_tokenizer = make_encoder_tokenizer()
    embeddings = torch.arange(len(encoder_tokenizer)).float()[:, None]
    for text in [*TEXTS, "naïve café 🙂 ok", "  two  spaces ", ""]:
        rows, targets = projector_fit.aligned_targets(text, llm_tokenizer, encoder_tokenizer, embeddings, 64)
        spans = llm_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        encoded = encoder_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        expected = {}
        for row, (start, end) in enumerate(spans):
            ids = [i for i, (s, e) in zip(encoded["input_ids"], encoded["offset_mapping"]) if s < end and start < e]
            if ids:
                expected[row] = sum(ids) / len(ids)
        assert 0 not in rows  # <bos>
        assert dict(zip(rows, targets[:, 0].tolist())) == pytest.approx(expected)


def test_one_text_is_enough(fitted, llm_tokenizer, tiny_encoder):
    model, cache, _ = fitted
    model = HybridModel(model.config)
    report = projector_fit.fit_projector(model, cache, llm_tokenizer, tiny_encoder, TEXTS[:1], max_length=64)
    assert torch.isfinite(model.projector[-1].weight).all() and report["tokens"] > 0


def test_no_tokens_is_an_error(fitted, llm_tokenizer, tiny_encoder, tmp_path):
    model, _, _ = fitted
    cache = LLMStateCache(tmp_path, {}, LAYERS)
    cache.fill(model, llm_tokenizer, [""], max_length=64)
    with pytest.raises(ValueError, match="no tokens"):
        projector_fit.fit_standardizer(model, cache, llm_tokenizer, [""])
    with pytest.raises(ValueError, match="aligned"):
        projector_fit.fit_projector(model, cache, llm_tokenizer, tiny_encoder, [""], max_length=64)
