"""The model itself, on tiny random backbones of every supported family."""

import copy

import pytest
import torch
from conftest import TEXTS, encoder_configs, llm_configs
from safetensors.torch import load_file
from transformers import AutoModel, CLIPTextConfig

from configuration_hybrid import HybridConfig
from modeling_hybrid import HybridForSequenceClassification, HybridModel, masked_mean


def make_model(llm="gemma3", encoder="roberta", layers=(2,), seed=0, **options) -> HybridModel:
    torch.manual_seed(seed)
    config = HybridConfig(
        llm_config=llm_configs()[llm],
        encoder_config=encoder and encoder_configs()[encoder],
        llm_layers=list(layers),
        **options,
    )
    return HybridModel(config).eval()


def with_statistics(model: HybridModel) -> HybridModel:
    """Statistics as of real text: not the identity, and tight enough for the clip to act."""
    generator = torch.Generator().manual_seed(1)
    shape = model.standardizer.mean.shape
    model.standardizer.set_statistics(
        torch.randn(shape, generator=generator) * 0.1, torch.rand(shape, generator=generator) * 0.1 + 0.01
    )
    return model


def random_ids(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 200, (length,), generator=generator) for length in lengths]


def padded(ids, side):
    width = max(len(row) for row in ids)
    input_ids, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for i, row in enumerate(ids):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        input_ids[i, place], mask[i, place] = row, 1
    return input_ids, mask


