"""Writes a trained hybrid as ONNX: `onnx/model.onnx`, and `onnx/model_qint8.onnx` with 8-bit matrix products.

    python export_onnx.py runs/mine/final
    python evaluate_mteb.py run runs/mine/final --onnx model_qint8.onnx --tasks AmazonCounterfactual

Both take `input_ids` and `attention_mask` (batch, tokens) of any size and give `last_hidden_state` (batch, tokens, dim)
and `sentence_embedding` (batch, dim), which is what `SentenceTransformer(DIR).encode` returns. onnxruntime and the
tokenizer are all that they need; `onnx_embedder.py` runs them behind a `SentenceTransformer`.
"""

import argparse
import json
import logging
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from modeling_hybrid import HybridModel
from repository import read_config, written_whole

logger = logging.getLogger(__name__)

# A protobuf file holds less than 2 GiB; the weights of larger models go into a file beside it.
LARGEST_FILE = 1_800_000_000
MAX_COSINE_DISTANCE = 1e-4
# Of different lengths, so that there is padding, and more than were in the batch that was traced.
PROBES = [
    "I wish it had pockets.",
    "The bus leaves at nine from the stop behind the station, except on Sundays and in the first week of August.",
    "Well.",
    "If only they had asked, she would have told them everything about the café and its owner.",
    "",
]


class _Embedder(nn.Module):
    """The graph that is exported: from tokens to token states and the text embedding."""

    def __init__(self, model: HybridModel, normalize: bool):
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, input_ids, attention_mask):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        embedding = output.pooler_output
        if self.normalize:
            embedding = nn.functional.normalize(embedding, dim=-1)
        return output.last_hidden_state, embedding


def main():
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="final/ of a trained hybrid")
    parser.add_argument("--no-int8", action="store_true", help="leave model_qint8.onnx out")
    args = parser.parse_args()
    try:
        export(args.directory, int8=not args.no_int8)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"export_onnx.py: {error}")


def export(directory: Path, int8: bool = True) -> Path:
    """Writes `directory`/onnx, which appears whole or not at all, and returns it.

    The LLM's blocks are written in float32 and its token embeddings in the precision in which they are stored. The
    int8 version quantises the weights of the linear layers, a scale for each output, and their inputs as they come, a
    scale for each token.

    Raises:
        ValueError: `directory` does not hold a hybrid, or the ONNX model does not compute what the torch model does.
        ImportError: the packages of `pip install '.[onnx]'` are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, which torch's exporter needs
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError(f"{error}: pip install '.[onnx]'") from error

    if not (directory / "modules.json").is_file():
        raise FileNotFoundError(f"{directory} is not what train.py leaves in final/: it has no modules.json.")
    config = read_config(directory)
    if config.model_type != HybridModel.config_class.model_type:
        raise ValueError(f"{directory} holds no hybrid but a {config.model_type}: optimum exports those.")
    model = HybridModel.from_pretrained(directory).eval()
    if model.llm.dtype == torch.bfloat16:
        model.widen_llm()  # where this machine runs bfloat16 itself, another may not
    tokenizer = AutoTokenizer.from_pretrained(directory, config=config)
    modules = json.loads((directory / "modules.json").read_text())
    embedder = _Embedder(model, any(module["type"].endswith(".Normalize") for module in modules)).eval()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())

    traced = tokenizer(PROBES[:2], padding=True, truncation=True, return_tensors="pt")
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=config.max_position_embeddings)}
    logger.info("Exporting %s: about a minute", directory)
    with _quiet():
        program = torch.onnx.export(
            embedder,
            (traced["input_ids"], traced["attention_mask"]),
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state", "sentence_embedding"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine

    with written_whole(directory / "onnx") as work:
        full, quantized = work / "model.onnx", work / "model_qint8.onnx"
        program.save(full, external_data=size > LARGEST_FILE)
        distance = _largest_distance(full, embedder, tokenizer, onnxruntime)
        if not distance <= MAX_COSINE_DISTANCE:
            raise ValueError(f"The ONNX model's embeddings are off by {distance:.1e} in cosine distance.")
        logger.info("model.onnx equals the torch model to %.1e in cosine distance", distance)
        if int8:
            scaled = work / "scaled.onnx"
            _write_scaled(full, scaled)
            with _quiet():
                quantize_dynamic(
                    scaled,
                    quantized,
                    op_types_to_quantize=["MatMul"],  # not the token embeddings, which are only looked up
                    per_channel=True,
                    # 7 bits: without VNNI units, sums of two 8-bit products overflow 16 bits.
                    reduce_range=True,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=size > LARGEST_FILE,
                )
            scaled.unlink()
            distance = _largest_distance(quantized, embedder, tokenizer, onnxruntime)
            logger.info("model_qint8.onnx is within %.1e of it", distance)
    return directory / "onnx"


def _write_scaled(path: Path, scaled: Path):
    """Writes `path` with every token that enters a product with weights divided by its largest value, and multiplied after.

    It computes the same, but 8 bits hold it: quantisation has one scale for all that enters a product, and a few tokens are
    far larger than the others ("massive activations", Sun et al. 2024, arXiv:2402.17762). In front of the second layers of
    Gemma 3 270M's MLPs they leave so little of the 8 bits that the product of a typical token is off by 20 to 56%; with a
    scale for each token by 5% at most.
    """
    import onnx
    from onnx import helper

    model = onnx.load(path, load_external_data=False)
    weights = {weight.name for weight in model.graph.initializer}
    nodes, scales = [], {}
    for node in list(model.graph.node):
        states, weight = [*node.input, "", ""][:2]
        if node.op_type != "MatMul" or weight not in weights:
            nodes.append(node)
            continue
        if states not in scales:
            scales[states] = f"{states}_scale"
            nodes += [
                helper.make_node("Abs", [states], [f"{states}_abs"]),
                helper.make_node("ReduceMax", [f"{states}_abs", "last_axis"], [f"{states}_max"]),
                helper.make_node("Max", [f"{states}_max", "smallest_scale"], [scales[states]]),
                helper.make_node("Div", [states, scales[states]], [f"{states}_scaled"]),
            ]
        product = f"{node.output[0]}_scaled"
        nodes += [
            helper.make_node("MatMul", [f"{states}_scaled", weight], [product], name=node.name),
            helper.make_node("Mul", [product, scales[states]], [node.output[0]]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        [
            helper.make_tensor("last_axis", onnx.TensorProto.INT64, [1], [-1]),
            helper.make_tensor("smallest_scale", onnx.TensorProto.FLOAT, [], [1e-6]),
        ]
    )
    onnx.save(model, scaled)


def _largest_distance(path: Path, embedder: _Embedder, tokenizer, onnxruntime) -> float:
    """The largest cosine distance of the probes' embeddings between ONNX Runtime and torch, alone and in a batch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    distances = []
    for texts in (PROBES, PROBES[:1]):
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = embedder(**inputs)[1]
        (found,) = session.run(["sentence_embedding"], {name: tensor.numpy() for name, tensor in inputs.items()})
        distances.append(1 - nn.functional.cosine_similarity(torch.from_numpy(found), expected))
    return torch.cat(distances).max().item()


@contextmanager
def _quiet():
    """Keeps torch's and ONNX Runtime's remarks on the export to themselves; errors are raised."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
