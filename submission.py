"""What the MTEB leaderboard asks for: the results of a published model, and its `ModelMeta` for mteb's registry.

mteb takes two pull requests: one with the file of the `ModelMeta` to mteb itself, below
`mteb/models/model_implementations/`, and one with the results folder to its results repository.
"""

import json
import runpy
import shutil
from pathlib import Path
from typing import get_args

import mteb
from huggingface_hub import HfApi, ModelCard
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_meta import ScoringFunction
from mteb.results import TaskResult
from mteb.types import Licenses
from pydantic import ValidationError

from llm_cache import write_whole
from model_card import count_parameters, hub_dataset, hub_ids, languages, max_tokens
from repository import read_config, read_record

FILE = '''"""For mteb/models/model_implementations/, written by hybrid-embedder."""

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

{variable} = ModelMeta(
    loader=SentenceTransformerEncoderWrapper,
{fields}
)
'''


def write_submission(
    repo_id: str,
    results: str,
    output: str,
    api: HfApi,
    revision: str | None = None,
    code: str | None = None,
    training_datasets: list[str] | None = None,
    accept_mirror: bool = False,
) -> tuple[ModelMeta, list[Path]]:
    """Writes `output/results/<owner>__<name>/<commit>/` and `output/<name>.py`, and reads both with mteb's own loaders.

    Args:
        repo_id: a model that this kit published.
        results: where `evaluate_mteb.py run <repo_id>` kept its scores.
        revision: the commit that was measured; by default the newest.
        code: address of the public training code.
        training_datasets: mteb's names of what it was trained on, where the training record cannot say (own files).
        accept_mirror: take scores that were measured on a local copy of the datasets.

    Raises:
        FileNotFoundError: there are no results of that commit.
        ValueError: the model is not public, was trained on test data or measured on a local copy; or mteb refuses a
            field.
    """
    info = api.model_info(repo_id, revision=revision)
    if info.private or info.gated:
        raise ValueError(f"{repo_id} is private or gated; the leaderboard takes models that everybody can load.")
    directory = Path(api.snapshot_download(repo_id, revision=info.sha))
    meta = model_meta(directory, repo_id, info.sha, info.last_modified, code, training_datasets)

    source = Path(results) / "results" / meta.model_name_as_path() / info.sha
    paths = [path for path in sorted(source.glob("*.json")) if path.name != "model_meta.json"]
    if not paths:
        measured = sorted(path.name for path in source.parent.glob("*")) if source.parent.is_dir() else []
        others = f" It has those of {', '.join(measured)}: choose one with --revision." if measured else ""
        raise FileNotFoundError(
            f"{results} has no scores of {repo_id} at {info.sha}: `evaluate_mteb.py run {repo_id} --tasks ...` makes "
            f"them.{others}"
        )
    output = Path(output)
    cache = mteb.ResultCache(output)
    for path in paths:
        values = json.loads(path.read_text())
        # A note of ours, which mteb's repository does not know.
        if values.pop("dataset_source", None) and not accept_mirror:
            raise ValueError(
                f"{path.stem} was measured on a local copy of its dataset, and mteb names the Hub's: measure it without "
                "--dataset-root, or vouch for the copy with --accept-mirror."
            )
        cache.save_to_cache(TaskResult.from_dict(values), meta)
    if (source / "run_settings.jsonl").exists():
        shutil.copy(source / "run_settings.jsonl", output / "results" / meta.model_name_as_path() / info.sha)
    variable = "".join(c if c.isalnum() else "_" for c in repo_id.split("/")[-1]).lower()
    variable = f"model_{variable}" if variable[0].isdigit() else variable
    file = output / f"{variable}.py"
    write_whole(file, lambda temporary: temporary.write_text(_python(meta, variable)))

    loaded = cache.load_results(models=[meta], include_remote=False)
    found = {result.task_name for model in loaded.model_results for result in model.task_results}
    if found != {path.stem for path in paths}:
        raise ValueError(f"mteb reads the tasks {sorted(found)} from {output}, not {[path.stem for path in paths]}.")
    if runpy.run_path(str(file))[variable].to_dict() != meta.to_dict():
        raise ValueError(f"{file} does not describe the model as it was to.")
    return meta, [file, *sorted((output / "results" / meta.model_name_as_path() / info.sha).iterdir())]


