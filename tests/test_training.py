"""train.py end to end on tiny backbones."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXTS
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer

import train as train_module
from llm_cache import LLMStateCache
from modeling_hybrid import HybridForSequenceClassification, HybridModel
from train import parse_arguments
from trainer import ClassificationHead, ClassificationLoss, HybridModule, supervised_contrastive_loss
from word_table import set_word_table


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> str:
    """80 sentences; the label is whether they wish."""
    generator = random.Random(0)
    words = "the lid bus river pan owner book door café street lamp coat".split()
    path = tmp_path_factory.mktemp("data") / "train.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "class"])
        for i in range(80):
            body = " ".join(generator.choices(words, k=generator.randint(2, 12)))
            writer.writerow(
                [f"I wish {body} had come." if i % 2 else f"{body} is here.", "wish" if i % 2 else "plain"]
            )
    return str(path)


@pytest.fixture(scope="module")
def options(tiny_llm, tiny_encoder, data_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("llm-states")
    return [
        *("--llm", tiny_llm, "--encoder", tiny_encoder, "--llm_layers", "2", "5", "--max_seq_length", "64"),
        *("--train_file", data_file, "--text_column", "sentence", "--label_column", "class"),
        *("--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--validation_share", "0.2"),
        *("--llm_cache_dir", str(cache)),
    ]


def command(*options):
    return [sys.executable, str(ROOT / "train.py"), *map(str, options)]


def train(*options) -> dict:
    """What `train.py` does with these options, in this process."""
    return train_module.train(*parse_arguments([str(option) for option in options]))


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory, data_file) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(*options, "--output_dir", output, "--test_file", data_file)
    return output


def test_results_and_repository(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["label_names"] == ["plain", "wish"]
    assert results["texts"] == {"train": 64, "validation": 16}
    assert 0 <= results["metrics"]["validation"]["accuracy"] <= 1
    assert results["metrics"]["test"]["accuracy"] > 0.6  # training texts: something was learned
    assert len(results["projector_fit"]["r2"]) == 2 and all(-1 < r2 < 1 for r2 in results["projector_fit"]["r2"])
    files = {str(path.relative_to(trained / "final")) for path in (trained / "final").rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "configuration_hybrid.py",
        "modeling_hybrid.py",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "training.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer_config = json.loads((trained / "final/tokenizer_config.json").read_text())
    assert not {"name_or_path", "local_files_only"} & set(tokenizer_config)
    assert AutoTokenizer.from_pretrained(trained / "final", trust_remote_code=True).chat_template is None
    config = json.loads((trained / "final/config.json").read_text())
    assert config["id2label"] == {"0": "plain", "1": "wish"}
    assert str(trained) not in json.dumps(config)
    tokenizer = AutoTokenizer.from_pretrained(trained / "final", trust_remote_code=True)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 64)


def test_llm_is_bit_identical_after_training(trained, tiny_llm):
    original = AutoModel.from_pretrained(tiny_llm).state_dict()
    weights = load_file(trained / "final/model.safetensors")
    llm = {name.removeprefix("hybrid.llm."): w for name, w in weights.items() if name.startswith("hybrid.llm.")}
    assert len(llm) > 30
    assert all(torch.equal(weight, original[name]) for name, weight in llm.items())
    encoder = {name: w for name, w in weights.items() if name.startswith("hybrid.encoder.")}
    assert encoder and not any("word_embeddings" in name for name in encoder)


def test_checkpoints_do_not_hold_the_llm(trained):
    checkpoints = list(trained.glob("checkpoint-*"))
    assert 1 <= len(checkpoints) <= 2  # the last and the best
    for checkpoint in checkpoints:
        assert not list(checkpoint.rglob("model.safetensors"))
        names = set(load_file(checkpoint / "trained.safetensors"))
        assert not any("llm." in name for name in names)
        assert any("classifier" in name for name in names) and any("projector" in name for name in names)


def test_loads_elsewhere_and_gives_the_same(trained, fresh_process):
    """AutoModel, the pipeline and SentenceTransformer, in fresh processes that do not see this checkout."""
    final = str(trained / "final")
    model = HybridForSequenceClassification.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final, trust_remote_code=True)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.hybrid(**encoded).pooler_output
        probabilities = model(**encoded).logits.softmax(-1)

    auto = f"""
