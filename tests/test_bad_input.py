"""Bad input through every door: one table of input, door and outcome.

An input is a function that spoils a `Case`, in which all is well before; a door is a function that does what a user
does with the case and returns embeddings, or the metrics of a training or an evaluation. An outcome is a check of what
the door returns, or an error's type with a part of its message. What a command line says counts as its error: one line
that starts with its name.

A row is added to `ROWS`; a door to `DOORS`, with the inputs that concern it to `CONCERNS`.
"""

import contextlib
import json
import resource
import shutil
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import TEXTS
from hub import Repository
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

import encode_corpus
import encoding
import evaluate_mteb
import train

LABELS, DIMENSION = 2, 24
GOOD_ROWS = [{"text": f"{text} {i}", "label": i % 2} for i, text in enumerate(TEXTS * 4)]


@dataclass
class Case:
    """What a door is given. `model` is a trained hybrid's directory, and `tmp_path` is the case's own."""

    model: str
    llm: str
    encoder: str
    tmp_path: Path
    request: pytest.FixtureRequest
    texts: object = field(default_factory=lambda: list(TEXTS))
    rows: list = field(default_factory=lambda: list(GOOD_ROWS))
    options: list = field(default_factory=list)
    around: list = field(default_factory=list)  # contexts in which a command runs

    @property
    def train_file(self) -> Path:
        return self.tmp_path / "train.jsonl"

    def fixture(self, name):
        return self.request.getfixturevalue(name)

    def own(self, part: str) -> Path:
        """A copy of the case's `model`, `llm` or `encoder` that may be spoilt."""
        copy = self.tmp_path / "own" / part
        if not copy.exists():
            shutil.copytree(getattr(self, part), copy)
            setattr(self, part, str(copy))
        return copy


# The doors


@cache
def whole_model(directory: str) -> SentenceTransformer:
    return SentenceTransformer(directory, trust_remote_code=True, device="cpu")


def load(case) -> SentenceTransformer:
    spoilt = "own" in Path(case.model).parts or not Path(case.model).exists()
    return (whole_model.__wrapped__ if spoilt else whole_model)(case.model)


