import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TEXTS
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

import evaluate_mteb
import export_onnx
from modeling_hybrid import HybridModel
from onnx_embedder import load_onnx
from repository import save_repository

EMPTY_AND_LONG = ["", " ".join(TEXTS * 4)]


def cosine_distances(a, b):
    return 1 - torch.nn.functional.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b))


@pytest.fixture(scope="module")
def hybrid(tiny_llm, tiny_encoder) -> HybridModel:
    return HybridModel.from_backbones(tiny_llm, tiny_encoder, [1, 3], layer_pooling="max")


@pytest.fixture(scope="module")
def program(hybrid):
    """Collects the graph that torch traced: tracing is slow, so all tests share the first one."""
    trace, traced = torch.onnx.export, []

    def once(*args, **kwargs):
        if not traced:
            traced.append(trace(*args, **kwargs))
        return traced[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.onnx, "export", once)
        yield


@pytest.fixture(scope="module", params=["one file", "weights beside it"])
def exported(request, hybrid, program, llm_tokenizer, tmp_path_factory):
    """A hybrid on two layers with normalised embeddings, exported."""
    directory = tmp_path_factory.mktemp("exported") / "final"
    save_repository(directory, hybrid, llm_tokenizer, max_seq_length=48, normalize=True)
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "weights beside it":
            patched.setattr(export_onnx, "LARGEST_FILE", 1000)
        export_onnx.export(directory)
    assert (directory / "onnx/model.onnx.data").exists() == (request.param == "weights beside it")
    return directory


def test_onnx_models_compute_what_torch_does(exported):
    texts = TEXTS + EMPTY_AND_LONG
    expected = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu").encode(texts)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    model = load_onnx(exported)
    assert model.get_embedding_dimension() == 24
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(texts, batch_size=1), expected, atol=1e-5)
    int8 = load_onnx(exported, "model_qint8.onnx").encode(texts)
    assert cosine_distances(int8, expected).max() < 0.02
    assert np.abs(int8 - expected).max() > 1e-5, "nothing was quantised"


def test_int8_takes_every_linear_layer_and_a_scale_for_each_token(exported, hybrid):
    graph = onnx.load(exported / "onnx/model_qint8.onnx", load_external_data=False).graph
    layers = [module for module in hybrid.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(layers)
    # Without the rounding it computes the same.
    scaled = exported / "onnx/scaled.onnx"
    export_onnx._write_scaled(exported / "onnx/model.onnx", scaled)
    batch = dict(
        AutoTokenizer.from_pretrained(exported, trust_remote_code=True)(TEXTS, padding=True, return_tensors="np")
    )
    ours, theirs = (
        onnxruntime.InferenceSession(exported / f"onnx/{name}.onnx").run(None, batch) for name in ("scaled", "model")
    )
    scaled.unlink()
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


def test_onnxruntime_alone(exported):
    """The snippet of the README."""
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    session = onnxruntime.InferenceSession(exported / "onnx/model.onnx")
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")
    states, embeddings = session.run(None, dict(batch))
    expected = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert states.shape == (len(TEXTS), batch["input_ids"].shape[1], 24)


def test_the_files_name_no_path_of_this_machine(exported):
    for path in (exported / "onnx").iterdir():
        assert b"modeling_hybrid" not in path.read_bytes()


def test_mteb_measures_the_exported_model(exported, dataset_root, tmp_path, monkeypatch, capsys):
    for option in ([], ["--onnx", "model.onnx"]):
        task = ["--tasks", "AmazonCounterfactual", "--dataset-root", dataset_root, "--results", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["evaluate_mteb.py", "run", str(exported), *task, *option])
        with pytest.raises(SystemExit) as stopped:
            evaluate_mteb.main()
        assert stopped.value.code == 0
    torch_row, onnx_row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Amazon")]
    assert torch_row == onnx_row
    assert len(list(tmp_path.rglob("AmazonCounterfactualClassification.json"))) == 2


def test_a_bad_export_leaves_the_old_one(exported, tmp_path, monkeypatch):
    directory = shutil.copytree(exported, tmp_path / "final")
    before = (directory / "onnx/model.onnx").read_bytes()
    monkeypatch.setattr(export_onnx, "MAX_COSINE_DISTANCE", -1.0)
    with pytest.raises(ValueError, match="off by"):
        export_onnx.export(directory)
    assert (directory / "onnx/model.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_what_cannot_be_exported_or_loaded(tiny_encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no modules.json"):
        export_onnx.export(tmp_path)
    directory = tmp_path / "encoder"
    SentenceTransformer(tiny_encoder, device="cpu").save_pretrained(str(directory))
    with pytest.raises(ValueError, match="no hybrid but a roberta"):
        export_onnx.export(directory)
    with pytest.raises(FileNotFoundError, match="export_onnx.py"):
        load_onnx(directory)
