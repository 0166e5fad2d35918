import json

import pytest
from conftest import ROOT
from datasets import Dataset

from data import load_labelled_texts

ROWS = [(f"text {i}", ["no", "yes", "perhaps"][i % 3]) for i in range(30)]


def write(path, rows=ROWS, columns=("text", "label")):
    data = Dataset.from_dict({column: [row[i] for row in rows] for i, column in enumerate(columns)})
    {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[path.suffix[1:]](str(path))
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files(ending, tmp_path):
    data = load_labelled_texts(train_file=write(tmp_path / f"train.{ending}"), validation_share=0.2, seed=1)
    assert data.label_names == ["no", "perhaps", "yes"]
    assert (len(data.train), len(data.validation)) == (24, 6)
    assert sorted(data.validation["label"]) == [0, 0, 1, 1, 2, 2]  # stratified
    assert not set(data.train["text"]) & set(data.validation["text"])
    row = data.train[0]
    assert data.label_names[row["label"]] == dict(ROWS)[row["text"]]


def test_numbers_as_labels_and_an_empty_text(tmp_path):
    rows = [("a", 1), ("", 10), ("NA", 2), ("d", 1)]
    data = load_labelled_texts(train_file=write(tmp_path / "train.csv", rows), validation_share=0)
    assert data.label_names == ["1", "2", "10"]
    assert list(data.train["text"]) == ["a", "", "NA", "d"]
    assert list(data.train["label"]) == [0, 2, 1, 0]


def test_label_text_names_the_labels(tmp_path):
    rows = [("a", 1, "joy"), ("b", 0, "anger"), ("c", 1, "joy")]
    path = write(tmp_path / "train.jsonl", rows, ("text", "label", "label_text"))
    data = load_labelled_texts(train_file=path, validation_share=0)
    assert data.label_names == ["anger", "joy"] and list(data.train["label"]) == [1, 0, 1]


def test_validation_file(tmp_path):
    train = write(tmp_path / "train.csv")
    data = load_labelled_texts(train_file=train, validation_file=write(tmp_path / "validation.csv", ROWS[:4]))
    assert (len(data.train), len(data.validation)) == (30, 4)
    with pytest.raises(ValueError, match="labels that the training texts do not have: never"):
        load_labelled_texts(train_file=train, validation_file=write(tmp_path / "other.csv", [("a", "never")]))


def test_hub_layout_and_the_test_split_stays_out(tmp_path):
    repository = tmp_path / "datasets" / "me" / "mine"
    repository.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"text": f"{split} {i}", "label": i % 2}) for i in range(10)]
        (repository / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    data = load_labelled_texts(dataset="me/mine", dataset_root=str(tmp_path))
    used = [*data.train["text"], *data.validation["text"]]
    assert len(used) == 20 and not any(text.startswith("test") for text in used)
    # The report trained on the validation split alone.
    data = load_labelled_texts(
        dataset="me/mine", dataset_root=str(tmp_path), train_split="validation", validation_share=0
    )
    assert data.train["text"][0] == "validation 0" and data.validation is None
    with pytest.raises(ValueError, match="never trained on"):
        load_labelled_texts(dataset="me/mine", dataset_root=str(tmp_path), train_split="test")
    with pytest.raises(ValueError, match="no split 'other'; it has train, validation, test"):
        load_labelled_texts(dataset="me/mine", dataset_root=str(tmp_path), train_split="other")


@pytest.mark.parametrize(
    "rows,columns,message",
    [
        (ROWS, ("sentence", "label"), "no column 'text'; it has sentence, label.*--text_column"),
        ([("a", 1), ("b", 1)], ("text", "label"), "single label"),
        ([("a", 1), (None, 0)], ("text", "label"), "row 1: 'text' is None, not a text"),
        ([(3, 1), (4, 0)], ("text", "label"), "row 0: 'text' is 3, not a text"),
        ([("a", 1), ("b", 0)], ("text", "label"), "too few for a stratified validation share"),
    ],
)
def test_bad_data(rows, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_labelled_texts(train_file=write(tmp_path / "train.jsonl", rows, columns))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="exactly one source"):
        load_labelled_texts()
    with pytest.raises(ValueError, match="exactly one source"):
        load_labelled_texts(task="EmotionClassification", train_file="train.csv")
    with pytest.raises(FileNotFoundError, match="no file nowhere.csv"):
        load_labelled_texts(train_file="nowhere.csv")
    (tmp_path / "train.txt").touch()
    with pytest.raises(ValueError, match=r"must be one of \.csv"):
        load_labelled_texts(train_file=str(tmp_path / "train.txt"))


def test_no_network_points_to_the_mirror():
    for source in ({"task": "EmotionClassification"}, {"dataset": "mteb/emotion"}):
        with pytest.raises(ConnectionError, match="--dataset_root"):
            load_labelled_texts(**source)


def test_bundled_sample():
    sample = ROOT / "data" / "counterfactual_sample"
    parts = {
        name: load_labelled_texts(train_file=str(sample / f"{name}.csv"), validation_share=0)
        for name in ("train", "test")
    }
    assert {name: len(data.train) for name, data in parts.items()} == {"train": 320, "test": 120}
    for data in parts.values():
        assert data.label_names == ["plain", "counterfactual"]
        assert sum(data.train["label"]) == len(data.train) / 2
    assert not set(parts["train"].train["text"]) & set(parts["test"].train["text"])


def test_texts_per_label(tmp_path):
    path = write(tmp_path / "train.csv", ROWS + [(f"rare {i}", "seldom") for i in range(3)])
    draw = {
        (number, seed): load_labelled_texts(
            train_file=path, validation_share=0, texts_per_label=number, seed=seed
        ).train
        for number in (2, 5)
        for seed in (1, 2)
    }
    assert sorted(draw[2, 1]["label"]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(draw[5, 1]) == 3 * 5 + 3  # of the rare label there are no more
    assert set(draw[2, 1]["text"]) < set(draw[5, 1]["text"])  # a curve over sizes compares nested sets
    assert set(draw[2, 1]["text"]) != set(draw[2, 2]["text"])
    with pytest.raises(ValueError, match="at least 1"):
        load_labelled_texts(train_file=path, texts_per_label=0)