def auto_model(case):
    tokenizer = AutoTokenizer.from_pretrained(case.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(case.model, trust_remote_code=True)
    with torch.no_grad():
        return model(**tokenizer(case.texts, padding=True, truncation=True, return_tensors="pt")).pooler_output.numpy()


def sentence_transformer(case):
    return load(case).encode(case.texts)


def encode(case):
    return encoding.encode(load(case), case.texts)


def pipeline(case):
    """The classifier's probabilities, which stand for embeddings."""
    classify = transformers.pipeline("text-classification", case.model, trust_remote_code=True, device="cpu")
    answers = classify(case.texts, truncation=True, top_k=None)
    names = sorted(classify.model.config.label2id)
    return np.array([[{a["label"]: a["score"] for a in answer}[name] for name in names] for answer in answers])


def run(case, main, *arguments) -> int | None:
    """`main` as the command line runs it; a message instead of an exit status is its error."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        for context in case.around:
            stack.enter_context(context())
        try:
            main()
        except SystemExit as stopped:
            if isinstance(stopped.code, str):
                raise
            return stopped.code


def train_door(case) -> dict:
    if not case.train_file.exists():
        case.train_file.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    output = case.tmp_path / "run"
    run(
        case,
        train.main,
        *("--llm", case.llm, "--encoder", case.encoder, "--llm_layers", "2", "--max_seq_length", "64"),
        *("--train_file", case.train_file, "--max_steps", "2", "--per_device_train_batch_size", "8"),
        *("--llm_cache_dir", case.tmp_path / "states", "--output_dir", output, *case.options),
    )
    final = SentenceTransformer(str(output / "final"), trust_remote_code=True, device="cpu")
    return {"embeddings": final.encode(TEXTS), **json.loads((output / "results.json").read_text())["metrics"]}


def evaluate_door(case) -> dict:
    root, results = case.tmp_path / "hub", case.tmp_path / "results"
    repository = root / "datasets/mteb/emotion"
    repository.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = case.rows if split == "test" else GOOD_ROWS
        (repository / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = case.options or ["--results", results]
    status = run(
        case,
        evaluate_mteb.main,
        "run",
        case.model,
        "--tasks",
        "EmotionClassification",
        "--dataset-root",
        root,
        *options,
    )
    if status:
        raise TaskFailed(case.fixture("capsys").readouterr().out)
    (path,) = results.rglob("EmotionClassification.json")
    return json.loads(path.read_text())["scores"]["test"][0]


def corpus_door(case) -> np.ndarray:
    """The embeddings, NaN where they are null. The worker is in this process: Ray takes as long as ten rows to start."""
    source = next(case.tmp_path.glob("corpus.*"), case.tmp_path / "corpus.jsonl")
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in case.texts))
    output = case.tmp_path / "embeddings"

    def encoded_here(missing, arguments, address, workers):
        worker = encode_corpus.ShardEncoder(*arguments, threads=None)
        return (worker(asdict(shard)) for shard in missing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_corpus, "_encoded", encoded_here)
        run(case, encode_corpus.main, source, *(case.options or [output]), "--model", case.model)
    shards = [pq.read_table(path) for path in sorted(output.glob("shard-*"))]
    embeddings = [embedding for shard in shards for embedding in shard["embedding"].to_pylist()]
    return np.array([[np.nan] * DIMENSION if embedding is None else embedding for embedding in embeddings])


class TaskFailed(Exception):
    """evaluate_mteb.py reported a task that failed, and ended with status 1."""


DOORS = {
    "AutoModel": auto_model,
    "SentenceTransformer": sentence_transformer,
    "encode": encode,
    "pipeline": pipeline,
    "train": train_door,
    "evaluate": evaluate_door,
    "encode_corpus": corpus_door,
}
TEXT_DOORS = ("AutoModel", "SentenceTransformer", "encode", "pipeline")
COMMANDS = ("train", "evaluate", "encode_corpus")
MODEL_DOORS = (*TEXT_DOORS, "evaluate")


# The inputs


def texts(value):
    def spoil(case):
        case.texts = value

    return spoil


def rows(*more, of=GOOD_ROWS):
    """Other training texts, or texts to measure on."""

    def spoil(case):
        case.rows = [*of, *more]

    return spoil


def labelled(*texts):
    return [{"text": text, "label": 1} for text in texts]


def file(content, name="train.jsonl", *options):
    """A file to train on, byte by byte."""

    def spoil(case):
        path = case.tmp_path / name
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        case.options = ["--train_file", path, *options]

    return spoil


def corpus(content, name="corpus.jsonl"):
    """A corpus, byte by byte."""
    return lambda case: (case.tmp_path / name).write_bytes(content)


def options(*values):
    def spoil(case):
        case.options = [str(value).replace("TMP", str(case.tmp_path)) for value in values]

    return spoil


def unknown_labels(case):
    path = case.tmp_path / "validation.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "never"}) + "\n")
    case.options = ["--validation_file", path]


def weights(part, change):
    """`change` is made to the tensors of the model, the LLM or the encoder."""

    def spoil(case):
        path = case.own(part) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def with_nan(*names):
    def change(tensors):
        for name in names:
            tensors[name].view(-1)[0] = float("nan")

    return change


def without(name):
    return lambda tensors: tensors.pop(name)


def halved(name):
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2].clone()})


def truncated(part, name="model.safetensors"):
    def spoil(case):
        path = case.own(part) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def layers_in_config(layers):
    def spoil(case):
        path = case.own("model") / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "llm_layers": layers}))

    return spoil


def missing_tokenizer(part):
    def spoil(case):
        for path in case.own(part).glob("*token*"):
            path.unlink()

    return spoil


def cache_of_another_model(case):
    """The states of another LLM, which lay in the same directory, are there already."""
    train_door(case)
    shutil.rmtree(case.tmp_path / "run")
    weights("llm", lambda tensors: tensors["layers.0.mlp.down_proj.weight"].mul_(-3))(case)
    spoilt = Path(case.llm)
    here = case.tmp_path / "llm"
    shutil.copytree(spoilt, here)
    case.llm = str(here)


def mislabelled_cache(case):
    """A directory of the cache that somebody gave the name of another."""
    train_door(case)
    shutil.rmtree(case.tmp_path / "run")
    (key,) = (case.tmp_path / "states").glob("*/key.json")
    key.write_text(key.read_text().replace("64", "65"))


def output_of_another_model(case):
    """It lay in the same directory, and embedded the same texts."""
    path = case.own("model")
    corpus_door(case)
    case.model = str(path)
    weights("model", lambda tensors: tensors[WHOLE["llm"]].mul_(-3))(case)


def full_disk(file_bytes, texts=TEXTS):
    """No file can grow beyond `file_bytes`: the kernel refuses the write, as on a full disk."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def spoil(case):
        case.texts = texts
        case.around.append(limited)

    return spoil


def on_the_hub(name, part="model"):
    """The model, or a backbone, is asked for at a Hub."""

    def spoil(case):
        hub, patch = case.fixture("hub"), case.fixture("monkeypatch")
        hub.repositories["some/gated"] = Repository(gated=True)
        hub.repositories["some/gated"].commit("", {"config.json": b"{}"})
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        setattr(case, part, name)

    return spoil


def offline(part):
    """The model is not here, and the Hub is not asked."""

    def spoil(case):
        setattr(case, part, "some/model")

    return spoil


# The outcomes


def as_good_text(case, result):
    """Finite, and each text's embedding is the one that it has alone, whatever the door."""
    alone = np.concatenate([auto_embedding(case, text) for text in case.texts])
    expected = probabilities(case, alone) if result.shape[1] == LABELS else alone
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert np.isfinite(result).all()


def cut(case, result):
    """Only the first tokens count."""
    case.texts = [" ".join(text.split()[:64]) for text in case.texts]
    as_good_text(case, result)


def null_at(*rows):
    """These texts have no embedding, the others are good."""

    def check(case, result):
        null = np.isnan(result).all(axis=1)
        assert np.flatnonzero(null).tolist() == list(rows)
        case.texts = [text for text, is_null in zip(case.texts, null, strict=True) if not is_null]
        if case.texts:
            as_good_text(case, result[~null])

    return check


def nothing(*shape):
    def check(case, result):
        assert np.shape(result) == shape

    return check


def trained(case, result):
    assert np.isfinite(result["embeddings"]).all() and result["embeddings"].shape == (len(TEXTS), DIMENSION)


def trained_as_without_a_cache(case, result):
    shutil.rmtree(case.tmp_path / "run")
    case.options = ["--llm_cache_dir", str(case.tmp_path / "fresh")]
    np.testing.assert_allclose(result["embeddings"], train_door(case)["embeddings"], atol=1e-6)
    assert len(list((case.tmp_path / "states").iterdir())) == 2


def measured(case, result):
    assert 0 <= result["accuracy"] <= 1 and 0 <= result["f1"] <= 1


def auto_embedding(case, text):
    tokenizer, model = reference(case.model)
    with torch.no_grad():
        return model.hybrid(**tokenizer([text], truncation=True, return_tensors="pt")).pooler_output.numpy()


def probabilities(case, embeddings):
    _, model = reference(case.model)
    with torch.no_grad():
        scores = model.classifier(torch.from_numpy(embeddings)).softmax(-1).numpy()
    return scores[:, [model.config.label2id[name] for name in sorted(model.config.label2id)]]


@cache
def reference(directory: str):
    from modeling_hybrid import HybridForSequenceClassification

    return AutoTokenizer.from_pretrained(directory), HybridForSequenceClassification.from_pretrained(directory).eval()


# The table

LONG = " ".join(f"word{i % 97}" for i in range(100_000))
MANY_TEXTS = [f"{text} {i}" for i, text in enumerate(TEXTS * 60)]
CONTROL = ["\x00", "a\x00b", "\x07\x1b[31m", "\u200b\ufeff", "\x7f\x85\u2028"]
RIGHT_TO_LEFT = ["مرحبا بالعالم", "שלום עולם", "\u202eright\u202c to left"]
EMOJI = ["👍", "👩‍👩‍👧‍👦 at home", "🇫🇷🏳️‍🌈", "e\u0301 é ｆｕｌｌ"]
WHOLE = dict(
    missing="hybrid.projector.1.weight",
    llm="hybrid.llm.layers.0.mlp.down_proj.weight",
    encoder="hybrid.encoder.encoder.layer.0.output.dense.weight",
    head="classifier.weight",
)
SOME_TEXTS = {
    "empty string": [""],
    "empty string among texts": ["", *TEXTS],
    "whitespace": [" ", "\t\n", "\u00a0\u3000"],
    "control characters": CONTROL,
    "right-to-left": RIGHT_TO_LEFT,
    "emoji": EMOJI,
}
ODD_ROWS = rows(*labelled(*(text for group in SOME_TEXTS.values() for text in group), LONG))

# (name of the input, the input, door, outcome)
ROWS = [
    *(
        (name, texts(value), door, as_good_text)
        for name, value in SOME_TEXTS.items()
        for door in (*TEXT_DOORS, "encode_corpus")
    ),
    *(("100,000 words", texts([LONG, "short"]), door, cut) for door in (*TEXT_DOORS, "encode_corpus")),
    ("empty list", texts([]), "AutoModel", (IndexError, "list index out of range")),
    ("empty list", texts([]), "SentenceTransformer", nothing(0)),
    ("empty list", texts([]), "encode", nothing(0, DIMENSION)),
    ("empty list", texts([]), "pipeline", (IndexError, "list index out of range")),
    ("empty list", rows(of=[]), "train", (SystemExit, "has no rows")),
    ("empty list", rows(of=[]), "evaluate", (TaskFailed, "FAILED EmotionClassification")),
    ("empty list", texts([]), "encode_corpus", (SystemExit, "there are no rows")),
    ("None", texts(["a", None]), "AutoModel", (TypeError, "TextInputSequence")),
    ("None", texts(["a", None]), "SentenceTransformer", (ValueError, "Unsupported input type: NoneType")),
    ("None", texts(["a", None]), "encode", (TypeError, "Text 1 is not a string but NoneType")),
    ("None", texts(["a", None]), "pipeline", (ValueError, "You need to specify either `text`")),
    ("None", rows({"text": None, "label": 1}), "train", (SystemExit, "row 32: 'text' is None, not a text")),
    ("None", rows({"text": None, "label": 1}), "evaluate", (TaskFailed, "FAILED EmotionClassification")),
    ("None", texts(["a", None]), "encode_corpus", null_at(1)),
    ("None as a label", rows({"text": "a", "label": None}), "train", (SystemExit, "'label' is None, not a label")),
    ("numbers", texts([3, 4.5]), "AutoModel", (ValueError, "text input must be of type `str`")),
    ("numbers", texts([3, 4.5]), "SentenceTransformer", (ValueError, "Unsupported input type: int")),
    ("numbers", texts([3, 4.5]), "encode", (TypeError, "Text 0 is not a string but int")),
    ("numbers", texts([3, 4.5]), "pipeline", (ValueError, "text input must be of type `str`")),
    ("numbers", rows(of=[{"text": i, "label": i % 2} for i in range(9)]), "train", (SystemExit, "0, not a text")),
    ("numbers", rows(of=[{"text": i, "label": i % 2} for i in range(9)]), "evaluate", measured),
    ("numbers", texts([3, 4.5]), "encode_corpus", null_at(0, 1)),
    ("a string, not a list", texts("abc"), "encode", (TypeError, "a list of texts")),
    ("lone surrogates", texts(["a \ud800 b"]), "AutoModel", (TypeError, "TextInputSequence")),
    ("lone surrogates", texts(["a \ud800 b"]), "SentenceTransformer", (TypeError, "TextInputSequence")),
    ("lone surrogates", texts(["", "a \ud800 b"]), "encode", (ValueError, "Text 1 has a lone surrogate at 2")),
    ("lone surrogates", texts(["a \ud800 b"]), "pipeline", (TypeError, "TextInputSequence")),
    ("lone surrogates", rows({"text": "\ud800", "label": 1}), "train", (SystemExit, "or is not json")),
    ("lone surrogates", rows({"text": "\ud800", "label": 1}), "evaluate", (TaskFailed, "FAILED Emotion")),
    ("lone surrogates", texts(["", "a \ud800 b"]), "encode_corpus", null_at(1)),
    ("all odd texts at once", ODD_ROWS, "train", trained),
    ("all odd texts at once", ODD_ROWS, "evaluate", measured),
    # Data
    ("a CSV without the columns", file("a,b\n1,2\n", "x.csv"), "train", (SystemExit, "no column 'text'; it has a, b")),
    ("a CSV of nothing", file("", "x.csv"), "train", (SystemExit, "x.csv")),
    ("a CSV of its header", file("text,label\n", "x.csv"), "train", (SystemExit, "has no rows")),
    (
        "a CSV in Latin-1",
        file(b"text,label\ncaf\xe9,1\n", "x.csv"),
        "train",
        (SystemExit, "or is not csv"),
    ),
    (
        "a ragged CSV",
        file("text,label\na,1\nb,2,3,4\n", "x.csv"),
        "train",
        (SystemExit, "or is not csv"),
    ),
    (
        "half a Parquet file",
        file(b"PAR1half", "x.parquet"),
        "train",
        (SystemExit, "or is not parquet"),
    ),
    ("unknown labels", unknown_labels, "train", (SystemExit, "labels that the training texts do not have: never")),
    ("a single label", rows(of=labelled("a", "b", "c")), "train", (SystemExit, "single label")),
    ("a single label", rows(of=labelled("a", "b", "c")), "evaluate", measured),
    (
        "one label with one text",
        rows({"text": "alone", "label": 2}),
        "train",
        (SystemExit, "too few for a stratified validation share"),
    ),
    (
        "one label with one text, without validation",
        lambda case: (rows({"text": "alone", "label": 2})(case), options("--validation_share", "0")(case)),
        "train",
        trained,
    ),
    ("one label with one text", rows({"text": "alone", "label": 2}), "evaluate", measured),
    (
        "JSON lines without the column",
        corpus(b'{"other": "a"}\n'),
        "encode_corpus",
        (SystemExit, "no column 'text'; it has other"),
    ),
    ("half of JSON lines", corpus(b'{"text": "a"}\n{"te'), "encode_corpus", (SystemExit, "line 2 is not JSON")),
    ("JSON lines in Latin-1", corpus(b'{"text": "caf\xe9"}\n'), "encode_corpus", (SystemExit, "line 1 is not JSON")),
    ("half a Parquet file", corpus(b"PAR1half", "corpus.parquet"), "encode_corpus", (SystemExit, "is damaged")),
    (
        "ids of several types",
        lambda case: (
            corpus(b'{"text": "a", "id": "x"}\n{"text": "b", "id": 1}\n')(case),
            options("TMP/embeddings", "--id-column", "id")(case),
        ),
        "encode_corpus",
        (SystemExit, "'id' are not all of one type"),
    ),
    # Weights
    *(
        ("NaN in weights", weights("model", with_nan(WHOLE["llm"])), door, (ValueError, "NaN or infinity"))
        for door in TEXT_DOORS
    ),
    *(
        ("NaN in the encoder's weights", weights("model", with_nan(WHOLE["encoder"])), door, (ValueError, "NaN"))
        for door in TEXT_DOORS
    ),
    (
        "NaN in the head's weights",
        weights("model", with_nan(WHOLE["head"])),
        "pipeline",
        (ValueError, "logits contain NaN"),
    ),
    ("NaN in weights", weights("model", with_nan(WHOLE["llm"])), "evaluate", (TaskFailed, "NaN or infinity")),
    ("NaN in weights", weights("model", with_nan(WHOLE["llm"])), "encode_corpus", (SystemExit, "NaN or infinity")),
    (
        "NaN in weights",
        weights("llm", with_nan("layers.0.mlp.down_proj.weight")),
        "train",
        (SystemExit, "LLM's states contain NaN"),
    ),
    (
        "NaN in the encoder's weights",
        weights("encoder", with_nan("encoder.layer.0.output.dense.weight")),
        "train",
        (SystemExit, "training loss is NaN"),
    ),
    *(("a truncated weights file", truncated("model"), door, (OSError, "are damaged")) for door in TEXT_DOORS[:3]),
    ("a truncated weights file", truncated("model"), "pipeline", (ValueError, "are damaged")),
    ("a truncated weights file", truncated("model"), "evaluate", (SystemExit, "are damaged")),
    ("a truncated weights file", truncated("model"), "encode_corpus", (SystemExit, "are damaged")),
    ("a truncated weights file", truncated("llm"), "train", (SystemExit, "Could not load")),
    ("a truncated weights file", truncated("encoder"), "train", (SystemExit, "Could not load")),
    *(
        (
            "a missing tensor",
            weights("model", without(WHOLE["missing"])),
            door,
            (ValueError, "lacks weights.*projector"),
        )
        for door in TEXT_DOORS
    ),
    ("a missing tensor", weights("model", without(WHOLE["missing"])), "evaluate", (SystemExit, "lacks weights")),
    ("a missing tensor", weights("model", without(WHOLE["missing"])), "encode_corpus", (SystemExit, "lacks weights")),
    (
        "a missing tensor",
        weights("encoder", without("encoder.layer.0.output.dense.weight")),
        "train",
        (SystemExit, "lacks weights"),
    ),
    (
        "a missing head",
        weights("model", without(WHOLE["head"])),
        "pipeline",
        (ValueError, "lacks weights.*classifier"),
    ),
    *(
        ("a tensor of another shape", weights("model", halved(WHOLE["missing"])), door, (ValueError, "another shape"))
        for door in TEXT_DOORS
    ),
    (
        "a tensor of another shape",
        weights("model", halved(WHOLE["missing"])),
        "evaluate",
        (SystemExit, "another shape"),
    ),
    (
        "a tensor of another shape",
        weights("model", halved(WHOLE["missing"])),
        "encode_corpus",
        (SystemExit, "another shape"),
    ),
    (
        "a tensor of another shape",
        weights("llm", halved("layers.0.mlp.down_proj.weight")),
        "train",
        (SystemExit, "another shape"),
    ),
    # Configuration and tokenizer
    *(("a layer too deep", layers_in_config([99]), door, (ValueError, "layers are 1 to 7")) for door in TEXT_DOORS),
    *(
        ("a layer that was cut off", layers_in_config([5]), door, (ValueError, "first 2 blocks"))
        for door in TEXT_DOORS
    ),
    ("a layer too deep", layers_in_config([99]), "evaluate", (SystemExit, "layers are 1 to 7")),
    ("a layer too deep", layers_in_config([99]), "encode_corpus", (SystemExit, "layers are 1 to 7")),
    ("a layer too deep", options("--llm_layers", "99"), "train", (SystemExit, "layers are 1 to 7")),
    *(
        ("a missing tokenizer", missing_tokenizer("model"), door, ((OSError, ValueError), "tokenizer"))
        for door in TEXT_DOORS
    ),
    ("a missing tokenizer", missing_tokenizer("model"), "evaluate", (SystemExit, "tokenizer")),
    ("a missing tokenizer", missing_tokenizer("model"), "encode_corpus", (SystemExit, "tokenizer")),
    ("a missing tokenizer", missing_tokenizer("llm"), "train", (SystemExit, "tokenizer")),
    # The machine
    ("a cache of another model", cache_of_another_model, "train", trained_as_without_a_cache),
    ("a cache under another's name", mislabelled_cache, "train", (SystemExit, "the states of another model")),
    ("an output of another model", output_of_another_model, "encode_corpus", (SystemExit, "another model")),
    ("a full disk", full_disk(20_000), "train", (SystemExit, "File too large")),
    ("a full disk", full_disk(4_000), "evaluate", (TaskFailed, "File too large")),
    (
        "a full disk",
        full_disk(4_000, MANY_TEXTS),
        "encode_corpus",
        (SystemExit, "shard-00000000.parquet could not be written: .*File too large"),
    ),
    *(("no network", offline("model"), door, (OSError, "couldn.t connect|offline mode")) for door in TEXT_DOORS),
    ("no network", offline("model"), "evaluate", (SystemExit, "Without the Hub, use the offline pair")),
    ("no network", offline("model"), "encode_corpus", (SystemExit, "Without the Hub, use the offline pair")),
    ("no network", offline("llm"), "train", (SystemExit, "Without the Hub, use the offline pair")),
    ("not found", on_the_hub("some/missing"), "evaluate", (SystemExit, "There is no some/missing on the Hub")),
    ("not found", on_the_hub("some/missing"), "encode_corpus", (SystemExit, "There is no some/missing on the Hub")),
    ("not found", on_the_hub("some/missing", part="llm"), "train", (SystemExit, "There is no some/missing or")),
    ("gated", on_the_hub("some/gated"), "evaluate", (SystemExit, "some/gated is gated. Accept its licence")),
    ("gated", on_the_hub("some/gated"), "encode_corpus", (SystemExit, "some/gated is gated. Accept its licence")),
    ("gated", on_the_hub("some/gated", part="llm"), "train", (SystemExit, "is gated. Accept its licence")),
    (
        "a directory that cannot be made",
        options("--output_dir", "/dev/null/run"),
        "train",
        (SystemExit, "is a file. Name"),
    ),
    ("a directory that cannot be made", options("--llm_cache_dir", "/dev/null/x"), "train", (SystemExit, "/dev/null")),
    (
        "a directory that cannot be made",
        options("--results", "/dev/null/x"),
        "evaluate",
        (SystemExit, "is a file. Name"),
    ),
    ("a directory that cannot be made", options("/dev/null/x"), "encode_corpus", (SystemExit, "is a file. Name")),
]

# The inputs of which every door in the tuple has a row.
CONCERNS = {
    **dict.fromkeys([*SOME_TEXTS, "100,000 words"], (*TEXT_DOORS, "encode_corpus")),
    **dict.fromkeys(["empty list", "None", "numbers", "lone surrogates", "NaN in weights"], tuple(DOORS)),
    **dict.fromkeys(["a truncated weights file", "a missing tensor", "a tensor of another shape"], tuple(DOORS)),
    **dict.fromkeys(["a layer too deep", "a missing tokenizer", "no network"], tuple(DOORS)),
    **dict.fromkeys(["a single label", "one label with one text", "all odd texts at once"], ("train", "evaluate")),
    **dict.fromkeys(["a full disk", "not found", "gated", "a directory that cannot be made"], COMMANDS),
    **dict.fromkeys(["a CSV without the columns", "unknown labels", "a cache of another model"], ("train",)),
    **dict.fromkeys(["JSON lines without the column", "an output of another model"], ("encode_corpus",)),
}


@pytest.fixture
def case(trained_run, tiny_llm, tiny_encoder, tmp_path, request, capsys) -> Case:
    return Case(str(trained_run), tiny_llm, tiny_encoder, tmp_path, request)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[2]}: {row[0]}")
