"""Measures embedding models with mteb.

    python evaluate_mteb.py run runs/counterfactual/final --tasks AmazonCounterfactual Emotion
    python evaluate_mteb.py table
    python evaluate_mteb.py sweep AmazonCounterfactual --kinds llm hybrid
    python evaluate_mteb.py report
    python evaluate_mteb.py submission owner/name

`run` scores any SentenceTransformer directory or Hub id with `mteb.evaluate`. Finished tasks are skipped on a second run,
a task that fails is reported and the others go on, and the scores stay in --results as mteb's own JSON. `table` prints
what is there, the mean and deviation over the seeds of models whose names differ by `-s<seed>` alone. `sweep` compares
LLM, encoder and hybrid at every layer (see sweep.py), and `report` draws what it found (see report.py).
`submission` writes what the MTEB leaderboard asks for (see submission.py).
"""

import argparse
import json
import logging
import re
import statistics
import sys
from pathlib import Path

import httpx2
import mteb
from huggingface_hub import HfApi
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from backbones import backbone_revision, explained_load_errors, file_sha256, resolve_backbone
from onnx_embedder import load_onnx
from repository import refuse_unwritable, write_json
from tasks import get_task

logger = logging.getLogger(__name__)


def main():
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="score one model")
    run_parser.add_argument("model", help="a SentenceTransformer directory or Hub id")
    which = run_parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tasks", nargs="+", metavar="TASK", help="mteb's names; Classification may be left out")
    which.add_argument("--benchmark", help='the tasks of a benchmark, e.g. "MTEB(eng, v2)"')
    run_parser.add_argument(
        "--types", nargs="+", metavar="TYPE", help="of --benchmark only these, e.g. Classification"
    )
    run_parser.add_argument("--subset", help="language of multilingual tasks, as mteb names it; English first")
    run_parser.add_argument("--revision", help="commit, branch or tag of a model on the Hub")
    run_parser.add_argument("--onnx", metavar="FILE", help="a file of export_onnx.py, e.g. model_qint8.onnx")
    run_parser.add_argument("--results", default="results/mteb", help="where mteb keeps the scores")
    run_parser.add_argument(
        "--dataset-root", help="a local folder laid out as the Hub below datasets/, to read instead"
    )
    run_parser.add_argument("--split", default="test", help="the split to score on; validation to choose by")
    run_parser.add_argument("--batch-size", type=int, default=32)
    run_parser.add_argument("--overwrite", action="store_true", help="score again what is already there")
    run_parser.set_defaults(function=run)
    sweep_parser = commands.add_parser("sweep", help="compare LLM, encoder and hybrid at every layer")
    sweep_parser.add_argument("task", help="an mteb classification task")
    sweep_parser.add_argument("--llm", default="google/gemma-2b")
    sweep_parser.add_argument("--encoder", default="FacebookAI/roberta-base")
    sweep_parser.add_argument(
        "--kinds",
        nargs="+",
        default=["llm", "encoder-untrained", "encoder", "hybrid", "merged"],
        choices=["llm", "encoder-untrained", "encoder", "hybrid", "merged", "merged-llm"],
        help="merged: the hybrid on its four best layers, by max and by mean; merged-llm: the LLM alone on the same",
    )
    sweep_parser.add_argument("--layers", nargs="+", type=int, help="of llm and hybrid; all by default")
    sweep_parser.add_argument("--merge", nargs="+", type=int, help="merge these layers, not the four best")
    sweep_parser.add_argument(
        "--pooling", nargs="+", default=["max", "mean"], choices=["max", "mean", "concat"], help="of --merge"
    )
    sweep_parser.add_argument("--train-split", default="validation", help="validation: the report's texts; or train")
    sweep_parser.add_argument(
        "--texts-per-label", type=int, metavar="N", help="train on N texts of each label, drawn with the seed"
    )
    sweep_parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of train.py, e.g. num_train_epochs=10"
    )
    sweep_parser.add_argument(
        "--recipe", default="tuned", choices=["tuned", "plain", "paper"], help="see RECIPES in sweep.py"
    )
    sweep_parser.add_argument("--seeds", nargs="+", type=int, default=[33], help="33 is the report's")
    sweep_parser.add_argument("--results", default="results/sweep", help="where the points are kept")
    sweep_parser.add_argument("--dataset-root", help="as for run")
    sweep_parser.add_argument("--llm-cache-dir", help="where LLM states are kept")
    sweep_parser.set_defaults(function=sweep)
    table_parser = commands.add_parser("table", help="print the scores of --results")
    table_parser.add_argument("--results", default="results/mteb", help="where mteb keeps the scores")
    table_parser.set_defaults(function=table)
    report_parser = commands.add_parser("report", help="draw the figures and tables of the sweeps")
    report_parser.add_argument("--results", default="results/sweep", help="where the points are kept")
    report_parser.add_argument("--output", default="results/report", help="where figures and tables go")
    report_parser.add_argument(
        "--mteb-results",
        metavar="DIR",
        help="rank among the published results that mteb.ResultCache(DIR).download_from_remote() brought",
    )
    report_parser.set_defaults(function=report)
    submission_parser = commands.add_parser("submission", help="write what the MTEB leaderboard asks for")
    submission_parser.add_argument("model", help="owner/name of a model published with push_to_hub.py")
    submission_parser.add_argument("--revision", help="the commit that was measured; the newest by default")
    submission_parser.add_argument("--results", default="results/mteb", help="where `run` kept its scores")
    submission_parser.add_argument("--output", default="submission", help="where the submission goes")
    submission_parser.add_argument("--code", metavar="URL", help="address of the public training code")
    submission_parser.add_argument(
        "--training-datasets", nargs="+", metavar="NAME", help="mteb's names, for a model trained on files of your own"
    )
    submission_parser.add_argument(
        "--accept-mirror", action="store_true", help="take scores measured with --dataset-root too"
    )
    submission_parser.set_defaults(function=submission)
    args = parser.parse_args()
    try:
        sys.exit(args.function(args))
    except httpx2.TransportError as error:
        sys.exit(f"evaluate_mteb.py: the Hub could not be reached ({error}).")
    except (ValueError, OSError, KeyError, ImportError) as error:
        sys.exit(f"evaluate_mteb.py: {error}")