@pytest.mark.parametrize("family", llm_configs())
def test_layer_k_of_the_truncated_llm_is_hidden_state_k_of_the_whole(family, tmp_path):
    torch.manual_seed(0)
    whole = AutoModel.from_config(llm_configs()[family]).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "norm" in name:  # fresh norms are all alike; make them matter
                parameter.normal_(1.0, 0.3)
    whole.save_pretrained(tmp_path)
    input_ids, mask = padded(random_ids([12, 9]), "left")
    with torch.no_grad():
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        expected = whole(input_ids, mask, position_ids=position_ids, output_hidden_states=True).hidden_states
    depth = whole.config.num_hidden_layers
    for layers in ([1], [2], [depth - 1], [depth], [1, 3, depth]):
        model = HybridModel.from_backbones(str(tmp_path), None, llm_layers=layers)
        assert len(model.llm.layers) == layers[-1]
        states = model.hidden_states(input_ids, mask)
        for row, layer in enumerate(layers):
            kept = mask.bool()
            torch.testing.assert_close(states[:, row][kept], expected[layer][kept], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("encoder", [*encoder_configs(), None])
def test_embedding_does_not_depend_on_padding(encoder):
    model = with_statistics(make_model(encoder=encoder, layers=[2, 7]))
    ids = random_ids([3, 17, 9])
    alone = torch.cat([model(row[None]).pooler_output for row in ids])
    for side in ("left", "right"):
        input_ids, mask = padded(ids, side)
        torch.testing.assert_close(model(input_ids, mask).pooler_output, alone, atol=1e-5, rtol=1e-5)


def test_positions_of_a_text_count_from_its_first_token():
    """RoBERTa's own count from `inputs_embeds` starts at the padding: the report's mistake, and not ours."""
    model = make_model()
    seen = {}
    model.encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    input_ids, mask = padded(random_ids([2, 4]), "left")
    model(input_ids, mask)
    # RoBERTa's table starts after the padding row: pad_token_id is 1, the first token is at 2.
    assert seen["position_ids"].tolist() == [[2, 2, 2, 3], [2, 3, 4, 5]]
    assert (
        HybridConfig(
            llm_config=llm_configs()["gemma"], encoder_config=encoder_configs()["bert"], llm_layers=[1]
        ).encoder_position_offset
        == 0
    )


@pytest.mark.parametrize(
    "llm,encoder,layers", [("gemma3", "roberta", [2]), ("gemma2", "bert", [1, 4]), ("qwen3", None, [2])]
)
def test_save_and_load(llm, encoder, layers, tmp_path):
    model = with_statistics(make_model(llm, encoder, layers, id2label={0: "plain", 1: "counterfactual", 2: "?"}))
    classifier = HybridForSequenceClassification(model.config, hybrid=model).eval()
    classifier.save_pretrained(tmp_path)
    input_ids, mask = padded(random_ids([5, 11]), "left")
    for cls, value in ((HybridModel, "pooler_output"), (HybridForSequenceClassification, "logits")):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        original = model if cls is HybridModel else classifier
        torch.testing.assert_close(
            getattr(loaded(input_ids, mask), value), getattr(original(input_ids, mask), value), atol=1e-6, rtol=1e-6
        )
        assert not any(parameter.requires_grad for parameter in loaded.base_model.llm.parameters())
    assert loaded.config.id2label[1] == "counterfactual"
    # What is not run is not stored: no encoder vocabulary, no pooler, no block above the deepest.
    names = set(loaded.state_dict())
    assert not any("word_embeddings" in name or "pooler" in name or f"layers.{layers[-1]}." in name for name in names)


def test_bf16_llm_with_fp32_rest_survives_save_and_load(tiny_llm, tiny_encoder, tmp_path):
    model = HybridModel.from_backbones(tiny_llm, tiny_encoder, llm_layers=[2], llm_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = HybridModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for part, dtype in (
        (loaded.llm, torch.bfloat16),
        (loaded.projector, torch.float32),
        (loaded.encoder, torch.float32),
    ):
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
    assert loaded.standardizer.mean.dtype == torch.float32
    input_ids, mask = padded(random_ids([5, 11]), "left")
    assert torch.equal(loaded(input_ids, mask).pooler_output, model.eval()(input_ids, mask).pooler_output)
    everything_fp32 = HybridModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in everything_fp32.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", llm_configs())
def test_a_bfloat16_llm_is_stored_in_it_and_runs_in_what_is_fast(family, tiny_encoder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    AutoModel.from_config(llm_configs()[family], dtype=torch.bfloat16).save_pretrained(tmp_path / "llm")
    model = with_statistics(HybridModel.from_backbones(str(tmp_path / "llm"), tiny_encoder, llm_layers=[1, 3]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("llm.") else torch.float32)
    input_ids, mask = padded(random_ids([5, 11]), "left")

    for fast in (True, False):
        monkeypatch.setattr("modeling_hybrid.has_fast_bfloat16", lambda: fast)
        loaded = HybridModel.from_pretrained(tmp_path / "model")
        assert {weight.dtype for weight in loaded.llm.layers.parameters()} == {
            torch.bfloat16 if fast else torch.float32
        }
        assert loaded.llm.get_input_embeddings().weight.dtype == torch.bfloat16
        assert {weight.dtype for weight in loaded.encoder.parameters()} == {torch.float32}
        tolerance = 0.1 if fast else 1e-6
        output, expected = loaded(input_ids, mask).pooler_output, model(input_ids, mask).pooler_output
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
        loaded.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again/model.safetensors")
        assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    # What is asked for is done.
    for dtype in (torch.bfloat16, torch.float32):
        assert {
            weight.dtype for weight in HybridModel.from_pretrained(tmp_path / "model", dtype=dtype).llm.parameters()
        } == {dtype}


def test_a_float32_llm_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_hybrid.has_fast_bfloat16", lambda: True)
    make_model().save_pretrained(tmp_path)
    assert {weight.dtype for weight in HybridModel.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_float16_is_refused(tiny_llm, tiny_encoder, tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        HybridModel.from_backbones(tiny_llm, tiny_encoder, llm_layers=[2], llm_dtype=torch.float16)
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bfloat16"):
        HybridModel.from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="bfloat16"):
        model.half()(random_ids([4])[0][None])


def test_precomputed_states_replace_input_ids():
    model = with_statistics(make_model(layers=[2, 5]))
    input_ids, mask = padded(random_ids([5, 11]), "right")
    states = model.hidden_states(input_ids, mask)
    assert states.shape == (2, 2, 11, 32)
    assert not states[0, :, 5:].any()
    expected = model(input_ids, mask).pooler_output
    assert torch.equal(model(attention_mask=mask, llm_hidden_states=states).pooler_output, expected)
    with pytest.raises(ValueError, match="either"):
        model(input_ids, mask, llm_hidden_states=states)
    with pytest.raises(ValueError, match="either"):
        model(attention_mask=mask)


def test_gradients_reach_projector_and_encoder_but_never_the_llm():
    model = make_model().train()
    assert not model.llm.training and model.encoder.training
    model(random_ids([7])[0][None]).pooler_output.sum().backward()
    assert model.projector[-1].weight.grad.abs().sum() > 0
    assert any(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(parameter.grad is None for parameter in model.llm.parameters())


def test_every_trained_parameter_gets_a_gradient():
    """Distributed training stops at a parameter that has none."""
    for encoder in encoder_configs():
        model = make_model(encoder=encoder).train()
        model(random_ids([7])[0][None]).last_hidden_state.pow(2).sum().backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (encoder, without)


def test_standardizer():
    model = make_model(layers=[2, 5])
    states = torch.randn(3, 2, 6, 32) * 50
    assert torch.equal(model.standardizer(states), states)  # the identity, until it is fitted
    mean, deviation = torch.randn(2, 32), torch.rand(2, 32) + 0.5
    model.standardizer.set_statistics(mean, deviation)
    expected = ((states - mean[:, None]) / deviation[:, None]).clamp(-5, 5)
    torch.testing.assert_close(model.standardizer(states), expected)
    assert expected.abs().max() == 5
    model.standardizer.set_statistics(mean, torch.zeros(2, 32))
    assert torch.isfinite(model.standardizer(states)).all()
    with pytest.raises(ValueError, match="not finite"):
        model.standardizer.set_statistics(mean * float("nan"), deviation)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_layers_are_merged_after_standardising(pooling):
    model = with_statistics(make_model(layers=[2, 5], layer_pooling=pooling))
    states = torch.randn(3, 2, 6, 32)
    each = model.standardizer(states)
    expected = each.mean(1) if pooling == "mean" else each.max(1).values
    torch.testing.assert_close(model.merge_layers(states), expected)


def test_layers_side_by_side_and_layer_dropout():
    model = with_statistics(make_model(layers=[2, 5], layer_pooling="concat", layer_dropout=0.5))
    states = torch.randn(400, 2, 6, 32)
    each = model.standardizer(states)
    whole = torch.cat([each[:, 0], each[:, 1]], dim=-1) / 2
    torch.testing.assert_close(model.merge_layers(states), whole)
    kept = (model.train().merge_layers(states) / whole).view(400, 6, 2, 32)
    # A text has one layer at twice its weight, or both as they are: the projection keeps its size.
    assert torch.allclose(kept, kept[:, :1, :, :1].expand_as(kept), atol=1e-4)
    weights = kept[:, 0, :, 0].round()
    assert (weights.sum(1) == 2).all()
    # One, drawn at random, stays; the other is left out for every second text.
    assert (weights == 1).all(1).sum() == pytest.approx(200, abs=50)
    assert (weights == 2).sum(0).tolist() == pytest.approx([100, 100], abs=45)
    for settings, message in (
        ({"layer_pooling": "mean", "layer_dropout": 0.5}, "layer_dropout leaves layers out"),
        ({"layer_pooling": "concat", "layer_dropout": 1.0}, "layer_dropout must be"),
        ({"layer_pooling": "concat", "encoder": None}, "needs an encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(layers=[2, 5], **settings)


def test_projector_dropout_acts_in_training_only():
    model = make_model(projector_dropout=0.5, encoder="roberta")
    model.encoder.config.hidden_dropout_prob = 0.0
    ids = random_ids([7])[0][None]
    assert torch.equal(model(ids).pooler_output, model(ids).pooler_output)
    projected = [model.projector.train()(torch.ones(1, 32)) for _ in range(2)]
    assert not torch.equal(*projected)


def test_mean_leaves_out_padding_and_survives_no_tokens():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[7.0], [7.0], [7.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(states, mask).tolist() == [[2.0], [0.0]]


def test_classifier_loss_and_tuple_output():
    model = make_model(id2label={0: "a", 1: "b", 2: "c"})
    classifier = HybridForSequenceClassification(model.config, hybrid=model).eval()
    ids = random_ids([7])[0][None]
    labels = torch.tensor([2])
    output = classifier(ids, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert torch.equal(classifier(ids, return_dict=False)[0], output.logits)
    assert torch.equal(model(ids, return_dict=False)[1], model(ids).pooler_output)


def test_text_longer_than_the_encoder_takes():
    model = make_model()
    assert model.config.max_position_embeddings == 64
    with pytest.raises(ValueError, match="truncation=True"):
        model(random_ids([65])[0][None])


def test_config_errors():
    def config(**options):
        return HybridConfig(llm_config=llm_configs()["gemma3"], encoder_config=encoder_configs()["bert"], **options)

    with pytest.raises(ValueError, match="empty"):
        config(llm_layers=[])
    with pytest.raises(ValueError, match="layers are 1 to 7"):
        config(llm_layers=[3, 8])
    with pytest.raises(ValueError, match="layers are 1 to 7"):
        config(llm_layers=[0])
    with pytest.raises(ValueError, match="twice"):
        config(llm_layers=[3, 3])
    with pytest.raises(ValueError, match="layer_pooling"):
        config(llm_layers=[3], layer_pooling="sum")
    with pytest.raises(ValueError, match="projector_dropout"):
        config(llm_layers=[3], projector_dropout=1.0)
    assert config(llm_layers=[5, 3]).llm_layers == [3, 5]


def test_encoder_without_inputs_embeds_is_refused():
    clip = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    config = HybridConfig(llm_config=llm_configs()["gemma"], encoder_config=clip, llm_layers=[2])
    with pytest.raises(ValueError, match="inputs_embeds"):
        HybridModel(config)


def test_config_cuts_per_layer_settings_and_remembers_the_depth():
    whole = llm_configs()["gemma3"]
    config = HybridConfig(
        llm_config=copy.deepcopy(whole), encoder_config=encoder_configs()["roberta"], llm_layers=[2, 3]
    )
    assert config.llm_config.num_hidden_layers == 3
    assert config.llm_config.layer_types == whole.layer_types[:3]
    assert config.llm_depth == 7 and not config.reads_final_norm
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (24, 200, 64)
    again = HybridConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_backbone_with_missing_weights_is_refused(tiny_llm, tmp_path):
    from safetensors.torch import load_file, save_file

    AutoModel.from_pretrained(tiny_llm).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights.*q_proj"):
        HybridModel.from_backbones(str(tmp_path), None, llm_layers=[2])


def test_threads_share_a_model(llm_tokenizer):
    """The states captured for one thread's text never end up in another's."""
    from concurrent.futures import ThreadPoolExecutor

    model = with_statistics(make_model(layers=[1, 2, 4, 7]))
    inputs = [llm_tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS * 4]
    with torch.no_grad():
        expected = [model(ids).pooler_output for ids in inputs]

        def embed(ids):
            with torch.no_grad():
                return model(ids).pooler_output

        with ThreadPoolExecutor(8) as pool:
            for got, want in zip(pool.map(embed, inputs), expected):
                torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def with_words(model: HybridModel) -> HybridModel:
    """A table of word pieces: token t is piece t mod 90 at the start of a word, and the two after it inside one."""
    tokens = torch.arange(model.config.vocab_size)
    at_start = torch.stack([tokens % 90, torch.full_like(tokens, -1)], dim=1)
    inside = torch.stack([tokens % 90 + 1, tokens % 90 + 2], dim=1)
    model.words.set_table(torch.stack([at_start, inside]).int(), tokens % 2 == 0, tokens % 3 == 0)
    return model


def test_words_of_a_token_depend_on_the_one_before():
    words = with_words(make_model(read_words=True)).words
    table = words.word_embeddings.weight
    # 9 ends inside a word and 4 starts inside one; 7 does neither; 12 does both.
    embedded = words(torch.tensor([[9, 4, 7, 4, 12, 12]]), torch.ones(1, 6, dtype=torch.long))[0]
    torch.testing.assert_close(embedded[0], table[9])
    torch.testing.assert_close(embedded[1], (table[5] + table[6]) / 2)
    torch.testing.assert_close(embedded[2], table[7])
    torch.testing.assert_close(embedded[3], table[4])
    torch.testing.assert_close(embedded[4], table[12])
    torch.testing.assert_close(embedded[5], (table[13] + table[14]) / 2)
    # What stands in the padding is no word before.
    embedded = words(torch.tensor([[9, 4]]), torch.tensor([[0, 1]]))[0]
    torch.testing.assert_close(embedded[1], table[4])
    words.pieces.fill_(-1)
    assert not words(torch.tensor([[9, 4]]), torch.ones(1, 2, dtype=torch.long)).any()


@pytest.mark.parametrize("encoder", encoder_configs())
def test_two_readings(encoder, tmp_path):
    """Of the states and of the words, each as by the encoder alone, and the mean of both."""
    model = with_words(with_statistics(make_model(encoder=encoder, layers=[2, 5], read_words=True)))
    input_ids, mask = padded(random_ids([5, 11]), "left")
    with torch.no_grad():
        both = model(input_ids, mask).pooler_output
        states, words = model(input_ids, mask, separate_readings=True).pooler_output.chunk(2)
        positions = (mask.cumsum(1) - 1).clamp(min=0) + model.config.encoder_position_offset
        inputs_embeds = model.words(input_ids, mask)
        read = model.encoder(inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=positions)
        alone = make_model(encoder=encoder, layers=[2, 5])
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("words.")})
        torch.testing.assert_close(states, alone(input_ids, mask).pooler_output)
        torch.testing.assert_close(words, masked_mean(read.last_hidden_state, mask))
        torch.testing.assert_close(both, (states + words) / 2)
        # Neither padding nor the states that a cache has change it.
        cached = model.hidden_states(input_ids, mask)
        torch.testing.assert_close(model(input_ids, mask, llm_hidden_states=cached).pooler_output, both)
        torch.testing.assert_close(model(input_ids[:1, 6:]).pooler_output, both[:1], atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        loaded = HybridModel.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(input_ids, mask).pooler_output, both)
        # In any precision of the LLM the table stays one of integers.
        for dtype in (torch.float32, torch.bfloat16):
            loaded = HybridModel.from_pretrained(tmp_path, dtype=dtype)
            for name, buffer in model.words.named_buffers():
                assert loaded.words.get_buffer(name).dtype == buffer.dtype
                assert torch.equal(loaded.words.get_buffer(name), buffer)
            torch.testing.assert_close(loaded(input_ids, mask).pooler_output, both, atol=0.1, rtol=0.1)
    empty = torch.zeros(3, 0, dtype=torch.long)
    assert not model(empty).pooler_output.any() and model(empty).pooler_output.shape == (3, 24)
    assert model(empty, separate_readings=True).pooler_output.shape == (6, 24)
    with pytest.raises(ValueError, match="give `input_ids`"):
        model(attention_mask=mask, llm_hidden_states=cached)
    with pytest.raises(ValueError, match="one reading"):
        alone(input_ids, mask, separate_readings=True)
    with pytest.raises(ValueError, match="read_words needs an encoder"):
        make_model(encoder=None, read_words=True)


def test_every_trained_parameter_of_two_readings_gets_a_gradient():
    model = with_words(make_model(read_words=True)).train()
    model(random_ids([7])[0][None], separate_readings=True).last_hidden_state.pow(2).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
