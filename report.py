"""Draws the figures and tables of a sweep from its results files, with no model and no network.

First the comparison of the hybrid with its two parts over the seeds, with a paired test, on all training texts and on few
of them; what is out of reach for both; what parts of the recipe bring; what merging layers brings. Then, for each task and
training split, after the report of 2024: accuracy and F1 against the layer for LLM-only and hybrid, with the encoder alone as
lines (its figures 2 to 5); layer merging (its tables 1 and 2); and our place among published models (its figure 6). Written as
PNG, SVG and `report.md`.
"""

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

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
# Accuracy by mteb's probe, and by the trained head.
HEADS = (False, True)
# Draws of the bootstrap.
RESAMPLES = 10_000
COMPARISON_NOTE = (
    "Accuracy on the test split, mean ± deviation over the seeds. `train-8`: eight texts of each label. Differences with "
    "their 95% interval and two-sided p from a paired bootstrap over seeds and test texts (10,000 draws). The LLM alone is "
    "frozen, and but for the draw of its training texts depends on no seed; its head is a logistic regression."
)


CEILING_NOTE = (
    "Test texts by the trained heads of all seeds of encoder and hybrid. Right in no run: what neither has ever labelled as "
    "the dataset does. Unsettled: right in some runs and wrong in others, which is where two models can differ at all."
)
VARIANTS_NOTE = (
    "The model of the first table against the same with one thing changed, and with the step size that dev texts chose for "
    "it. States only: the encoder does not read its own words. Two views: the encoder alone is trained as the hybrid is, "
    "each text twice, with predictions that must agree. Tests as in the first table."
)
MERGING_NOTE = (
    "Standardised states, one reading and one view of a text, no layer dropout, equal step sizes. Each merge is compared with "
    "the best single layer on the test split, in hindsight, which is the hardest to beat. Tests as in the first table."
)


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
    written, text = [], []
    chosen = read_chosen(Path(results).parent / "chosen.json")
    if len(table := comparison_table(sweeps, chosen)) > 2:
        text += ["# The hybrid and its parts", "", *table, ""]
        text += [COMPARISON_NOTE, ""]
    for task in sorted(chosen):
        if drawn := draw_little_data(sweeps, chosen, task, output / f"{task}-little-data"):
            written += drawn
            text += [f"![little data, {task}]({task}-little-data.png)", ""]
    if len(table := ceiling_table(sweeps, chosen)) > 2:
        text += ["# Where the ceiling is", "", *table, "", CEILING_NOTE, ""]
    if len(table := variants_table(sweeps, read_points(Path(results).parent / "ablation"))) > 2:
        text += ["# What parts of the recipe bring", "", *table, "", VARIANTS_NOTE, ""]
    for (task, _, training_set), points in sorted(read_points(Path(results).parent / "merging").items()):
        text += [f"# Merging layers: {trained_on(task, training_set)}", ""]
        text += [describe(points), "", *merging_verdict(points), "", MERGING_NOTE, ""]
    text += ["# Sweeps over the layers", ""]
    swept = {key: points for key, points in sweeps.items() if key[2] in ("train", "validation")}
    for task, split in sorted({(task, split) for task, _, split in swept}):
        columns = {
            f"recipe `{recipe}`": sweeps[task, recipe, split]
            for recipe in ("tuned", "plain", "paper")
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
    for (task, recipe, split), points in sorted(swept.items()):
        title = f"{task.removesuffix('Classification')}, trained on its {split} split, recipe `{recipe}`"
        text += [f"## {title}", "", describe(points), ""]
        for metric, label in METRICS.items() if has_curves(points) else ():
            name = f"{task}-{recipe}-{split}-{metric}"
            written += draw_layers(points, metric, label, title.replace("`", ""), output / name)
            text += [f"![{label} against the layer]({name}.png)", ""]
        text += [*layer_table(points), "", *merging_table(points), ""]
    for task in sorted({task for task, _, _ in sweeps}):
        csv_file = Path(results).parent / "published" / f"{task}.csv"
        published = mteb_scores(mteb_results, task) if mteb_results else read_csv(csv_file)
        if published:
            written += draw_rank(task, published, swept, output / f"{task}-rank")
            text += [f"## {task} among published models", "", f"![rank]({task}-rank.png)", ""]
    write_whole(output / "report.md", lambda path: path.write_text("\n".join(text)))
    return [*written, output / "report.md"]


def read_points(results) -> dict:
    """The points by (task, recipe, training set), and in each by (kind, layers, layer pooling): a list over the seeds.

    A training set is a split, or `train-8`, eight texts a label of one.
    """
    sweeps = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(results).glob("*/*/*/*.json")):
        point = json.loads(path.read_text())
        key = (point["kind"], tuple(point["layers"]), point["layer_pooling"])
        sweeps[point["task"], point["recipe"], path.parent.name][key].append(point)
    return sweeps