def run(args) -> int:
    """Scores a model, prints a table and returns the exit status: 1 if a task failed."""
    if args.types and not args.benchmark:
        raise ValueError("--types chooses among the tasks of a --benchmark.")
    if args.benchmark:
        benchmark = mteb.get_benchmark(args.benchmark).tasks
        chosen = [task for task in benchmark if not args.types or task.metadata.type in args.types]
        subsets = {task.metadata.name: args.subset or _only_subset(task) for task in chosen}
    else:
        # A wrong name is better refused now than after hours.
        names = [get_task(name, args.subset, split=args.split).metadata.name for name in args.tasks]
        subsets = dict.fromkeys(names, args.subset)

    refuse_unwritable(Path(args.results))
    model = load_model(args.model, args.revision, args.onnx)
    rows, failed = [], []
    for name, subset in subsets.items():
        try:
            task = get_task(name, subset, args.dataset_root, args.split)
            rows.append(score(model, task, args.results, args.batch_size, args.overwrite, args.dataset_root))
        except Exception as error:  # one task's failure must not lose the others
            logger.exception("%s failed", name)
            failed.append((name, error))
    print_table(rows)
    for name, error in failed:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        print(f"FAILED {name}: {type(error).__name__}: {error}{cause}")
    return 1 if failed else 0


def _only_subset(task) -> str | None:
    """The language in which a benchmark asks for a multilingual task, where it asks for one alone."""
    return task.hf_subsets[0] if task.metadata.is_multilingual and len(task.hf_subsets) == 1 else None


