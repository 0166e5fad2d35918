"""Draws the figures and tables of a sweep from its results files, with no model and no network.

For each task and training split, after the report of 2024: accuracy and F1 against the layer for LLM-only and hybrid, with
the encoder alone as lines (its figures 2 to 5); layer merging (its tables 1 and 2); and our place among published models
(its figure 6). Written as PNG, SVG and `report.md`.
"""

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llm_cache import write_whole

METRICS = {"accuracy": "accuracy", "f1": "macro F1"}
# Okabe and Ito's colours, which colour-blind readers tell apart.
CURVES = {"hybrid": ("hybrid", "#0072B2", "o"), "llm": ("LLM only", "#E69F00", "s")}
LINES = {
    "encoder": ("encoder only, fine-tuned", "#009E73", "-"),
    "encoder-untrained": ("encoder only, untrained", "#666666", "--"),
}


# How many published models the rank figure shows at most.
RANKED = 14


def write_report(results: str, output: str, mteb_results: str | None = None) -> list[Path]:
    """Reads the points below `results` (`<task>/<recipe>/<train split>/*.json`) and writes the report to `output`.

    Args:
        mteb_results: the folder of an `mteb.ResultCache` into which mteb's published results were downloaded. Without
            it the rank figures show the models of `published/<task>.csv`, beside `results`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there are no points, or `mteb_results` holds nothing of a task.
    """
    sweeps = read_points(results)
    if not sweeps:
        raise FileNotFoundError(f"{results} holds no points of a sweep: run `evaluate_mteb.py sweep` first.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written, text = [], ["# Sweeps over the layers", ""]
    for task, split in sorted({(task, split) for task, _, split in sweeps}):
        columns = {
            f"recipe `{recipe}`": sweeps[task, recipe, split]
            for recipe in ("tuned", "paper")
            if (task, recipe, split) in sweeps
        }
        if split == "validation":  # which is what the report trained on
            columns["the report of 2024"] = read_report_2024(Path(results).parent / "report-2024.csv", task)
        text += [f"## {task}, trained on its {split} split", "", *summary_table(columns), ""]
    text += [
        "The best layer is the best on the test split, so the row says what a layer can give, not what choosing one on "
        "validation data would. The report's backbones are gemma-2b and roberta-base, ours are named below.",
        "",
    ]
    for (task, recipe, split), points in sorted(sweeps.items()):
        title = f"{task.removesuffix('Classification')}, trained on its {split} split, recipe `{recipe}`"
        text += [f"## {title}", "", describe(points), ""]
        for metric, label in METRICS.items():
            name = f"{task}-{recipe}-{split}-{metric}"
            written += draw_layers(points, metric, label, title.replace("`", ""), output / name)
            text += [f"![{label} against the layer]({name}.png)", ""]
        text += [*layer_table(points), "", *merging_table(points), ""]
    for task in sorted({task for task, _, _ in sweeps}):
        csv_file = Path(results).parent / "published" / f"{task}.csv"
        published = mteb_scores(mteb_results, task) if mteb_results else read_csv(csv_file)
        if published:
            written += draw_rank(task, published, sweeps, output / f"{task}-rank")
            text += [f"## {task} among published models", "", f"![rank]({task}-rank.png)", ""]
    write_whole(output / "report.md", lambda path: path.write_text("\n".join(text)))
    return [*written, output / "report.md"]


def read_points(results) -> dict:
    """The points by (task, recipe, train split), and in each by (kind, layers, layer pooling): a list over the seeds."""
    sweeps = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(results).glob("*/*/*/*.json")):
        point = json.loads(path.read_text())
        key = (point["kind"], tuple(point["layers"]), point["layer_pooling"])
        sweeps[point["task"], point["recipe"], point["train_split"]][key].append(point)
    return sweeps


def describe(points) -> str:
    some = next(iter(points.values()))[0]
    seeds = sorted({point["seed"] for group in points.values() for point in group})
    return (
        f"{some['backbones']['llm']} and {some['backbones']['encoder']}; seeds {', '.join(map(str, seeds))}. Scores of "
        "mteb's few-shot probe on the test split; in brackets those of the trained head. ± is the deviation over the "
        "seeds, or with one seed over mteb's ten experiments."
    )


def mean_and_spread(group: list[dict], metric: str) -> tuple[float, float]:
    """Over the seeds; of a single seed the spread is that over mteb's experiments."""
    values = [point[metric] for point in group]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values)
    return values[0], statistics.stdev(experiment[metric] for experiment in group[0]["experiments"])


def curve(points, kind: str, metric: str) -> tuple[list[int], list[float], list[float]]:
    """Layers, means and spreads of the single-layer points of `kind`."""
    layers = sorted(key[1][0] for key in points if key[0] == kind and len(key[1]) == 1)
    values = [mean_and_spread(points[kind, (layer,), "mean"], metric) for layer in layers]
    return layers, [mean for mean, _ in values], [spread for _, spread in values]


