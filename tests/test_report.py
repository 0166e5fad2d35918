import json

import numpy as np
import pytest
import scipy.stats

import report
from report import mean_and_spread, read_points, write_report


@pytest.fixture
def results(tmp_path):
    """Points with known scores: accuracy of layer k is k / 10 for the LLM, k / 10 + 0.1 and 0.3 for the hybrid's seeds."""
    directory = tmp_path / "results/sweep/AmazonCounterfactualClassification/tuned/validation"
    directory.mkdir(parents=True)

    def write(kind, accuracy, seed=1, layers=(), pooling="mean", head=None):
        point = {
            "task": "AmazonCounterfactualClassification", "recipe": "tuned", "train_split": "validation", "kind": kind,
            "seed": seed, "layers": list(layers), "layer_pooling": pooling, "backbones": {"llm": "L", "encoder": "E"},
            "accuracy": accuracy, "f1": accuracy - 0.05, "seconds": 1.0,
            "experiments": [{"accuracy": accuracy + d, "f1": accuracy - 0.05 + d} for d in (-0.01, 0.01)],
        }  # fmt: skip
        if head is not None:
            point["head"] = {"accuracy": head, "f1": head}
        name = f"{kind}-{'-'.join(map(str, layers))}-{pooling}-{seed}.json"
        (directory / name).write_text(json.dumps(point))

    for layer in (1, 2, 3):
        write("llm", layer / 10, layers=[layer])
        for seed, more in ((1, 0.1), (2, 0.3)):
            write("hybrid", layer / 10 + more, seed=seed, layers=[layer], head=0.9)
    write("encoder", 0.55, head=0.8)
    write("encoder-untrained", 0.25)
    write("hybrid", 0.45, layers=[1, 3], pooling="max", head=0.7)
    published = tmp_path / "results/published"
    published.mkdir()
    (published / "AmazonCounterfactualClassification.csv").write_text("model,accuracy,source\nOther,0.95,here\n")
    rows = "AmazonCounterfactualClassification,hybrid,4,mean,0.5,0.4\nEmotionClassification,hybrid,5,mean,0.1,0.1\n"
    (tmp_path / "results/report-2024.csv").write_text("task,kind,layers,layer_pooling,accuracy,f1\n" + rows)
    return tmp_path / "results/sweep"


def test_spread_is_over_seeds_or_else_over_experiments(results):
    (points,) = read_points(results).values()
    assert mean_and_spread(points["hybrid", (2,), "mean"], "accuracy") == pytest.approx(
        (0.4, np.std([0.3, 0.5], ddof=1))
    )
    assert mean_and_spread(points["llm", (2,), "mean"], "f1") == pytest.approx((0.15, np.std([-0.01, 0.01], ddof=1)))


def test_figures_show_the_results(results, tmp_path, monkeypatch):
    figures = {}
    save = report.save
    monkeypatch.setattr(
        report, "save", lambda figure, path, *a: figures.update({path.name: figure.axes[0]}) or save(figure, path)
    )
    written = write_report(results, tmp_path / "report")
    assert all(path.stat().st_size > 0 for path in written)
    assert {path.suffix for path in written} == {".png", ".svg", ".md"}

    axes = figures["AmazonCounterfactualClassification-tuned-validation-accuracy"]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["LLM only"], [(1, 0.1), (2, 0.2), (3, 0.3)])
    np.testing.assert_allclose(lines["hybrid"], [(1, 0.3), (2, 0.4), (3, 0.5)])
    assert set(lines["encoder only, fine-tuned"][:, 1]) == {0.55}
    assert set(lines["encoder only, untrained"][:, 1]) == {0.25}
    assert len(axes.collections) == 2  # the shaded spreads
    assert axes.get_xlabel() and axes.get_ylabel() == "accuracy"

    rank = figures["AmazonCounterfactualClassification-rank"]
    widths = [bar.get_width() for bar in rank.patches]
    assert widths == sorted(widths) and max(widths) == 0.95
    names = dict(zip((label.get_text() for label in rank.get_yticklabels()), widths))
    assert names["hybrid, validation split (ours)"] == pytest.approx(0.5)