def sweep(args) -> int:
    """Measures the points asked for, those of `merged` last, and prints them."""
    from sweep import Point, Sweep  # brings in the training

    logging.getLogger("sweep").setLevel(logging.INFO)
    runner = Sweep(
        args.task,
        args.llm,
        args.encoder,
        args.train_split,
        args.results,
        args.dataset_root,
        args.llm_cache_dir,
        parse_settings(args.set),
        args.recipe,
        args.texts_per_label,
    )
    layers = args.layers or range(1, runner.depth + 1)
    points = [Point(kind, args.seeds[0]) for kind in args.kinds if kind == "encoder-untrained"]
    # The LLM alone is frozen: only the draw of a few training texts depends on the seed.
    llm_seeds = args.seeds if args.texts_per_label else args.seeds[:1]
    points += [Point("llm", seed, (layer,)) for seed in llm_seeds if "llm" in args.kinds for layer in layers]
    for seed in args.seeds:
        points += [Point(kind, seed) for kind in args.kinds if kind == "encoder"]
        points += [Point(kind, seed, (layer,)) for kind in args.kinds if kind == "hybrid" for layer in layers]
    results = runner.run(points)
    if merges := {"merged", "merged-llm"} & set(args.kinds):
        merge = tuple(args.merge or runner.best_layers("hybrid", args.seeds))
        seeds = {"merged-llm": ("llm", llm_seeds), "merged": ("hybrid", args.seeds)}
        merged = [
            Point(kind, seed, merge, pooling)
            for kind, of_kind in (seeds[name] for name in sorted(merges, reverse=True))
            for seed in of_kind
            for pooling in args.pooling
        ]
        results += runner.run(merged)
    print(f"{'point':<32} {'accuracy':>8} {'F1':>8} {'head':>8} {'seconds':>8}")
    for result in results:
        name = " ".join([result["kind"], *map(str, result["layers"])])
        name += f" {result['layer_pooling']}" * (len(result["layers"]) > 1) + f" (seed {result['seed']})"
        head = f"{result['head']['accuracy']:8.4f}" if "head" in result else " " * 8
        print(f"{name:<32} {result['accuracy']:8.4f} {result['f1']:8.4f} {head} {result['seconds']:8.1f}")
    return 0


def parse_settings(pairs: list[str]) -> dict:
    """`name=value` pairs as `train.py` reads `--name value`; those of models and of training."""
    from train import parse_arguments

    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ValueError(f"--set {' '.join(wrong)}: write NAME=VALUE.")
    values = dict(pair.split("=", 1) for pair in pairs)
    model_args, _, training = parse_arguments(
        [part for name, value in values.items() for part in (f"--{name}", value)]
    )
    settings = {**vars(model_args), **vars(training)}
    unknown = sorted(set(values) - set(settings))
    if unknown:
        raise ValueError(f"--set {', '.join(unknown)}: only settings of models and of training can be set.")
    return {name: settings[name] for name in values}


def report(args) -> int:
    from report import write_report  # brings in matplotlib

    for path in write_report(args.results, args.output, args.mteb_results):
        print(path)
    return 0


def submission(args) -> int:
    """Writes the results folder and the `ModelMeta` file, and says how zero-shot the model is."""
    from submission import write_submission

    meta, files = write_submission(
        args.model,
        args.results,
        args.output,
        HfApi(),
        args.revision,
        args.code,
        args.training_datasets,
        args.accept_mirror,
    )
    for path in files:
        print(path)
    tasks = sorted(path.stem for path in files if path.suffix == ".json" and path.name != "model_meta.json")
    share = meta.zero_shot_percentage(tasks)
    print(f"Zero-shot share of the submitted tasks: {'unknown' if share is None else f'{share}%'}")
    return 0