def draw_layers(
    points, metric: str, label: str, title: str, path: Path, endings: tuple[str, ...] = ("png", "svg")
) -> list[Path]:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, (name, colour, marker) in CURVES.items():
        layers, means, spreads = curve(points, kind, metric)
        if layers:
            axes.plot(layers, means, color=colour, marker=marker, markersize=5, label=name)
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    for kind, (name, colour, style) in LINES.items():
        if (kind, (), "mean") in points:
            mean, _ = mean_and_spread(points[kind, (), "mean"], metric)
            axes.axhline(mean, color=colour, linestyle=style, label=name)
    axes.set(xlabel="layer of the LLM", ylabel=label)
    axes.set_title(title, fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    return save(figure, path, endings)


def layer_table(points) -> list[str]:
    layers = sorted({key[1][0] for key in points if len(key[1]) == 1})
    rows = ["| | accuracy | F1 |", "|---|---|---|"]
    for kind, (name, *_) in {**LINES, **CURVES}.items():
        if (kind, (), "mean") in points:
            rows.append(row(name, points[kind, (), "mean"]))
        rows += [
            row(f"{name}, layer {k}", points[kind, (k,), "mean"]) for k in layers if (kind, (k,), "mean") in points
        ]
    return rows


def merging_table(points) -> list[str]:
    """The merged layers beside each of them alone; nothing where no layers were merged."""
    merged = sorted(key for key in points if len(key[1]) > 1)
    if not merged:
        return []
    rows = ["| layers merged | accuracy | F1 |", "|---|---|---|"]
    for kind, layers, pooling in merged:
        rows.append(row(f"{kind}, {pooling} of {', '.join(map(str, layers))}", points[kind, layers, pooling]))
    return rows


def row(name: str, group: list[dict]) -> str:
    cells = []
    for metric in METRICS:
        mean, spread = mean_and_spread(group, metric)
        heads = [point["head"][metric] for point in group if "head" in point]
        cells.append(f"{mean:.4f} ± {spread:.4f}" + (f" ({statistics.mean(heads):.4f})" if heads else ""))
    return f"| {name} | {' | '.join(cells)} |"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it is missing."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_report_2024(path: Path, task: str) -> dict:
    """What the report of 2024 found on `task`, as [`read_points`] has it; none where the file is missing."""
    points = {}
    for entry in read_csv(path):
        if entry["task"] == task:
            layers = tuple(int(layer) for layer in entry["layers"].split())
            scores = {metric: float(entry[metric]) for metric in METRICS}
            points[entry["kind"], layers, entry["layer_pooling"]] = [scores]
    return points


def summary_table(columns: dict[str, dict]) -> list[str]:
    """The best layers, the encoder alone and merged layers beside each other; `columns` are points by heading."""
    rows = {
        "LLM only, best layer": lambda key: key[0] == "llm" and len(key[1]) == 1,
        "encoder only, fine-tuned": lambda key: key[0] == "encoder",
        "hybrid, best layer": lambda key: key[0] == "hybrid" and len(key[1]) == 1,
        "hybrid, mean of several layers": lambda key: key[0] == "hybrid" and len(key[1]) > 1 and key[2] == "mean",
        "hybrid, max of several layers": lambda key: key[0] == "hybrid" and len(key[1]) > 1 and key[2] == "max",
    }
    table = [f"| accuracy / F1 (layers) | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, belongs in rows.items():
        cells = []
        for points in columns.values():
            means = {
                key: [statistics.mean(point[metric] for point in group) for metric in METRICS]
                for key, group in points.items()
                if belongs(key)
            }
            best = max(means, key=means.get, default=None)
            layers = f" ({', '.join(map(str, best[1]))})" if best and best[1] else ""
            cells.append(f"{means[best][0]:.4f} / {means[best][1]:.4f}{layers}" if best else "")
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def mteb_scores(mteb_results: str, task: str) -> list[dict]:
    """Accuracies on `task`'s test split that `mteb.ResultCache().download_from_remote()` brought to `mteb_results`."""
    import mteb  # takes seconds

    results = mteb.ResultCache(mteb_results).load_results(tasks=[task], require_model_meta=False)
    best = {}
    for model in results.model_results:
        for result in model.task_results:
            for scores in result.scores.get("test", []):
                if scores["hf_subset"] in ("default", "en"):
                    best[model.model_name] = max(scores["accuracy"], best.get(model.model_name, 0.0))
    if not best:
        raise FileNotFoundError(f"{mteb_results} holds no results of {task}: mteb.ResultCache.download_from_remote().")
    return [{"model": model, "accuracy": accuracy} for model, accuracy in best.items()]


def draw_rank(task: str, published: list[dict], sweeps, path: Path) -> list[Path]:
    """The best published accuracies on a task and our best of each kind with the recipe `tuned`."""
    bars = sorted(
        ((entry["model"], float(entry["accuracy"]), "#BBBBBB") for entry in published), key=lambda bar: -bar[1]
    )
    bars = bars[:RANKED]
    for (swept, recipe, split), points in sweeps.items():
        for kind, (name, colour, _) in {**CURVES, **LINES}.items():
            groups = [group for key, group in points.items() if key[0] == kind]
            if groups and (swept, recipe) == (task, "tuned"):
                best = max(mean_and_spread(group, "accuracy")[0] for group in groups)
                bars.append((f"{name}, {split} split (ours)", best, colour))
    bars.sort(key=lambda bar: bar[1])
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(bars) + 1.2), layout="constrained")
    drawn = axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=[bar[2] for bar in bars])
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
    left = max(0.0, min(bar[1] for bar in bars) - 0.1)
    axes.set(xlabel="accuracy (ours: the best layer on the test split)", xlim=(left, 1.08))
    axes.margins(y=0.01)
    axes.set_title(task, fontsize=11)
    return save(figure, path)


def save(figure, path: Path, endings: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{ending}") for ending in endings]
    for file in paths:
        # No date and fixed ids, so that the same results give the same file.
        with matplotlib.rc_context({"svg.hashsalt": "hybrid"}):
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            write_whole(file, lambda path: figure.savefig(path, format=file.suffix[1:], dpi=150, metadata=metadata))
    plt.close(figure)
    return paths