def test_tables(results, tmp_path):
    write_report(results, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "| hybrid, layer 3 | 0.5000 ± 0.1414 (0.9000) | 0.4500 ± 0.1414 (0.9000) |" in text
    assert "| hybrid, max: 1, 3 | 0.4500 ± 0.0141 (0.7000) | 0.4000 ± 0.0141 (0.7000) |" in text
    assert "L and E; seeds 1, 2." in text
    assert "| accuracy / F1 (layers) | recipe `tuned` | the report of 2024 |" in text
    assert "| LLM only, best layer | 0.3000 / 0.2500 (3) |  |" in text
    assert "| encoder only, fine-tuned | 0.5500 / 0.5000 |  |" in text
    assert "| hybrid, best layer | 0.5000 / 0.4500 (3) | 0.5000 / 0.4000 (4) |" in text
    assert "| hybrid, max of several layers | 0.4500 / 0.4000 (1, 3) |  |" in text


def test_rank_among_mtebs_published_results(results, tmp_path, monkeypatch):
    """From a folder as mteb downloads it, in place of the CSV."""
    for number in range(20):
        directory = tmp_path / f"mteb/remote/results/some__model{number}/0123"
        directory.mkdir(parents=True)
        scores = {"main_score": number / 20, "accuracy": number / 20, "hf_subset": "en", "languages": ["eng-Latn"]}
        german = {**scores, "accuracy": 1.0, "hf_subset": "de", "languages": ["deu-Latn"]}
        result = {
            "dataset_revision": "x",
            "task_name": "AmazonCounterfactualClassification",
            "mteb_version": "2.26.24",
            "evaluation_time": 1.0,
            "kg_co2_emissions": None,
            "scores": {"test": [german, scores]},
        }
        (directory / "AmazonCounterfactualClassification.json").write_text(json.dumps(result))
    figures = {}
    monkeypatch.setattr(report, "save", lambda figure, path, *a: figures.update({path.name: figure.axes[0]}) or [])
    write_report(results, tmp_path / "report", tmp_path / "mteb")
    names = [label.get_text() for label in figures["AmazonCounterfactualClassification-rank"].get_yticklabels()]
    assert "some/model19" in names and "some/model0" not in names and "Other" not in names
    assert len(names) == report.RANKED + 4
    with pytest.raises(FileNotFoundError, match="download_from_remote"):
        write_report(results, tmp_path / "report", tmp_path / "empty")


def test_the_same_results_give_the_same_report(results, tmp_path):
    first, second = (write_report(results, tmp_path / name) for name in ("one", "two"))
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second))


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="evaluate_mteb.py sweep"):
        write_report(tmp_path, tmp_path / "report")


@pytest.fixture
def comparable(tmp_path):
    """Three models with five seeds on 40 texts, on all training texts and on eight a label: the hybrid is right on texts
    that the encoder is not, and never the other way round."""
    for training_set, texts_per_label, lead in (("train", None, 8), ("train-8", 8, 0)):
        directory = tmp_path / "results/sweep/EmotionClassification/tuned" / training_set
        directory.mkdir(parents=True)
        for kind, right, seeds in (("hybrid", 28 + lead, 5), ("encoder", 28, 5), ("llm", 10, 1)):
            for seed in range(1, seeds + 1):
                extra = seed % 2
                digits = "a" * (right + extra) + "0" * (40 - right - extra)
                point = {
                    "task": "EmotionClassification", "recipe": "tuned", "train_split": "train",
                    "texts_per_label": texts_per_label, "kind": kind, "seed": seed,
                    "layers": [] if kind == "encoder" else [2], "layer_pooling": "mean",
                    "backbones": {"llm": "L", "encoder": "E"}, "accuracy": (right + extra) / 40, "f1": 0.5, "seconds": 1.0,
                    "experiments": [{"accuracy": 0.5, "f1": 0.5}] * 10, "correct": digits,
                    "head": {"accuracy": 0.5, "f1": 0.5, "correct": digits.replace("a", "1")},
                }  # fmt: skip
                (directory / f"{kind}-{seed}.json").write_text(json.dumps(point))
    one = {"layers": [2], "layer_pooling": "mean"}
    chosen = {"hybrid": one, "llm": one}
    (tmp_path / "results/chosen.json").write_text(
        json.dumps({"EmotionClassification": {"train": chosen, "train-8": chosen, "train-64": chosen}})
    )
    return tmp_path / "results"


