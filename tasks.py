"""mteb's classification tasks by name, from the Hub or from a local mirror of it."""

import mteb
from datasets import Dataset, DatasetDict

from data import local_dataset


def get_task(name: str, subset: str | None = None, dataset_root: str | None = None, split: str = "test"):
    """An mteb task, of its English subset where it has several languages and no other is asked for.

    Args:
        name: mteb's name; the ending `Classification` may be left out.
        subset: a language of a multilingual task, as mteb names it, e.g. `"de"`.
        dataset_root: a folder with the Hub's dataset repositories below `datasets/<owner>/<name>`, to read instead of
            the Hub. The task itself stays mteb's.
        split: the split that the task scores a model on.

    Raises:
        KeyError: mteb has no such task; the message names similar ones.
        ValueError: the task has no such subset.
        FileNotFoundError: `dataset_root` lacks the task's dataset.
    """
    try:
        task = mteb.get_task(name, eval_splits=[split])
    except KeyError:
        if name.endswith("Classification"):
            raise
        name = f"{name}Classification"
        task = mteb.get_task(name, eval_splits=[split])
    if task.metadata.is_multilingual:
        subsets = task.metadata.hf_subsets
        subset = subset or ("en" if "en" in subsets else None)
        if subset not in subsets:
            raise ValueError(f"{name} has no subset {subset!r}; it has {', '.join(sorted(subsets))}.")
        task = mteb.get_task(name, hf_subsets=[subset], eval_splits=[split])
    if dataset_root is not None:
        local = local_dataset(dataset_root, task.metadata.dataset["path"])
        task.metadata = task.metadata.model_copy(update={"dataset": {**task.metadata.dataset, **local}})
    return task


def task_splits(task):
    """The splits of a loaded task that [`get_task`] gave, those of its one subset where it is multilingual."""
    return task.dataset[task.hf_subsets[0]] if task.metadata.is_multilingual else task.dataset


class ListColumns(Dataset):
    """A `Dataset` whose columns are lists.

    Since datasets 4, a column reads its rows one at a time from Arrow. mteb walks through the labels of the training
    and the test split dozens of times per model, which took ten seconds of a sweep's every point.
    """

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return value[:] if isinstance(key, str) else value


def with_list_columns(splits: DatasetDict) -> DatasetDict:
    """`splits` with columns that are lists."""
    for split in splits.values():
        split.__class__ = ListColumns
    return splits
