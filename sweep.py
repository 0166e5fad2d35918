"""The report's comparison, for one task: LLM-only and hybrid at every layer, merged layers, the encoder alone.

Every point (a model, a seed) is one small JSON file, written when the point is done: a sweep that was stopped goes on with
the point it was at. The LLM runs once over all texts, and every point reads its states from the cache.
"""

import copy
import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path

import mteb
import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import nn
from transformers import AutoConfig

from backbones import resolve_backbone
from data import load_labelled_texts
from encoding import encode
from modeling_hybrid import HiddenStateStandardizer, HybridModel
from repository import write_json
from tasks import get_task, task_splits, with_list_columns
from train import DataArguments, HybridTrainingArguments, ModelArguments, build_encoder, build_hybrid, fit
from trainer import HybridModule, accuracy_and_f1

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
    # The report's architecture without its mistakes, and nothing more: one reading of a text, embeddings as they come.
    "plain": Recipe(
        {"read_words": False, "normalize_embeddings": False}, {"consistency_weight": 0.0, "learning_rate": 5e-5}
    ),
    "paper": Recipe(
        # Mistakes of the report: LLM states as they come, of which a few dimensions hold nearly all the energy, enter
        # through a random projection ...
        {"read_words": False, "standardize": False, "projector_init": "random", "normalize_embeddings": False},
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
            "consistency_weight": 0.0,
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
        settings: further settings of `train.py`, kept with each point.
        recipe: a name in `RECIPES`: `tuned` is train.py's own, `plain` that without its refinements, `paper` that of the
            report.
        texts_per_label: train on so many texts of each label, drawn with the point's seed; the others of the split, without
            their labels, still serve the statistics and the projector's start. The last checkpoint counts: validation
            texts would be more labels.
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
        settings=None,
        recipe="tuned",
        texts_per_label=None,
    ):
        self.task = get_task(task, dataset_root=dataset_root)
        self.task.load_data()  # mteb neither loads again nor unloads what is loaded, so one load serves all points
        with_list_columns(task_splits(self.task))
        name = self.task.metadata.name
        self.models = {"llm": llm, "encoder": encoder}
        self.data = {
            "task": name,
            "dataset_root": dataset_root,
            "train_split": train_split,
            "validation_share": 0.0 if train_split == "validation" or texts_per_label else 0.1,
            "texts_per_label": texts_per_label,
            **({"llm_cache_dir": llm_cache_dir} if llm_cache_dir else {}),
        }
        self.recipe_name, self.recipe = recipe, RECIPES[recipe]
        of_the_report = REPORT_TRAINING.get(name, {}) if train_split == "validation" else {}
        self.settings = settings or {}
        of_models = {field.name for field in fields(ModelArguments)}
        self.model = {**self.recipe.model, **{k: v for k, v in self.settings.items() if k in of_models}}
        self.training = {
            **of_the_report,
            **self.recipe.training,
            **{k: v for k, v in self.settings.items() if k not in of_models},
        }
        self.directory = Path(results) / name / recipe / training_set(train_split, texts_per_label)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.depth = AutoConfig.from_pretrained(resolve_backbone(llm)).get_text_config(decoder=True).num_hidden_layers

    def run(self, points: list[Point]) -> list[dict]:
        """The results of `points`; those that have a file are read, the others measured."""
        missing = [point for point in points if not self._path(point).exists()]
        states = None
        if layers := sorted({layer for point in missing for layer in point.layers}):
            # One pass of the LLM computes the states at these layers of every text that a point will read.
            heads = {point.seed for point in missing if point.kind == "llm"}
            texts = [text for seed in heads for text in self._labelled_texts(seed).train["text"]]
            states = self.build(Point("llm", 0, tuple(layers)), [*texts, *self.mteb_texts])
        results = []
        for number, point in enumerate(points, 1):
            if not self._path(point).exists():  # now: another process may have measured it meanwhile
                logger.info("[%d/%d] %s", number, len(points), point.name)
                write_json(self._path(point), self._measure(point, states))
            results.append(json.loads(self._path(point).read_text()))
            if results[-1].get("settings", {}) != self.settings:
                raise ValueError(
                    f"{self._path(point)} was measured with the settings {results[-1].get('settings', {})}, not "
                    f"{self.settings}. Give other --results, or delete it."
                )
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
        layers = {"llm_layers": list(point.layers)} if point.layers else {}
        run_directory = self.directory / f".{point.name}.run"
        training = HybridTrainingArguments(
            output_dir=str(run_directory),
            seed=point.seed,
            # Without validation texts there is no best checkpoint to go back to, and the training is short.
            **({"save_strategy": "no"} if not self.data["validation_share"] else {}),
            **self.training,
        )
        return (
            ModelArguments(**models, **layers, layer_pooling=point.layer_pooling, **self.model),
            DataArguments(**self.data),
            training,
        )

    def build(self, point: Point, texts=()) -> HybridModule:
        """The model of `point` with its statistics, the states of its training texts and of `texts` cached."""
        model_args, data_args, training = self._arguments(point)
        labelled = self._labelled_texts(point.seed)
        validation_texts = labelled.validation["text"] if labelled.validation else []
        all_texts = [*labelled.train["text"], *validation_texts, *texts]
        module, _ = build_hybrid(
            model_args,
            labelled.unlabelled,
            all_texts,
            data_args.llm_cache_dir,
            data_args.llm_cache_dtype,
            training.device,
            self.recipe.module,
        )
        return module

    def _measure(self, point: Point, states: HybridModule | None) -> dict:
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
            "texts_per_label": self.data["texts_per_label"],
            "backbones": self.models,
            "settings": self.settings,
        }
        head = None
        if point.kind in ("hybrid", "encoder"):
            model, report = fit(model_args, data_args, training, {}, self.recipe.module)
            result |= {"projector_fit": report["projector_fit"], "train_seconds": report["train_seconds"]}
            first, head = model[0], model[2]
        else:
            first = (
                some_layers(states, point.layers, point.layer_pooling)
                if point.kind == "llm"
                else build_encoder(model_args)
            )
        pooling = Pooling(first.get_embedding_dimension(), pooling_mode="mean")
        embedder = SentenceTransformer(modules=[first, pooling], device=training.device)

        # The head and mteb read the same embeddings, so that no text is encoded twice.
        embeddings = dict(zip(self.mteb_texts, encode(embedder, self.mteb_texts)))
        test = [embeddings[text] for text in task_splits(self.task)["test"][self.task.input_column_name]]
        if head is not None:
            with torch.no_grad():
                logits = head({"sentence_embedding": torch.tensor(np.stack(test), device=training.device)})["logits"]
            result["head"] = self._head_scores(logits.argmax(-1).tolist())
        elif point.kind == "llm":
            result["head"] = self._head_scores(
                self._fitted_head(embedder, point.seed).predict(np.stack(test)).tolist()
            )
        if model_args.normalize_embeddings:
            embeddings = dict(zip(embeddings, normalize(np.stack(list(embeddings.values())))))
        scores, correct = self._mteb_scores(lambda texts: np.stack([embeddings[text] for text in texts]))
        shutil.rmtree(training.output_dir, ignore_errors=True)
        return {
            **result,
            "accuracy": scores["accuracy"],
            "f1": scores["f1"],
            "correct": correct,
            "experiments": [
                {metric: experiment[metric] for metric in ("accuracy", "f1")}
                for experiment in scores["scores_per_experiment"]
            ],
            "seconds": round(time.perf_counter() - start, 1),
        }

    @lru_cache(maxsize=1)  # the LLM's points, one a layer, share their texts
    def _labelled_texts(self, seed: int):
        sources = {k: v for k, v in self.data.items() if k != "llm_cache_dir"}
        return load_labelled_texts(**sources, seed=seed)

    def _fitted_head(self, embedder, seed: int) -> LogisticRegression:
        """What the LLM alone, of which nothing is trained, has for a head."""
        train = self._labelled_texts(seed).train
        return LogisticRegression(max_iter=1000).fit(encode(embedder, train["text"]), train["label"])

    def _head_scores(self, predictions: list[int]) -> dict:
        splits = task_splits(self.task)
        labels = splits["test"][self.task.label_column_name]
        classes = sorted(set(splits[self.data["train_split"]][self.task.label_column_name]))
        predictions = [classes[prediction] for prediction in predictions]
        return {**accuracy_and_f1(labels, predictions), "correct": count_correct([predictions], labels)}

    def _mteb_scores(self, embed) -> tuple[dict, str]:
        """mteb's scores of a model whose `embed` turns a list of texts into an array (texts, dim), and for each test
        text how many of mteb's experiments labelled it right, as [`count_correct`] has it."""
        with tempfile.TemporaryDirectory() as directory:
            result = mteb.evaluate(
                _Encoder(embed), self.task, cache=None, show_progress_bar=False, prediction_folder=directory
            )
            (file,) = Path(directory).iterdir()
            (predictions,) = (
                splits["test"] for name, splits in json.loads(file.read_text()).items() if name != "mteb_model_meta"
            )
        (scores,) = result.task_results[0].scores["test"]
        return scores, count_correct(predictions, task_splits(self.task)["test"][self.task.label_column_name])

    @cached_property
    def mteb_texts(self) -> list[str]:
        """The texts, each once, that mteb asks a model to encode for this task."""
        texts = {}

        def record(asked):
            texts.update(dict.fromkeys(asked))
            return np.eye(2)[np.arange(len(asked)) % 2]  # mteb goes on to fit a classifier

        self._mteb_scores(record)
        return list(texts)


