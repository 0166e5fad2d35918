import json

import mteb
import pytest
import torch
from sentence_transformers import SentenceTransformer

import evaluate_mteb
from modeling_hybrid import HybridModel
from repository import save_repository
from sweep import Point, Sweep
from tasks import get_task, task_splits
from train import fit
from trainer import HeadEvaluator


@pytest.fixture(scope="module")
def make_sweep(tiny_llm, tiny_encoder, dataset_root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep")

    def make(
        task="AmazonCounterfactual",
        train_split="validation",
        recipe="tuned",
        states="llm-states",
        settings=None,
        texts_per_label=None,
    ):
        return Sweep(
            task,
            tiny_llm,
            tiny_encoder,
            train_split,
            directory / "results",
            dataset_root,
            str(directory / states),
            settings={"num_train_epochs": 1, "disable_tqdm": True, **(settings or {})},
            recipe=recipe,
            texts_per_label=texts_per_label,
        )

    return make


def test_every_kind_of_point(make_sweep):
    points = [Point("llm", 1, (2,)), Point("encoder-untrained", 1), Point("encoder", 1), Point("hybrid", 1, (2,))]
    points += [Point(kind, 1, (2, 5), pooling) for kind in ("llm", "hybrid") for pooling in ("max", "mean")]
    points.append(Point("hybrid", 1, (2, 5), "concat"))
    results = make_sweep().run(points)
    for point, result in zip(points, results):
        assert (result["kind"], result["layers"], result["layer_pooling"]) == (
            point.kind,
            list(point.layers),
            point.layer_pooling,
        )
        assert len(result["experiments"]) == 10
        assert ("head" in result) == (point.kind != "encoder-untrained")
        # The digits of the texts, over all experiments, are the accuracy.
        counts = [int(digit, 16) for digit in result["correct"]]
        assert sum(counts) / len(counts) / 10 == pytest.approx(result["accuracy"])
        if "head" in result:
            right = [int(digit, 16) for digit in result["head"]["correct"]]
            assert len(right) == len(counts) and set(right) <= {0, 1}
            assert sum(right) / len(right) == pytest.approx(result["head"]["accuracy"])
    assert len({result["accuracy"] for result in results}) > 1
    names = {path.name for path in make_sweep().directory.iterdir()}
    assert names == {f"{point.name}.json" for point in points}  # and no leftover of a training


def stop():
    raise KeyboardInterrupt


def test_goes_on_where_it_was_and_runs_the_llm_once(make_sweep, monkeypatch):
    texts = []
    original = HybridModel.hidden_states
    monkeypatch.setattr(
        HybridModel, "hidden_states", lambda self, ids, mask: texts.append(len(ids)) or original(self, ids, mask)
    )
    sweep = make_sweep("Emotion")
    points = [Point("llm", 1, (layer,)) for layer in range(1, 8)]
    measure = sweep._measure
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "_measure", lambda point, *a: measure(point, *a) if point.layers < (4,) else stop())
        sweep.run(points)
    once = sum(texts)
    assert once > 0
    before = {path: path.stat().st_mtime_ns for path in sweep.directory.iterdir()}
    assert {path.stem for path in before} == {point.name for point in points[:3]}
    make_sweep("Emotion").run(points)
    assert sum(texts) == once  # seven layers and a second start: no text was read twice
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    accuracies = [json.loads((sweep.directory / f"{point.name}.json").read_text())["accuracy"] for point in points]
    best = sorted(range(7), key=lambda i: accuracies[i], reverse=True)[:4]
    assert sweep.best_layers("llm", [1]) == tuple(sorted(i + 1 for i in best))


def test_a_point_equals_the_saved_model_scored_by_mteb(make_sweep, dataset_root, tmp_path, monkeypatch):
    # One text a batch on both sides: rounding differs with the batch, and can turn a text that mteb's probe barely decides.
    monkeypatch.setattr("encoding.suitable_tokens_per_batch", lambda device: 1)
    monkeypatch.setattr("llm_cache.suitable_tokens_per_batch", lambda device: 1)
    sweep = make_sweep(states="one-by-one")
    (result,) = sweep.run([Point("llm", 1, (5,))])
    module = sweep.build(Point("llm", 1, (5,)))
    save_repository(tmp_path / "model", module.model, module.tokenizer, module.max_seq_length, normalize=True)
    model = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    task = get_task("AmazonCounterfactual", dataset_root=dataset_root)
    result_of_mteb = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": 1})
    scores = result_of_mteb.task_results[0].scores["test"][0]
    assert result["accuracy"] == pytest.approx(scores["accuracy"], abs=1e-6)
    assert result["f1"] == pytest.approx(scores["f1"], abs=1e-6)


def test_no_text_is_encoded_twice(make_sweep, monkeypatch):
    encoded = []
    encode = SentenceTransformer.encode
    monkeypatch.setattr(
        SentenceTransformer, "encode", lambda self, texts, **k: encoded.extend(texts) or encode(self, texts, **k)
    )
    sweep = make_sweep()
    (result,) = sweep.run([Point("hybrid", 7, (3,))])
    assert sorted(encoded) == sorted(set(sweep.mteb_texts))
    assert "head" in result