def load_model(name: str, revision: str | None = None, onnx: str | None = None) -> SentenceTransformerEncoderWrapper:
    """The model, or its ONNX file `onnx`, as mteb runs it. A local directory is named for its path and the hash of its
    files, so that two models never share results."""
    path = resolve_backbone(name)
    local = name if name != path else "-".join(Path(path).resolve().parts[-2:])
    identity = None  # a model on the Hub has its own
    if onnx:
        model = load_onnx(path, onnx)
        file = Path(path, "onnx", onnx)
        identity = {"name": f"local/{local}-{file.stem}", "revision": file_sha256(file)[:16]}
    else:
        with explained_load_errors(name):
            model = SentenceTransformer(path, revision=revision, trust_remote_code=True)
        if Path(path).is_dir():
            identity = {"name": f"local/{local}", "revision": backbone_revision(path)}
    wrapper = SentenceTransformerEncoderWrapper(model)
    if identity:
        wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=identity)
    return wrapper


class _WholeResults(mteb.ResultCache):
    """mteb's folder of results, in which half a file (after a full disk, or a kill) is none."""

    def load_task_result(self, *args, **kwargs):
        try:
            return super().load_task_result(*args, **kwargs)
        except ValueError as error:
            logger.warning("An unreadable result is measured again: %s", error)
            return None

    def save_to_cache(self, task_result, model_name, model_revision=None, **kwargs):
        try:
            super().save_to_cache(task_result, model_name, model_revision, **kwargs)
        except OSError:
            self.get_task_result_path(task_result.task_name, model_name, model_revision).unlink(missing_ok=True)
            raise


def score(model, task, results, batch_size=32, overwrite=False, dataset_root=None) -> dict:
    """One task's scores through `mteb.evaluate`: accuracy, macro F1, and the deviation over mteb's experiments."""
    (split,) = task.eval_splits
    cache = _WholeResults(results)
    result = mteb.evaluate(
        model,
        task,
        cache=cache,
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": True},
        overwrite_strategy="always" if overwrite else "only-missing",
    )
    scores = result.task_results[0].scores[split][0]
    if dataset_root is not None:
        path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
        _record_source(Path(path), f"{dataset_root}/datasets/{get_task(task.metadata.name).metadata.dataset['path']}")
    accuracies = [experiment["accuracy"] for experiment in scores["scores_per_experiment"]]
    return {
        "task": task.metadata.name,
        "split": split,
        "accuracy": scores["accuracy"],
        "f1": scores["f1"],
        "accuracy_deviation": statistics.stdev(accuracies),
    }


def _record_source(path: Path, source: str):
    """Notes in mteb's result file that the dataset, whose revision on the Hub it names, was read from `source`."""
    result = json.loads(path.read_text())
    if result.get("dataset_source") != source:
        write_json(path, {**result, "dataset_source": source})


def print_table(rows):
    print(f"{'task':<40} {'split':<10} {'accuracy':>8} {'± (10 experiments)':>18} {'F1':>8}")
    for row in rows:
        print(
            f"{row['task']:<40} {row['split']:<10} {row['accuracy']:>8.4f} {row['accuracy_deviation']:>18.4f} {row['f1']:>8.4f}"
        )


def table(args) -> int:
    """Prints, as Markdown, the mean and deviation over seeds of what `run` has stored."""
    groups = {}
    for path in sorted(Path(args.results, "results").glob("*/*/*.json")):
        if path.name == "model_meta.json":
            continue
        result = json.loads(path.read_text())
        model = re.sub(r"-s\d+(?=-|$)", "", path.parts[-3].replace("__", "/"))
        for split, (scores, *_) in result["scores"].items():
            groups.setdefault((result["task_name"], split, model), []).append(scores)
    if not groups:
        raise FileNotFoundError(f"{args.results} holds no results: run `evaluate_mteb.py run` first.")
    print("| task | split | model | seeds | accuracy | F1 |\n|---|---|---|---|---|---|")
    for (task, split, model), scores in sorted(groups.items()):
        columns = [_mean_and_deviation([score[metric] for score in scores]) for metric in ("accuracy", "f1")]
        print(f"| {task} | {split} | {model} | {len(scores)} | {columns[0]} | {columns[1]} |")
    return 0


def _mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()
