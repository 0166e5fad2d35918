"""The report's comparison, for one task: LLM-only and hybrid at every layer, merged layers, the encoder alone.

Every point (a model, a seed) is one small JSON file, written when the point is done: a sweep that was stopped goes on with
the point it was at. The LLM runs once over all texts, and every point reads its states from the cache.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import mteb
import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig

from backbones import resolve_backbone
from data import load_labelled_texts
from repository import write_json
from tasks import get_task, task_splits
from train import DataArguments, HybridTrainingArguments, ModelArguments, build_encoder, build_hybrid, fit
from trainer import HeadEvaluator, HybridModule

logger = logging.getLogger(__name__)

# Epochs and batch size of the report, which trained on the validation splits alone; both recipes use them there.
REPORT_TRAINING = {
    "AmazonCounterfactualClassification": {"num_train_epochs": 6, "per_device_train_batch_size": 8},
    "EmotionClassification": {"num_train_epochs": 5, "per_device_train_batch_size": 32},
}


class ReportModule(HybridModule):
    """The hybrid with the report's mistakes about padding.

    The LLM's tokenizer pads on the left, the encoder counts its positions from the padding, and the mean runs over the
    padding too, so that a text's embedding depends on the texts beside it. (Our LLM states are zero at the padding,
    where the report's were those of the padding token.)
    """

    def forward(self, features, **kwargs):
        mask = features["attention_mask"]
        states = features.get("llm_hidden_states")
        if states is None:
            states = self.model.hidden_states(features["input_ids"], mask)
        states = self.model.merge_layers(states)
        if self.model.encoder is not None:
            inputs_embeds = self.model.projector(states)
            states = self.model.encoder(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
        return {**features, "token_embeddings": states, "attention_mask": torch.ones_like(mask)}


@dataclass(frozen=True)
class Recipe:
    """Settings of `train.py` that differ from its defaults, and the module that a hybrid is trained as."""

    model: dict
    training: dict
    module: type = HybridModule


RECIPES = {
    "tuned": Recipe({}, {}),
    "paper": Recipe(
        # Mistakes of the report: LLM states as they come, of which a few dimensions hold nearly all the energy, enter
        # through a random projection ...
        {"standardize": False, "projector_init": "random"},
        {
            # ... that a step of 1e-5 hardly moves on a few hundred texts.
            "learning_rate": 1e-5,
            "projector_learning_rate": 1e-5,
            "head_learning_rate": 1e-5,
            # Adam as torch has it by default: constant steps, no decay, no clipping.
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "contrastive_weight": 0.0,
        },
        ReportModule,
    ),
}


@dataclass(frozen=True)
class Point:
    """One model of the comparison.

    `kind` is `llm` (its standardised states, pooled, nothing trained), `hybrid`, `encoder` (fine-tuned alone) or
    `encoder-untrained`; `layers` and `layer_pooling` are those of the first two.
    """

    kind: str
    seed: int
    layers: tuple[int, ...] = ()
    layer_pooling: str = "mean"

    @property
    def name(self) -> str:
        layers = "".join(f"-{layer}" for layer in self.layers)
        pooling = f"-{self.layer_pooling}" if len(self.layers) > 1 else ""
        return f"{self.kind}{layers}{pooling}-s{self.seed}"


class Sweep:
    """Measures points of one task and training split.

    Args:
        task: mteb's name of the task.
        llm, encoder: backbones, as `train.py` takes them.
        train_split: `validation` trains on the report's own texts, all of them and without choosing a checkpoint;
            `train` on the train split, the validation split choosing.
        results: the directory of the points' files, kept below `<task>/<recipe>/<train split>`.
        dataset_root: a local mirror of the Hub's datasets.
        llm_cache_dir: where LLM states are kept.
        training: further training arguments.
        recipe: a name in `RECIPES`: `tuned` is train.py's own, `paper` that of the report.
    """

    def __init__(
        self,
        task,
        llm,
        encoder,
        train_split,
        results,
        dataset_root=None,
        llm_cache_dir=None,
        training=None,
        recipe="tuned",
    ):
        self.task = get_task(task, dataset_root=dataset_root)
        self.task.load_data()  # mteb neither loads again nor unloads what is loaded, so one load serves all points
        name = self.task.metadata.name
        self.models = {"llm": llm, "encoder": encoder}
        self.data = {
            "task": name,
            "dataset_root": dataset_root,
            "train_split": train_split,
            "validation_share": 0.0 if train_split == "validation" else 0.1,
            **({"llm_cache_dir": llm_cache_dir} if llm_cache_dir else {}),
        }
        self.recipe_name, self.recipe = recipe, RECIPES[recipe]
        of_the_report = REPORT_TRAINING.get(name, {}) if train_split == "validation" else {}
        self.training = {**of_the_report, **self.recipe.training, **(training or {})}
        self.directory = Path(results) / name / recipe / train_split
        self.directory.mkdir(parents=True, exist_ok=True)
        self.depth = AutoConfig.from_pretrained(resolve_backbone(llm)).get_text_config(decoder=True).num_hidden_layers

    def run(self, points: list[Point]) -> list[dict]:
        """The results of `points`; those that have a file are read, the others measured."""
        missing = [point for point in points if not self._path(point).exists()]
        if any(point.layers for point in missing):
            self._fill_cache()
        results = []
        for number, point in enumerate(points, 1):
            if point in missing:
                logger.info("[%d/%d] %s", number, len(points), point.name)
                write_json(self._path(point), self._measure(point))
            results.append(json.loads(self._path(point).read_text()))
        return results

    def best_layers(self, kind: str, seeds: list[int], count: int = 4) -> tuple[int, ...]:
        """The `count` layers with the best mean probe accuracy, in order; every layer must be measured already."""
        means = {
            layer: np.mean([json.loads(self._path(Point(kind, s, (layer,))).read_text())["accuracy"] for s in seeds])
            for layer in range(1, self.depth + 1)
        }
        return tuple(sorted(sorted(means, key=means.get, reverse=True)[:count]))

    def _path(self, point: Point) -> Path:
        return self.directory / f"{point.name}.json"

    def _arguments(self, point: Point):
        models = {
            "llm": {**self.models, "encoder": "none"},
            "hybrid": self.models,
        }.get(point.kind, {**self.models, "llm": "none"})
        layers = {"llm_layers": list(point.layers), "layer_pooling": point.layer_pooling} if point.layers else {}
        run_directory = self.directory / f".{point.name}.run"
        training = HybridTrainingArguments(
            output_dir=str(run_directory),
            seed=point.seed,
            # Without validation texts there is no best checkpoint to go back to, and the training is short.
            **({"save_strategy": "no", "load_best_model_at_end": False} if not self.data["validation_share"] else {}),
            **self.training,
        )
        return ModelArguments(**models, **layers, **self.recipe.model), DataArguments(**self.data), training

    def _fill_cache(self):
        """Computes the states of all layers for every text that a point will read, in one pass of the LLM."""
        recorder = _TextRecorder()
        mteb.evaluate(recorder, self.task, cache=None, show_progress_bar=False)
        self._build(Point("llm", 0, tuple(range(1, self.depth + 1))), recorder.texts)

    def _build(self, point: Point, texts=()):
        """The LLM-only model of `point` with its statistics, from the states of its training texts."""
        model_args, data_args, training = self._arguments(point)
        sources = dict(self.data)
        cache_dir = sources.pop("llm_cache_dir", data_args.llm_cache_dir)
        labelled = load_labelled_texts(**sources)
        train_texts = list(labelled.train["text"])
        validation_texts = list(labelled.validation["text"]) if labelled.validation else []
        module, _ = build_hybrid(
            model_args,
            train_texts,
            [*train_texts, *validation_texts, *texts],
            cache_dir,
            data_args.llm_cache_dtype,
            training.device,
            self.recipe.module,
        )
        return module

    def _measure(self, point: Point) -> dict:
        start = time.perf_counter()
        model_args, data_args, training = self._arguments(point)
        result = {
            "task": self.task.metadata.name,
            "recipe": self.recipe_name,
            "kind": point.kind,
            "layers": list(point.layers),
            "layer_pooling": point.layer_pooling,
            "seed": point.seed,
            "train_split": self.data["train_split"],
            "backbones": self.models,
        }
        if point.kind in ("hybrid", "encoder"):
            model, report = fit(model_args, data_args, training, {}, self.recipe.module)
            splits = task_splits(self.task)
            test = splits["test"]
            text_column, label_column = self.task.input_column_name, self.task.label_column_name
            numbers = {label: i for i, label in enumerate(sorted(set(splits[self.data["train_split"]][label_column])))}
            head = HeadEvaluator(test[text_column], [numbers[label] for label in test[label_column]])(model)
            result |= {
                "head": head,
                "projector_fit": report["projector_fit"],
                "train_seconds": report["train_seconds"],
            }
            modules = [model[0], model[1]]
        else:
            first = self._build(point) if point.kind == "llm" else build_encoder(model_args)
            modules = [first, Pooling(first.get_embedding_dimension(), pooling_mode="mean")]
        embedder = SentenceTransformer(modules=modules, device=training.device)
        scores = mteb.evaluate(embedder, self.task, cache=None, show_progress_bar=False).task_results[0].scores
        (scores,) = scores["test"]
        shutil.rmtree(training.output_dir, ignore_errors=True)
        return {
            **result,
            "accuracy": scores["accuracy"],
            "f1": scores["f1"],
            "experiments": [
                {metric: experiment[metric] for metric in ("accuracy", "f1")}
                for experiment in scores["scores_per_experiment"]
            ],
            "seconds": round(time.perf_counter() - start, 1),
        }


class _TextRecorder(AbsEncoder):
    """Stands in for a model to learn which texts mteb will ask for."""

    def __init__(self):
        self.texts = []
        self.mteb_model_meta = mteb.models.ModelMeta.create_empty({"name": "text/recorder"})

    def encode(self, inputs, **kwargs):
        texts = [text for batch in inputs for text in batch["text"]]
        self.texts += texts
        return torch.nn.functional.one_hot(torch.arange(len(texts)) % 2, 2).float().numpy()