def right_answers(group: list[dict], seeds: list[int], head: bool = False) -> np.ndarray:
    """(seeds, texts): the share of mteb's experiments, or with `head` whether the head, labelled a test text right.

    A model that depends on no seed, which has a point of one, is the same for all.
    """
    by_seed = {point["seed"]: point for point in group}
    chosen = [by_seed[seed] for seed in seeds] if set(seeds) <= set(by_seed) else group[:1] * len(seeds)
    if head:
        return np.array([[int(digit) for digit in point["head"]["correct"]] for point in chosen], dtype=float)
    return np.array([[int(digit, 16) / len(point["experiments"]) for digit in point["correct"]] for point in chosen])


def paired_bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float, float, float]:
    """Whether model `a` is better than `b`; both (seeds, texts), the same seeds and texts in both.

    Seeds and texts are drawn with replacement, both at once and the same for both models, so that the test speaks of other
    seeds and of other texts. Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 13 and 16.

    Returns:
        The mean difference, the ends of its 95% interval, and the two-sided p-value of no difference.
    """
    generator = np.random.default_rng(0)
    difference = a - b
    seeds, texts = difference.shape
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    drawn_texts = generator.multinomial(texts, np.full(texts, 1 / texts), resamples) / texts
    means = ((drawn_seeds @ difference) * drawn_texts).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return difference.mean(), low, high, min(1.0, 2 * (tail + 1) / (resamples + 1))


def comparison(points: dict, chosen: dict, head: bool = False) -> dict | None:
    """The hybrid of `chosen` beside its parts on one task and training set; None where one of them is missing.

    Args:
        points: as [`read_points`] has them.
        chosen: `{"hybrid": {"layers", "layer_pooling"}, "llm": ...}`.

    Returns:
        By kind `(mean, deviation over the seeds)`, and under `"seeds"` and `"over"` the seeds that all have, and by kind
        what [`paired_bootstrap`] says of the hybrid over it.
    """
    keys = chosen_keys(chosen)
    if not all(key in points for key in keys.values()):
        return None
    groups = {
        kind: [point for point in points[key] if "correct" in (point["head"] if head else point)]
        for kind, key in keys.items()
    }
    common = set.intersection(*({point["seed"] for point in groups[kind]} for kind in ("hybrid", "encoder")))
    if len(common) < 2 or not groups["llm"]:
        return None
    seeds = sorted(common)
    answers = {kind: right_answers(group, seeds, head) for kind, group in groups.items()}
    result = {"seeds": seeds, "over": {}}
    for kind, rights in answers.items():
        spread = statistics.stdev(rights.mean(1)) or None  # the frozen LLM's
        result[kind] = (rights.mean(), spread)
        if kind != "hybrid":
            result["over"][kind] = paired_bootstrap(answers["hybrid"], rights)
    return result