def test_bad_input(row, case):
    _, spoil, door, outcome = row
    spoil(case)
    if callable(outcome):
        outcome(case, DOORS[door](case))
    else:
        error, message = outcome
        with pytest.raises(error, match=f"(?s){message}"):
            DOORS[door](case)


def test_every_input_has_its_rows():
    rows = {(name, door) for name, _, door, _ in ROWS}
    assert not {(name, door) for name, doors in CONCERNS.items() for door in doors} - rows
    assert {door for _, door in rows} == set(DOORS)


@pytest.mark.parametrize(
    "door,disk,check",
    [
        ("train", full_disk(20_000), trained),
        ("evaluate", full_disk(4_000), measured),
        ("encode_corpus", full_disk(4_000, MANY_TEXTS), as_good_text),
    ],
)
def test_after_a_full_disk_the_same_command_succeeds(door, disk, check, case):
    """And nothing half-written bears a final name."""
    disk(case)
    with pytest.raises((SystemExit, TaskFailed)):
        DOORS[door](case)
    assert not [*case.tmp_path.rglob("EmotionClassification.json"), *case.tmp_path.rglob("shard-*")]
    case.around.clear()
    check(case, DOORS[door](case))


def test_half_a_result_is_measured_again(case):
    evaluate_door(case)
    (path,) = case.tmp_path.rglob("EmotionClassification.json")
    path.write_text(path.read_text()[:100])
    measured(case, evaluate_door(case))