import json, sys, torch
from transformers import AutoModel, AutoTokenizer, pipeline
model = AutoModel.from_pretrained({final!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({final!r}, trust_remote_code=True)
with torch.no_grad():
    embeddings = model(**tokenizer({TEXTS!r}, padding=True, return_tensors="pt")).pooler_output.tolist()
classify = pipeline("text-classification", model={final!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.") and "modeling_hybrid" not in sys.modules
print(json.dumps([embeddings, classify({TEXTS!r}, top_k=None)]))
"""
    embeddings, predictions = json.loads(fresh_process(auto).splitlines()[-1])
    torch.testing.assert_close(torch.tensor(embeddings), expected, atol=1e-5, rtol=1e-5)
    for row, prediction in zip(probabilities, predictions):
        scores = {entry["label"]: entry["score"] for entry in prediction}
        assert [scores["plain"], scores["wish"]] == pytest.approx(row.tolist(), abs=1e-5)

    sentence_transformer = f"""
import json, sys
from sentence_transformers import SentenceTransformer
if __name__ == "__main__":
    model = SentenceTransformer({final!r}, trust_remote_code=True, device="cpu")
    print(json.dumps(model.encode({TEXTS!r}).tolist()))
"""
    embeddings = json.loads(fresh_process(sentence_transformer).splitlines()[-1])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(torch.tensor(embeddings), expected, atol=1e-5, rtol=1e-5)


def test_multi_process_encode_equals_single(trained, tmp_path):
    script = tmp_path / "encode.py"  # spawned workers import their main module
    script.write_text(f"""
import numpy
from sentence_transformers import SentenceTransformer
if __name__ == "__main__":
    model = SentenceTransformer({str(trained / "final")!r}, trust_remote_code=True, device="cpu")
    texts = {TEXTS!r} * 4
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    several = model.encode(texts, pool=pool, chunk_size=5)
    model.stop_multi_process_pool(pool)
    numpy.testing.assert_allclose(several, model.encode(texts), atol=1e-5)
    print("equal")
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert "equal" in done.stdout, done.stderr


def test_normalized_embeddings(options, tmp_path):
    for name, option in (("default", []), ("raw", ["--no_normalize_embeddings"])):
        train(*options, "--output_dir", tmp_path / name, "--max_steps", "1", *option)
        model = SentenceTransformer(str(tmp_path / name / "final"), trust_remote_code=True)
        lengths = torch.tensor(model.encode(TEXTS)).norm(dim=-1).tolist()
        of_one = lengths == pytest.approx([1.0] * len(TEXTS), abs=1e-5)
        assert of_one == (name == "default")


def test_cached_and_uncached_steps_have_the_same_loss(tiny_llm, tiny_encoder, tmp_path):
    hybrid = HybridModel.from_backbones(tiny_llm, tiny_encoder, llm_layers=[2, 5])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    cache = LLMStateCache(tmp_path, {}, [2, 5])
    cache.fill(hybrid, tokenizer, TEXTS, max_length=32)
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0])
    head = ClassificationHead(24, 2)
    losses, gradients = [], []
    for states in (cache, None):
        first = HybridModule(hybrid, tokenizer, 32, cache=states)
        model = SentenceTransformer(modules=[first, Pooling(24, pooling_mode="mean"), head], device="cpu")
        model.zero_grad()
        model.train()
        features = model.preprocess(TEXTS)
        assert ("llm_hidden_states" in features) == (states is not None)
        torch.manual_seed(0)  # the same dropout
        parts = ClassificationLoss(model, contrastive_weight=1.0, temperature=0.1)([features], labels)
        loss = sum(parts.values())
        loss.backward()
        losses.append(loss.item())
        gradients.append(hybrid.projector[-1].weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_supervised_contrastive_loss_against_its_formula():
    torch.manual_seed(0)
    embeddings, labels, temperature = torch.randn(6, 4), torch.tensor([0, 1, 0, 2, 1, 0]), 0.3
    z = torch.nn.functional.normalize(embeddings, dim=-1)
    terms = []
    for i in range(6):
        positives = [p for p in range(6) if p != i and labels[p] == labels[i]]
        if positives:
            denominator = sum(torch.exp(z[i] @ z[a] / temperature) for a in range(6) if a != i)
            terms.append(
                -sum(torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives) / len(positives)
            )
    assert len(terms) == 5  # the one text of label 2 has no positive
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(supervised_contrastive_loss(embeddings, labels, temperature), expected)
    assert supervised_contrastive_loss(embeddings, torch.arange(6), temperature) == 0


@pytest.mark.parametrize("read_words", [False, True])
def test_two_views_of_a_text(read_words, tiny_llm, tiny_encoder):
    """Two passes with other layers left out, or, where the encoder reads words too, the two readings."""
    options = {"layer_dropout": 0.0, "read_words": True} if read_words else {"layer_dropout": 0.5}
    hybrid = HybridModel.from_backbones(tiny_llm, tiny_encoder, llm_layers=[2, 5], layer_pooling="concat", **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    if read_words:
        set_word_table(hybrid, tokenizer, tiny_encoder)
        hybrid.encoder.apply(
            lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None
        )
    first = HybridModule(hybrid, tokenizer, 32)
    head = ClassificationHead(24, 2)
    model = SentenceTransformer(modules=[first, Pooling(24, pooling_mode="mean"), head], device="cpu").train()
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0])
    features = model.preprocess(TEXTS)
    loss = ClassificationLoss(model, contrastive_weight=1.0, temperature=0.1, consistency_weight=2.0)
    torch.manual_seed(0)
    losses = loss([features], labels)
    torch.manual_seed(0)
    if read_words:
        pooled = hybrid(**features, separate_readings=True).pooler_output.chunk(2)
        views = [head({"sentence_embedding": embedding}) for embedding in pooled]
        torch.testing.assert_close(sum(pooled) / 2, model(dict(features))["sentence_embedding"])
    else:
        views = [model(dict(features)) for _ in range(2)]
    logits = [view["logits"] for view in views]
    assert not torch.allclose(*logits)
    p, q = (view.softmax(-1) for view in logits)
    divergence = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean() / 2
    torch.testing.assert_close(losses["consistency"], 2.0 * divergence)
    embeddings = torch.cat([view["sentence_embedding"] for view in views])
    contrastive = supervised_contrastive_loss(embeddings, labels.repeat(2), 0.1)
    torch.testing.assert_close(losses["supervised_contrastive"], contrastive)
    cross_entropy = sum(torch.nn.functional.cross_entropy(view, labels) for view in logits) / 2
    torch.testing.assert_close(losses["cross_entropy"], cross_entropy)


def metrics(output):
    return json.loads((output / "results.json").read_text())["metrics"]


def test_killed_in_the_middle_of_an_epoch_ends_like_an_undisturbed_run(options, trained, tmp_path, data_file):
    output = tmp_path / "run"
    arguments = command(*options, "--output_dir", output, "--test_file", data_file)
    slow = [
        arguments[0],
        "-c",
        f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import trainer, train
forward = trainer.ClassificationLoss.forward
def slow(self, *args):
    time.sleep(0.3)
    return forward(self, *args)
trainer.ClassificationLoss.forward = slow
sys.argv = {arguments[1:]!r}
train.main()
""",
    ]
    process = subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(output.glob("checkpoint-8/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.8)  # a few steps into the second of three epochs of eight steps
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "results.json").exists() and not (output / "final").exists()
    assert not list(output.glob("checkpoint-16"))
    (output / "checkpoint-12").mkdir()  # as if killed while it wrote one
    (output / "checkpoint-12" / "trainer_state.json").write_text('{"global_st')
    resumed = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0 and "Going on from" in resumed.stderr, resumed.stderr
    assert metrics(output) == metrics(trained)
    ours, theirs = (load_file(path / "final/model.safetensors") for path in (output, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(options, trained, data_file):
    before = os.stat(trained / "final/model.safetensors").st_mtime_ns
    results = train(*options, "--output_dir", trained, "--test_file", data_file)
    assert results["metrics"] == metrics(trained)
    assert os.stat(trained / "final/model.safetensors").st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        train(*options, "--output_dir", trained, "--test_file", data_file, "--seed", "7")


@pytest.mark.parametrize("baseline", ["llm", "encoder"])
def test_baselines(baseline, options, tmp_path, fresh_process):
    left_out = "--encoder" if baseline == "llm" else "--llm"
    train(*options, left_out, "none", "--output_dir", tmp_path / "run")
    remote_code = baseline == "llm"
    code = f"""
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "run/final")!r}, trust_remote_code={remote_code})
print(model.encode({TEXTS!r}).shape)
"""
    assert fresh_process(code).strip() == str((len(TEXTS), 32 if baseline == "llm" else 24))


def test_without_validation_the_last_checkpoint_counts(options, tmp_path):
    train(*options, "--output_dir", tmp_path / "run", "--validation_share", "0", "--num_train_epochs", "1")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["metrics"] == {} and results["texts"] == {"train": 80, "validation": 0}


def test_arguments_from_a_file_and_from_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("llm: none\nlearning_rate: 1e-5\nllm_layers: [3, 4]\ntask: EmotionClassification\n")
    model_args, data_args, args = parse_arguments([str(path), "--seed", "3", "--llm-layers", "5"])
    assert (model_args.llm, args.learning_rate, model_args.llm_layers) == ("none", 1e-5, [5])
    assert (data_args.task, args.seed, args.head_learning_rate) == ("EmotionClassification", 3, 1e-3)
    path.write_text("learning_rat: 1e-5\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(path)])


def test_every_configuration_parses():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        _, data_args, _ = parse_arguments([str(path)])
        assert data_args.task or data_args.train_file


@pytest.mark.parametrize(
    "wrong,message",
    [
        (["--llm", "none", "--encoder", "none"], "no model"),
        (["--train_split", "test"], "never trained on"),
        (["--label_column", "nope"], "no column 'nope'; it has sentence, class"),
        (["--llm_layers", "8"], "layers are 1 to 7"),
        (["--fp16"], "float16"),
        (["--train_file", "missing.csv"], "no file missing.csv"),
        (["--projector_init", "magic"], "ridge, random"),
        (["--llm_cache_dtype", "int8"], "float32, bfloat16"),
        (["--llm", "/no/such/model"], "offline pair"),
    ],
)
def test_mistakes_end_in_one_clear_line(wrong, message, options, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *options, "--output_dir", str(tmp_path / "run"), *wrong])
    with pytest.raises(SystemExit) as stopped:
        train_module.main()
    assert str(stopped.value).startswith("train.py: ") and message in str(stopped.value)
    assert not (tmp_path / "run").exists()  # so that the corrected command may use it