def test_the_first_table_compares_the_hybrid_with_its_parts(comparable, tmp_path):
    written = write_report(comparable / "sweep", tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert text.index("# The hybrid and its parts") < text.index("# Sweeps")
    (row,) = (line for line in text.splitlines() if line.startswith("| Emotion, train, mteb's probe"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:3] == ["0.2750", "0.7150 ± 0.0137", "0.9150 ± 0.0137"]
    assert cells[3].startswith("+0.2000 (+0.0") and float(cells[4]) < 0.01
    assert cells[5].startswith("+0.6400") and float(cells[6]) < 0.01
    (row,) = (line for line in text.splitlines() if line.startswith("| Emotion, train-8, mteb's probe"))
    assert "+0.0000 (+0.0000 to +0.0000) | 1.0000" in row  # the same answers: nothing to tell them apart
    assert tmp_path / "report/EmotionClassification-little-data.png" in written
    (comparable / "chosen.json").unlink()
    write_report(comparable / "sweep", tmp_path / "without")
    assert "its parts" not in (tmp_path / "without/report.md").read_text()


def test_paired_bootstrap():
    """Against scipy's paired t-test where the texts are many and the seeds alike, which make the two agree."""
    generator = np.random.default_rng(1)
    a, b = (np.repeat(generator.random((1, 2000)) < share, 5, axis=0).astype(float) for share in (0.72, 0.70))
    mean, low, high, p = report.paired_bootstrap(a, b)
    test = scipy.stats.ttest_rel(a[0], b[0])
    assert mean == pytest.approx((a - b).mean())
    assert p == pytest.approx(test.pvalue, abs=0.02)
    assert (low, high) == pytest.approx(test.confidence_interval(0.95), abs=0.002)
    # Seeds that disagree make the same difference less certain.
    wavering = np.vstack([a[0]] * 2 + [b[0]] * 3)
    assert report.paired_bootstrap(wavering, b)[3] > report.paired_bootstrap(np.vstack([a[0]] * 5), b)[3]


def copied(source, target, **changes):
    """The point of the file `source`, with `changes`, as one of the file `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**json.loads(source.read_text()), **changes}))


def test_the_ceiling_the_parts_and_the_merging_of_layers(comparable, tmp_path):
    measured, at = comparable / "sweep", "EmotionClassification/tuned/train"
    for seed in range(1, 6):
        # Without its own words the hybrid is as good as the encoder; layer 4 too, and merging it with 2 is best.
        encoder, hybrid = measured / at / f"encoder-{seed}.json", measured / at / f"hybrid-{seed}.json"
        as_hybrid = {"kind": "hybrid", "layers": [2], "settings": {"read_words": False}}
        copied(encoder, comparable / "ablation" / at / hybrid.name, **as_hybrid)
        for layer in (2, 4):
            copied(encoder, comparable / "merging" / at / f"{layer}-{seed}.json", **{**as_hybrid, "layers": [layer]})
        merged = {"layers": [2, 4], "layer_pooling": "concat"}
        copied(hybrid, comparable / "merging" / at / f"merged-{seed}.json", **merged)
    write_report(measured, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()

    def cells(start):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
        return [cell.strip() for cell in line.split("|")[2:-1]]

    # 40 texts: 28 right in all ten runs, the last three in none.
    assert cells("Emotion, train | 10")[1:] == ["70.0%", "22.5%", "7.5%"]
    changed = cells("Emotion, train | hybrid, states only")[1:]
    assert changed[:2] == ["0.7150 (0.5000)", "0.9150 (0.5000)"]
    assert changed[2].startswith("+0.2000 (+0.0") and float(changed[3]) < 0.01
    assert cells("hybrid, layer 4")[2:] == ["", "", "", ""]
    merged = cells("hybrid, all side by side")
    assert merged[2].startswith("+0.2000 (+0.0") and float(merged[3]) < 0.01 and float(merged[5]) < 0.01