def training_set(train_split: str, texts_per_label: int | None) -> str:
    """The name of what a point was trained on: a split, or `train-8`, eight texts a label of one."""
    return f"{train_split}-{texts_per_label}" if texts_per_label else train_split


def count_correct(predictions, labels) -> str:
    """For each text, how many of up to fifteen experiments labelled it right: a string of one hexadecimal digit a text."""
    right = (np.array(predictions) == np.array(labels)).sum(0)
    return "".join(f"{count:x}" for count in right)


def some_layers(states: HybridModule, layers: tuple[int, ...], layer_pooling: str) -> HybridModule:
    """The LLM-only model of some of the layers of `states`, which has their statistics and a cache with every text.

    Its LLM is never run and so never loaded. What stands there has a parameter, by which torch finds the device.
    """
    config = copy.deepcopy(states.model.config)
    rows = [config.llm_layers.index(layer) for layer in layers]
    config.llm_layers, config.layer_pooling = [layers[-1]], layer_pooling
    model = HybridModel(config, llm=nn.Linear(1, 1))  # which has no blocks to listen to for the other layers
    config.llm_layers = list(layers)
    model.standardizer = HiddenStateStandardizer(len(layers), config.hidden_size)
    model.standardizer.load_state_dict(
        {
            name: buffer[rows] if buffer.ndim else buffer
            for name, buffer in states.model.standardizer.state_dict().items()
        }
    )
    cache = states.cache.of_layers(list(layers))
    return type(states)(model.eval(), states.tokenizer, states.max_seq_length, cache)


class _Encoder(AbsEncoder):
    """What mteb takes for a model: a function from texts to embeddings."""

    def __init__(self, embed):
        self.embed = embed
        self.mteb_model_meta = mteb.models.ModelMeta.create_empty({"name": "sweep/point"})

    def encode(self, inputs, **kwargs):
        return self.embed([text for batch in inputs for text in batch["text"]])
