"""Runs what `export_onnx.py` wrote behind the interface of a `SentenceTransformer`.

sentence-transformers' own `backend="onnx"` needs optimum, which does not work with transformers 5 yet.
"""

import os
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from transformers import AutoTokenizer

from repository import read_config


class OnnxModule(InputModule):
    """An exported model, which goes from tokens to the text embedding by itself."""

    def __init__(self, session, tokenizer):
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.max_seq_length = tokenizer.model_max_length

    def preprocess(self, inputs, prompt=None, **kwargs):
        texts = [(prompt or "") + text for text in inputs]
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )

    def forward(self, features, **kwargs):
        inputs = {name: features[name].cpu().numpy() for name in ("input_ids", "attention_mask")}
        (embedding,) = self.session.run(["sentence_embedding"], inputs)
        return {**features, "sentence_embedding": torch.from_numpy(embedding)}

    def get_embedding_dimension(self) -> int:
        (output,) = [output for output in self.session.get_outputs() if output.name == "sentence_embedding"]
        return output.shape[-1]

    def save(self, output_path, *args, **kwargs):
        raise NotImplementedError("export_onnx.py writes ONNX models.")


def load_onnx(directory, file_name: str = "model.onnx", threads: int | None = None) -> SentenceTransformer:
    """`directory`/onnx/`file_name` as a `SentenceTransformer` on the CPU.

    Args:
        file_name: `model.onnx`, or `model_qint8.onnx`, whose matrix products have 8 bits.
        threads: of one forward pass; by default those that torch uses.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{error}: pip install '.[onnx]'") from error

    path = Path(directory, "onnx", file_name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: write it with `python export_onnx.py {os.fspath(directory)}`."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(directory, config=read_config(Path(directory)))
    return SentenceTransformer(modules=[OnnxModule(session, tokenizer)], device="cpu")
