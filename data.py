"""Labelled texts for training: an MTEB task's train split, a Hub dataset, or a file with text and label columns."""

import hashlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError

_FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class LabelledTexts:
    """`train` and `validation` (None without one) have the columns `text` and `label`, a number from 0 that counts in
    `label_names`; `source` says where they come from. `unlabelled` are the texts of all training data: those of `train`,
    and with `texts_per_label` the others too."""

    train: Dataset
    validation: Dataset | None
    label_names: list[str]
    source: str
    unlabelled: list[str]


def load_labelled_texts(
    task: str | None = None,
    task_subset: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_root: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    train_split: str = "train",
    validation_share: float = 0.1,
    texts_per_label: int | None = None,
    seed: int = 42,
) -> LabelledTexts:
    """Loads exactly one of `task`, `dataset` and `train_file`.

    The validation texts are the data's own validation split or `validation_file`, else a stratified share of the
    training texts; with `validation_share=0` there are none. A test split is never used. With `texts_per_label`, only so
    many training texts of each label are kept, drawn with `seed`, or all where there are fewer.

    Raises:
        ValueError: the data lack a split or a column, hold something that is not a text, or have fewer than two labels;
            `texts_per_label` is below 1.
        FileNotFoundError: a file does not exist.
    """
    if sum(source is not None for source in (task, dataset, train_file)) != 1:
        raise ValueError("Name exactly one source of training texts: --task, --dataset or --train_file.")
    if "test" in train_split:
        raise ValueError(f"--train_split {train_split}: test data measure a model and are never trained on.")
    if task is not None:
        from tasks import get_task, task_splits  # mteb takes seconds to import

        mteb_task = get_task(task, task_subset, dataset_root)
        with _explained_connection_errors():
            mteb_task.load_data()
        splits = task_splits(mteb_task)
        text_column, label_column = mteb_task.input_column_name, mteb_task.label_column_name
        source = mteb_task.metadata.name
    elif dataset is not None:
        local = {"path": dataset} if dataset_root is None else local_dataset(dataset_root, dataset)
        with _explained_connection_errors():
            splits = load_dataset(name=dataset_config, **local)
        source = dataset
    else:
        files = {"train": train_file, **({"validation": validation_file} if validation_file else {})}
        splits = DatasetDict({name: _load_file(path) for name, path in files.items()})
        source = train_file

    if train_split not in splits:
        raise ValueError(f"{source} has no split {train_split!r}; it has {', '.join(splits)}.")
    label_names = _label_names(splits[train_split], text_column, label_column, source)
    train = _select(splits[train_split], text_column, label_column, label_names, source)
    validation = None
    if validation_share > 0:
        own = next((name for name in ("validation", "dev") if name in splits and name != train_split), None)
        if own is not None:
            validation = _select(splits[own], text_column, label_column, label_names, f"{source} ({own})")
        else:
            train, validation = _split(train, len(label_names), validation_share, seed)
    unlabelled = list(train["text"])
    if texts_per_label is not None:
        train = _draw(train, texts_per_label, seed)
    return LabelledTexts(train, validation, label_names, source, unlabelled)


def local_dataset(dataset_root: str, repository: str) -> dict[str, str]:
    """`path` and `cache_dir` for `datasets.load_dataset` to read the mirror of a dataset repository.

    `datasets` names its cache of a local directory that configures its splits in a README for the directory's last name
    alone, and would answer with the rows of another mirror, or of an earlier state of this one. So each state of each
    mirror has a cache of its own.

    Raises:
        FileNotFoundError: the mirror lacks the repository.
    """
    path = Path(dataset_root).resolve() / "datasets" / repository
    if not path.is_dir():
        raise FileNotFoundError(f"{dataset_root} has no {repository}: {path} is missing.")
    files = sorted(
        (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()
    )
    state = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    return {"path": str(path), "cache_dir": str(Path(HF_DATASETS_CACHE) / f"local-{state}")}


@contextmanager
def _explained_connection_errors():
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"{error}. Without the Hub, read a local mirror of it: --dataset_root DIR.") from error