def model_meta(directory: Path, repo_id: str, revision: str, released, code=None, training_datasets=None) -> ModelMeta:
    """mteb's description of the model in `directory`, from its files and its training record.

    Raises:
        ValueError: the record names a test split as training data, or mteb refuses a field.
    """
    record, config = read_record(directory), read_config(directory)
    refuse_test_data(record)
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    card = ModelCard.load(directory / "README.md").data
    parameters, embedding_parameters = count_parameters(directory)
    try:
        return ModelMeta(
            loader=SentenceTransformerEncoderWrapper,
            loader_kwargs={"trust_remote_code": True} if "llm" in record["backbones"] else {},
            name=repo_id,
            revision=revision,
            release_date=released.date().isoformat(),
            languages=languages(record),
            n_parameters=parameters,
            n_embedding_parameters=embedding_parameters,
            memory_usage_mb=round(weights / 1024**2),
            max_tokens=max_tokens(directory),
            embed_dim=config.hidden_size,
            license=card.license if card.license in get_args(Licenses) else card.license_link,
            open_weights=True,
            public_training_code=code,
            public_training_data=training_data_address(record),
            framework=["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
            reference=f"https://huggingface.co/{repo_id}",
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=known_training_datasets(record, training_datasets),
            adapted_from=hub_ids(record).get("encoder") or hub_ids(record).get("llm"),
        )
    except ValidationError as error:
        raise ValueError(f"mteb does not take this description of {repo_id}: {error}") from error


def refuse_test_data(record: dict):
    """Raises a ValueError if the model was trained on a split that mteb measures models on."""
    split, task = record["settings"]["train_split"], record["settings"]["task"]
    measured = mteb.get_task(record["source"]).metadata.eval_splits if task else ["test"]
    if split in measured or "test" in split:
        raise ValueError(
            f"The model was trained on the split {split!r} of {record['source']}, and mteb measures models on "
            f"{', '.join(measured)}: it has no place on the leaderboard."
        )


def known_training_datasets(record: dict, named: list[str] | None = None) -> set[str] | None:
    """Under mteb's names, what the model and, as far as mteb knows, its backbones were trained on; None if unknown."""
    settings = record["settings"]
    for name in named or []:
        mteb.get_task(name)  # KeyError, with similar names, if mteb has no such task
    datasets = set(named or [])
    if settings["task"]:
        datasets.add(record["source"])
    elif settings["dataset"]:
        tasks = [task.metadata for task in mteb.get_tasks(exclude_superseded=False)]
        datasets |= {task.name for task in tasks if task.dataset["path"] == settings["dataset"]}
    bases = hub_ids(record)
    # Files of the user's own, a dataset that mteb does not name (perhaps a copy of one that it does), or a checkpoint of
    # unknown origin: who publishes has to say.
    if not datasets or (named is None and len(bases) < len(record["backbones"])):
        return None
    for name in bases.values():
        try:
            datasets |= mteb.get_model_meta(name, fetch_from_hf=False).get_training_datasets() or set()
        except KeyError:
            continue  # not in mteb's registry, as LLMs are not
    return datasets


def training_data_address(record: dict) -> str | bool:
    """The address of the training texts on the Hub; False where they are the user's own files."""
    path = hub_dataset(record)
    return f"https://huggingface.co/datasets/{path}" if path else False


def _python(meta: ModelMeta, variable: str) -> str:
    lines = []
    for name in ModelMeta.model_fields:
        if name == "loader" or name not in meta.model_fields_set:
            continue
        value = getattr(meta, name)
        if name == "similarity_fn_name":
            text = f"ScoringFunction.{ScoringFunction(value).name}"
        elif isinstance(value, set):
            text = "{" + ", ".join(map(repr, sorted(value))) + "}" if value else "set()"
        else:
            text = repr(value)
        lines.append(f"    {name}={text},")
    return FILE.format(variable=variable, fields="\n".join(lines))
