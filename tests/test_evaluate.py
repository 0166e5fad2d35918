"""evaluate_mteb.py on small datasets laid out as mteb's repositories on the Hub are."""

import json
import shutil

import mteb
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import evaluate_mteb
from tasks import get_task


@pytest.fixture(scope="module")
def model_directory(tiny_encoder, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    transformer = Transformer(tiny_encoder)
    model = SentenceTransformer(modules=[transformer, Pooling(24, pooling_mode="mean")], device="cpu")
    model.save_pretrained(str(directory), create_model_card=False)
    return str(directory)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["evaluate_mteb.py", "run", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        evaluate_mteb.main()
    return stopped.value.code


def test_run_equals_mteb_called_directly(monkeypatch, model_directory, dataset_root, tmp_path, capsys):
    tasks = ("AmazonCounterfactual", "EmotionClassification")
    code = run(monkeypatch, model_directory, "--tasks", *tasks, "--dataset-root", dataset_root, "--results", tmp_path)
    assert code == 0
    printed = capsys.readouterr().out
    for name in tasks:
        task = get_task(name, dataset_root=dataset_root)
        model = SentenceTransformer(model_directory, device="cpu")
        direct = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": 32}).task_results[0]
        scores = direct.scores["test"][0]
        (path,) = tmp_path.rglob(f"{task.metadata.name}.json")
        saved = json.loads(path.read_text())
        for metric in ("accuracy", "f1"):
            assert saved["scores"]["test"][0][metric] == round(scores[metric], 6)  # as mteb writes it
        assert f"{scores['accuracy']:.4f}" in printed and f"{scores['f1']:.4f}" in printed
        assert (
            saved["dataset_source"]
            == f"{dataset_root}/datasets/{'mteb/emotion' if 'Emotion' in name else 'mteb/amazon_counterfactual'}"
        )
    # mteb's own reader takes the folder, the note on the source included.
    loaded = mteb.ResultCache(tmp_path).load_results()
    assert {result.task_name for model in loaded.model_results for result in model.task_results} == {
        "AmazonCounterfactualClassification",
        "EmotionClassification",
    }


def test_finished_tasks_are_skipped_and_models_are_kept_apart(
    monkeypatch, model_directory, dataset_root, tmp_path, tiny_encoder
):
    arguments = ("--tasks", "Emotion", "--dataset-root", dataset_root, "--results", tmp_path)
    encoded = []
    encode = SentenceTransformer.encode
    monkeypatch.setattr(
        SentenceTransformer, "encode", lambda self, *a, **k: encoded.append(1) or encode(self, *a, **k)
    )
    assert run(monkeypatch, model_directory, *arguments) == 0
    assert encoded
    encoded.clear()
    assert run(monkeypatch, model_directory, *arguments) == 0
    assert not encoded
    model = SentenceTransformer(model_directory, device="cpu")
    model[0].model.embeddings.word_embeddings.weight.data.mul_(2)
    model.save_pretrained(model_directory, create_model_card=False)  # the same name, other weights
    assert run(monkeypatch, model_directory, *arguments) == 0
    assert encoded
    assert len(list(tmp_path.rglob("EmotionClassification.json"))) == 2


def test_a_failing_task_does_not_stop_the_others(monkeypatch, model_directory, dataset_root, tmp_path, capsys):
    evaluate = mteb.evaluate

    def fails_on_emotion(model, task, **kwargs):
        if task.metadata.name == "EmotionClassification":
            raise RuntimeError("no memory left")
        return evaluate(model, task, **kwargs)

    monkeypatch.setattr(mteb, "evaluate", fails_on_emotion)
    tasks = ("Emotion", "AmazonCounterfactual")
    code = run(monkeypatch, model_directory, "--tasks", *tasks, "--dataset-root", dataset_root, "--results", tmp_path)
    printed = capsys.readouterr().out
    assert code == 1
    assert "FAILED EmotionClassification: RuntimeError: no memory left" in printed
    assert list(tmp_path.rglob("AmazonCounterfactualClassification.json"))


def test_mirrors_of_one_name_are_kept_apart(dataset_root, tmp_path):
    """datasets itself would give the rows that it read first for both."""
    shutil.copytree(dataset_root, tmp_path / "other")
    path = tmp_path / "other/datasets/mteb/amazon_counterfactual/en/test.jsonl"
    for expected in (48, 47):
        task = get_task("AmazonCounterfactual", dataset_root=str(tmp_path / "other"))
        task.load_data()
        assert len(task.dataset["en"]["test"]) == expected
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    task = get_task("AmazonCounterfactual", dataset_root=dataset_root)
    task.load_data()
    assert len(task.dataset["en"]["test"]) == 48


def test_tasks_by_name():
    for name in (
        "AmazonCounterfactual AmazonPolarity AmazonReviews Banking77 Emotion Imdb MassiveIntent MassiveScenario MTOPDomain "
        "MTOPIntent ToxicConversations TweetSentimentExtraction"
    ).split():
        task = get_task(name)
        assert task.metadata.name == f"{name}Classification"
        assert task.hf_subsets == (["en"] if task.metadata.is_multilingual else ["default"])
        assert task.eval_splits == ["test"]
    assert get_task("AmazonCounterfactual", "de").hf_subsets == ["de"]
    with pytest.raises(ValueError, match="no subset 'xx'; it has de, en"):
        get_task("AmazonCounterfactual", "xx")
    with pytest.raises(KeyError):
        get_task("NoSuchTask")
    with pytest.raises(FileNotFoundError, match="has no mteb/banking77"):
        get_task("Banking77", dataset_root="/nowhere")


def test_the_tasks_of_a_benchmark(monkeypatch, model_directory, dataset_root, tmp_path, capsys):
    """Of MTEB(eng, v2)'s eight classification tasks the mirror has one: it is measured, and the others are reported."""
    benchmark = ("--benchmark", "MTEB(eng, v2)", "--types", "Classification")
    code = run(monkeypatch, model_directory, *benchmark, "--dataset-root", dataset_root, "--results", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert [line.split()[0] for line in lines if " test " in line] == ["AmazonCounterfactualClassification"]
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 7 and any("Banking77" in line for line in failed)