def _load_file(path: str) -> Dataset:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    file_format = _FILE_FORMATS.get(Path(path).suffix)
    if file_format is None:
        raise ValueError(f"{path}: the ending must be one of {', '.join(_FILE_FORMATS)}.")
    options = {"delimiter": "\t"} if path.endswith(".tsv") else {}
    # An empty text is a text, not a missing value.
    options |= {"keep_default_na": False} if file_format == "csv" else {}
    try:
        return load_dataset(file_format, data_files=path, split="train", **options)
    except (DatasetsError, ValueError, StopIteration) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path} has no rows, or is not {file_format} in UTF-8 ({reason}).") from error


def _label_names(data: Dataset, text_column: str, label_column: str, source: str) -> list[str]:
    """The labels in order; each is named by the column `label_text` (as mteb's datasets have it) where there is one."""
    if not len(data):
        raise ValueError(f"{source} has no rows.")
    for column in (text_column, label_column):
        if column not in data.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; it has {', '.join(data.column_names)}. "
                "Name the columns with --text_column and --label_column."
            )
    for row, label in enumerate(data[label_column][:]):
        if not isinstance(label, (str, int, float)) or label != label:
            raise ValueError(f"{source}, row {row}: {label_column!r} is {label!r}, not a label.")
    feature = data.features[label_column]
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif "label_text" in data.column_names:
        pairs = zip(data[label_column], data["label_text"])
        names = [str(name) for _, name in sorted({label: name for label, name in pairs}.items())]
    else:
        names = [str(label) for label in sorted(set(data[label_column]))]
    if len(names) < 2:
        raise ValueError(f"{source} has the single label {names}: a classifier needs at least two.")
    return names


def _select(data: Dataset, text_column: str, label_column: str, label_names: list[str], source: str) -> Dataset:
    """The columns `text` and `label`, the labels numbered as in `label_names`."""
    numbers = {name: number for number, name in enumerate(label_names)}
    feature = data.features[label_column]
    if isinstance(feature, ClassLabel):
        names = [feature.int2str(label) for label in data[label_column]]
    else:
        names = [str(name) for name in data["label_text" if "label_text" in data.column_names else label_column]]
    unknown = sorted(set(names) - set(numbers))
    if unknown:
        raise ValueError(f"{source} has labels that the training texts do not have: {', '.join(unknown[:5])}.")
    texts = data[text_column]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{source}, row {row}: {text_column!r} is {text!r}, not a text.")
    return Dataset.from_dict({"text": list(texts), "label": [numbers[name] for name in names]})


def _split(train: Dataset, num_labels: int, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Takes `share` of the texts of each label, so a rare label stays in the training texts."""
    data = train.cast_column("label", ClassLabel(num_classes=num_labels))
    try:
        parts = data.train_test_split(share, seed=seed, stratify_by_column="label")
    except ValueError as error:
        raise ValueError(
            f"The training texts are too few for a stratified validation share of {share} ({error}). "
            "Give a validation file, or train without one: --validation_share 0."
        ) from error
    return tuple(Dataset.from_dict(part.to_dict()) for part in (parts["train"], parts["test"]))


def _draw(train: Dataset, texts_per_label: int, seed: int) -> Dataset:
    """`texts_per_label` random texts of each label: with the same seed, more of them contain fewer."""
    if texts_per_label < 1:
        raise ValueError(f"--texts_per_label {texts_per_label}: it must be at least 1.")
    shuffled = train.shuffle(seed=seed)
    rows, drawn = [], Counter()
    for row, label in enumerate(shuffled["label"][:]):
        if drawn[label] < texts_per_label:
            drawn[label] += 1
            rows.append(row)
    return Dataset.from_dict(shuffled[rows])