def test_head_scores_are_those_of_the_trained_model(make_sweep):
    """The sweep takes them from the embeddings; training, from the whole model."""
    sweep = make_sweep()
    point = Point("hybrid", 8, (3,))
    (result,) = sweep.run([point])
    model_args, data_args, training = sweep._arguments(point)
    model, _ = fit(model_args, data_args, training, {})
    test = task_splits(sweep.task)["test"]
    scores = HeadEvaluator(test["text"], test["label"])(model)
    assert scores == pytest.approx({metric: result["head"][metric] for metric in scores})


def test_train_split_is_chosen_by_validation(make_sweep):
    (result,) = make_sweep(train_split="train").run([Point("hybrid", 1, (2,))])
    assert result["train_split"] == "train"
    with pytest.raises(ValueError, match="never trained on"):
        make_sweep(train_split="test").run([Point("hybrid", 1, (2,))])


def test_paper_recipe_has_the_reports_mistakes(make_sweep):
    """A text's embedding depends on the texts beside it; with our recipe it does not."""
    for recipe in ("paper", "tuned"):
        sweep = make_sweep(recipe=recipe)
        point = Point("hybrid", 1, (2,))
        model_args, data_args, training = sweep._arguments(point)
        model, report = fit(model_args, data_args, training, {}, sweep.recipe.module)
        embedder = SentenceTransformer(modules=[model[0], model[1]], device="cpu")
        alone = embedder.encode(["the lid"])[0]
        beside = embedder.encode(["the lid", "river pan owner book door café street lamp coat the bus"])[0]
        if recipe == "paper":
            assert abs(alone - beside).max() > 1e-2
            assert report["projector_fit"] is None and model[0].model.standardizer.clip == float("inf")
            assert set(training.learning_rate_mapping.values()) == {training.learning_rate} == {1e-5}
        else:
            assert abs(alone - beside).max() < 1e-5
            assert report["projector_fit"] and model[0].model.standardizer.clip == 5
    (result,) = make_sweep(recipe="paper").run([point])
    assert result["recipe"] == "paper"


def test_little_data(make_sweep):
    """Statistics and projector come from all texts of the split, the weights from a few of each label."""
    sweep = make_sweep(train_split="train", texts_per_label=2)
    whole = make_sweep(train_split="train").build(Point("hybrid", 1, (2,)))
    points = [Point("llm", 1, (2,)), Point("encoder", 1), Point("hybrid", 1, (2,)), Point("llm", 2, (2,))]
    results = sweep.run(points)
    assert all(result["texts_per_label"] == 2 for result in results)
    assert sweep.directory.name == "train-2"
    model_args, data_args, training = sweep._arguments(points[2])
    model, report = fit(model_args, data_args, training, {})
    assert report["texts"] == {"train": 4, "validation": 0}
    assert torch.equal(model[0].model.standardizer.mean, whole.model.standardizer.mean)


def test_settings_belong_to_a_point(make_sweep):
    point = Point("encoder", 5)
    (slow,) = make_sweep().run([point])
    with pytest.raises(ValueError, match="was measured with the settings"):
        make_sweep(settings={"learning_rate": 1e-3}).run([point])
    fast = make_sweep(settings={"learning_rate": 1e-2, "llm_dtype": "bfloat16"})
    model_args, _, training = fast._arguments(point)
    assert training.learning_rate == 1e-2 and model_args.llm_dtype == "bfloat16"


def test_settings_on_the_command_line():
    settings = evaluate_mteb.parse_settings(["learning_rate=1e-4", "llm_dtype=bfloat16", "num_train_epochs=20"])
    assert settings == {"learning_rate": 1e-4, "llm_dtype": "bfloat16", "num_train_epochs": 20.0}
    for wrong, message in (
        ("bf16", "NAME=VALUE"),
        ("nonsense=1", "nonsense"),
        ("task=Emotion", "models and of training"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_mteb.parse_settings([wrong])


def test_command_line(tiny_llm, tiny_encoder, dataset_root, tmp_path, monkeypatch, capsys):
    arguments = ["sweep", "Emotion", "--llm", tiny_llm, "--encoder", tiny_encoder, "--dataset-root", dataset_root]
    arguments += ["--kinds", "llm", "merged", "--layers", "1", "7", "--merge", "1", "7", "--seeds", "1"]
    arguments += ["--results", str(tmp_path / "results"), "--llm-cache-dir", str(tmp_path / "llm-states")]
    monkeypatch.setattr("sys.argv", ["evaluate_mteb.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        evaluate_mteb.main()
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "seed" in line] == [
        "llm 1 (seed 1)",
        "llm 7 (seed 1)",
        "hybrid 1 7 max (seed 1)",
        "hybrid 1 7 mean (seed 1)",
    ]