def comparison_table(sweeps: dict, chosen: dict) -> list[str]:
    """The first table: hybrid, encoder and LLM on every task and training set that has all three, with the tests."""
    rows = [
        "| task, training texts | LLM alone | encoder alone | hybrid | hybrid − encoder | p | hybrid − LLM | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, head in (("mteb's probe", False), ("trained head", True)):
        for task, training_set in ordered_training_sets(sweeps, chosen):
            result = comparison(sweeps[task, "tuned", training_set], chosen[task][training_set], head)
            if result is None:
                continue
            cells = [score(result[kind]) for kind in ("llm", "encoder", "hybrid")]
            for kind in ("encoder", "llm"):
                cells += difference_cells(*result["over"][kind])
            rows.append(f"| {trained_on(task, training_set)}, {name} | {' | '.join(cells)} |")
    return rows


def ordered_training_sets(sweeps: dict, chosen: dict) -> list[tuple[str, str]]:
    """The tasks of `chosen` with those of their training sets that were measured: few texts first, `validation` last."""

    def order(training_set):
        split, _, number = training_set.partition("-")
        return split, int(number or 10**9)

    return [
        (task, training_set)
        for task in sorted(chosen)
        for training_set in sorted(chosen[task], key=order)
        if (task, "tuned", training_set) in sweeps
    ]


def ceiling_table(sweeps: dict, chosen: dict) -> list[str]:
    """How many test texts encoder and hybrid label right in no run, in some and in every run."""
    rows = [
        "| task, training texts | runs | right in every run | unsettled | right in no run |",
        "|---|---|---|---|---|",
    ]
    for task, training_set in ordered_training_sets(sweeps, chosen):
        points, keys = sweeps[task, "tuned", training_set], chosen_keys(chosen[task][training_set])
        groups = [points.get(keys[kind], []) for kind in ("hybrid", "encoder")]
        runs = [[*point["head"]["correct"]] for group in groups for point in group if "head" in point]
        if all(groups) and runs:
            share = (np.array(runs) == "1").mean(0)
            cells = [(share == 1).mean(), ((share > 0) & (share < 1)).mean(), (share == 0).mean()]
            cells = " | ".join(f"{cell:.1%}" for cell in cells)
            rows.append(f"| {trained_on(task, training_set)} | {len(runs)} | {cells} |")
    return rows


def tested(a: list[dict], b: list[dict], head: bool) -> list[str]:
    """Two cells of the difference between two models' points of the same seeds, with its interval and its p."""
    seeds = sorted({point["seed"] for point in a} & {point["seed"] for point in b})
    return difference_cells(*paired_bootstrap(right_answers(a, seeds, head), right_answers(b, seeds, head)))


def difference_cells(mean: float, low: float, high: float, p: float) -> list[str]:
    """What [`paired_bootstrap`] returns, as two cells of a table."""
    return [f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", f"{p:.4f}"]


def trained_on(task: str, training_set: str) -> str:
    return f"{task.removesuffix('Classification')}, {training_set}"


def chosen_keys(chosen: dict) -> dict[str, tuple]:
    """By kind, the key that [`read_points`] gives the models of `chosen` (see [`comparison`]), and the encoder alone."""
    keys = {kind: (kind, tuple(model["layers"]), model["layer_pooling"]) for kind, model in chosen.items()}
    return {**keys, "encoder": ("encoder", (), "mean")}


def variants_table(sweeps: dict, variants: dict) -> list[str]:
    """Each of `variants` beside the model of `sweeps` with the same layers."""
    rows = [
        "| task, training texts | changed | its probe (head) | the model's | difference by the probe | p | by the head | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, recipe, training_set), points in sorted(variants.items()):
        for model, group in sorted(points.items()):
            if base := sweeps.get((task, recipe, training_set), {}).get(model):
                name = "hybrid, states only" if model[0] == "hybrid" else "encoder alone, two views"
                cells = [trained_on(task, training_set), name]
                cells += [f"{accuracy(g):.4f} ({accuracy(g, head=True):.4f})" for g in (group, base)]
                cells += [cell for head in HEADS for cell in tested(base, group, head)]
                rows.append(f"| {' | '.join(cells)} |")
    return rows


def accuracy(group: list[dict], head: bool = False) -> float:
    """Mean accuracy over the seeds."""
    return statistics.mean((point["head"] if head else point)["accuracy"] for point in group)


def merging_verdict(points: dict) -> list[str]:
    """Single and merged layers, LLM alone and hybrid, and each merge against the best single layer."""
    rows = [
        "| model | probe | head | over the best layer, by the probe | p | by the head | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("llm", "hybrid"):
        single = sorted(key for key in points if key[0] == kind and len(key[1]) == 1)
        merged = sorted(key for key in points if key[0] == kind and len(key[1]) > 1)
        best = {
            head: max((points[key] for key in single), key=lambda g: accuracy(g, head), default=None) for head in HEADS
        }
        names = {key: f"layer {key[1][0]}" for key in single}
        names |= {key: "all side by side" if key[2] == "concat" else f"{key[2]} of all" for key in merged}
        for key, name in names.items():
            group, cells, tests = points[key], [], []
            for head in HEADS:
                values = [(point["head"] if head else point)["accuracy"] for point in group]
                cells.append(score((statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)))
                tests += tested(group, best[head], head) if key in merged and single else ["", ""]
            rows.append(f"| {CURVES[kind][0]}, {name} | {' | '.join(cells + tests)} |")
    return rows


def score(mean_and_deviation: tuple[float, float | None]) -> str:
    mean, deviation = mean_and_deviation
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def draw_little_data(sweeps: dict, chosen: dict, task: str, path: Path) -> list[Path]:
    """Accuracy of the three models against the number of training texts a label; nothing where there are not two."""
    found = {}
    for name, training_set in ordered_training_sets(sweeps, chosen):
        split, _, number = training_set.partition("-")
        if name == task and split == "train":
            result = comparison(sweeps[task, "tuned", training_set], chosen[task][training_set], head=True)
            found |= {number or "all": result} if result else {}
    if len(found) < 2:
        return []
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, (name, colour, marker) in {**CURVES, "encoder": (*LINES["encoder"][:2], "^")}.items():
        means = [result[kind][0] for result in found.values()]
        spreads = [result[kind][1] or 0.0 for result in found.values()]
        axes.errorbar(range(len(found)), means, spreads, color=colour, marker=marker, capsize=3, label=name)
    axes.set_xticks(range(len(found)), found)
    axes.set(xlabel="training texts of each label", ylabel="accuracy of the trained head")
    axes.set_title(f"{task.removesuffix('Classification')}: little data", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    return save(figure, path)


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


def has_curves(points) -> bool:
    """Whether a curve over the layers has more than a point."""
    return any(len(curve(points, kind, "accuracy")[0]) > 1 for kind in CURVES)


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
        name = "side by side" if pooling == "concat" else pooling
        rows.append(row(f"{kind}, {name}: {', '.join(map(str, layers))}", points[kind, layers, pooling]))
    return rows


def row(name: str, group: list[dict]) -> str:
    cells = []
    for metric in METRICS:
        mean, spread = mean_and_spread(group, metric)
        heads = [point["head"][metric] for point in group if "head" in point]
        cells.append(f"{mean:.4f} ± {spread:.4f}" + (f" ({statistics.mean(heads):.4f})" if heads else ""))
    return f"| {name} | {' | '.join(cells)} |"


def read_chosen(path: Path) -> dict:
    """By task and training set, the layers of the hybrid and of the LLM alone that were chosen on dev texts; none without a
    file."""
    return json.loads(path.read_text()) if path.is_file() else {}


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
        "hybrid, several layers side by side": lambda key: key[0] == "hybrid" and key[2] == "concat",
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
    """The best published accuracies on a task and our best of each kind, the report's recipe left out."""
    bars = sorted(
        ((entry["model"], float(entry["accuracy"]), "#BBBBBB") for entry in published), key=lambda bar: -bar[1]
    )
    bars = bars[:RANKED]
    ours = [
        (split, points) for (swept, recipe, split), points in sweeps.items() if swept == task and recipe != "paper"
    ]
    for split in sorted({split for split, _ in ours}):
        for kind, (name, colour, _) in {**CURVES, **LINES}.items():
            groups = [group for s, points in ours if s == split for key, group in points.items() if key[0] == kind]
            if groups:
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
