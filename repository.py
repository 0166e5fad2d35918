"""Writes a trained hybrid as a complete Hub repository.

It loads with `AutoModel`, `AutoModelForSequenceClassification` and `SentenceTransformer`, each with
`trust_remote_code=True`, and needs nothing of this kit.
"""

import copy
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import sentence_transformers
import torch
import transformers
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoConfig

from configuration_hybrid import HybridConfig
from llm_cache import temporary_path, write_whole
from modeling_hybrid import HybridForSequenceClassification

RECORD = "training.json"
LOCAL = "local:"


def save_repository(
    directory, model, tokenizer, max_seq_length: int, classifier=None, label_names=None, normalize=False, record=None
):
    """Saves `model` (a [`HybridModel`]) to `directory`, which appears whole or not at all.

    Args:
        tokenizer: the LLM's; its chat template is left out, so that texts are not taken for chats.
        max_seq_length: where `SentenceTransformer` cuts a text, in tokens.
        classifier: the trained head, a `nn.Linear` from embedding to labels, saved in the same weights file.
        label_names: the labels in the head's order.
        normalize: whether `SentenceTransformer` returns embeddings of length 1.
        record: what is to be known of the training, as [`public_record`] returns it.
    """
    saved = model
    if classifier is not None:
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: number for number, name in enumerate(label_names)}
        # The body is shared, not copied.
        saved = HybridForSequenceClassification(config, hybrid=model)
        with torch.no_grad():
            saved.classifier.weight.copy_(classifier.weight)
            saved.classifier.bias.copy_(classifier.bias)

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    # What tokenizer and configurations keep of how they were loaded here is nobody else's business.
    for name in ("chat_template", "is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = max_seq_length
    for config in (saved.config.llm_config, saved.config.encoder_config):
        if config is not None and Path(config.name_or_path).exists():
            config.name_or_path = ""
    with written_whole(directory) as work:
        saved.save_pretrained(work)
        tokenizer.save_pretrained(work)
        _write_sentence_transformers_files(work, model.config.hidden_size, max_seq_length, normalize)
        if record is not None:
            write_json(work / RECORD, record)


def public_record(results: dict) -> dict:
    """`results` of a training without what concerns this machine alone: where its files lie."""
    record = copy.deepcopy(results)
    settings = record["settings"]
    settings.pop("dataset_root", None)
    for name in ("train_file", "validation_file", "test_file", "dataset", "llm", "encoder"):
        settings[name] = without_directory(settings.get(name))
    record["source"] = without_directory(record["source"])
    for backbone in record["backbones"].values():
        backbone["name"] = without_directory(backbone["name"])
    return record


def read_record(directory: Path) -> dict:
    """What [`save_repository`] was told of the training.

    Raises:
        FileNotFoundError: `directory` is not a finished training.
    """
    missing = [name for name in (RECORD, "config.json", "modules.json") if not (directory / name).is_file()]
    if missing or not list(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{directory} is not what train.py leaves in final/: it lacks {', '.join(missing) or 'weights'}."
        )
    return json.loads((directory / RECORD).read_text())


def read_config(directory: Path):
    """The model's configuration, read with this checkout's code and not the directory's own."""
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] == HybridConfig.model_type:
        return HybridConfig.from_pretrained(directory)
    return AutoConfig.from_pretrained(directory)


def without_directory(name: str | None) -> str | None:
    """Of a path on this machine the last part, after `local:`; any other name as it is."""
    if name is not None and Path(name).exists():
        return f"{LOCAL}{Path(name).resolve().name}"
    return name


def _write_sentence_transformers_files(
    directory: Path, embedding_dimension: int, max_seq_length: int, normalize: bool
):
    # The module names that releases before 5.4 know too; later ones map them to their new places.
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    for path, _ in modules[1:]:
        (directory / path).mkdir()
    Pooling(embedding_dimension, pooling_mode="mean").save(str(directory / "1_Pooling"))
    if normalize:
        Normalize().save(str(directory / "2_Normalize"))
    write_json(directory / "modules.json", entries)
    write_json(
        directory / "sentence_bert_config.json",
        {
            "max_seq_length": max_seq_length,
            "do_lower_case": False,
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    )
    versions = {
        "sentence_transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "pytorch": torch.__version__.split("+")[0],
    }
    write_json(
        directory / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "__version__": versions, "similarity_fn_name": "cosine"},
    )


def refuse_unwritable(directory: Path):
    """Raises an OSError if `directory` can be neither written nor made: better at the start than after hours."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{directory} cannot be written: {existing} is a file. Name another directory.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{directory} cannot be written: {existing} is read-only. Name another directory.")


def write_json(path: Path, value):
    """Writes `value` to a file that appears whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


@contextmanager
def written_whole(directory):
    """A temporary directory beside `directory` that takes its name, and its place, when the block ends without error."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    work, old = temporary_path(directory), temporary_path(directory.with_name(f"{directory.name}.old"))
    for path in (work, old):
        shutil.rmtree(path, ignore_errors=True)  # of a killed process that had this process's id
    work.mkdir()
    try:
        yield work
        if directory.exists():
            # Out of the way at once: removed in place, half of it would bear the name if we are killed meanwhile.
            os.rename(directory, old)
        os.rename(work, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
