"""Training a classifier on text embeddings with sentence-transformers' trainer.

The model in training is a `SentenceTransformer` of three modules: the encoder or the hybrid, mean pooling, and a
[`ClassificationHead`], which is taken off for the embedding model.

In a distributed run a step is that of one process with the texts of all as its batch: the processes divide the same
batches among them, and each takes the losses over the predictions and embeddings of all.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.modules import InputModule, Module
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.util import all_gather, get_rank, get_world_size
from sklearn.metrics import accuracy_score, f1_score
from torch import distributed, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

TRAINED_WEIGHTS = "trained.safetensors"


class HybridModule(InputModule):
    """A [`HybridModel`] in training: the LLM's states of texts that `cache` knows are read from there."""

    def __init__(self, model, tokenizer, max_seq_length: int, cache=None):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.cache = cache

    def preprocess(self, inputs, prompt=None, **kwargs):
        texts = [(prompt or "") + text for text in inputs]
        features = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )
        features = {name: features[name] for name in ("input_ids", "attention_mask")}
        if self.cache is not None and all(text in self.cache for text in texts):
            features["llm_hidden_states"] = self.cache.batch(texts, features["attention_mask"])
        return features

    def forward(self, features, **kwargs):
        names = ["attention_mask", "llm_hidden_states", "separate_readings"]
        if "llm_hidden_states" not in features or self.model.config.read_words:
            names.append("input_ids")
        output = self.model(**{name: features[name] for name in names if name in features})
        if features.get("separate_readings"):
            features["attention_mask"] = features["attention_mask"].repeat(2, 1)
        features["token_embeddings"] = output.last_hidden_state
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.config.hidden_size

    def save(self, output_path, *args, **kwargs):
        raise NotImplementedError("repository.save_repository writes the trained model.")


class ClassificationHead(Module):
    """Linear classifier on the pooled embedding: adds `logits` (batch, labels) to the features."""

    def __init__(self, embedding_dimension: int, num_labels: int):
        super().__init__()
        self.classifier = nn.Linear(embedding_dimension, num_labels)

    def forward(self, features, **kwargs):
        features["logits"] = self.classifier(features["sentence_embedding"].to(self.classifier.weight.dtype))
        return features

    def save(self, output_path, *args, **kwargs):
        raise NotImplementedError("repository.save_repository writes the trained model.")


class ClassificationLoss(nn.Module):
    """Cross-entropy of the head, plus `contrastive_weight` times the supervised contrastive loss of the embeddings.

    With a `consistency_weight` each text is embedded twice: from its words and from the LLM's states, or, by a model with
    one reading, with other dropout and other layers left out. Both views enter the two losses, and `consistency_weight`
    times the symmetric KL divergence of their predictions is added (R-Drop, Liang et al. 2021, arXiv:2106.14448,
    equation 2).

    In a distributed run the losses are those of the whole batch, the same on every process.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        contrastive_weight: float,
        temperature: float,
        consistency_weight: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.contrastive_weight = contrastive_weight
        self.temperature = temperature
        self.consistency_weight = consistency_weight
        # Looked up now: in a distributed run `model` is wrapped later.
        self.reads_twice = isinstance(model[0], HybridModule) and model[0].model.config.read_words

    def forward(self, sentence_features, labels):
        features, outputs = sentence_features[0], ("logits", "sentence_embedding")
        if self.consistency_weight and self.reads_twice:
            embedded = self.model({**features, "separate_readings": True})
            views = list(zip(*(embedded[name].chunk(2) for name in outputs)))
        else:
            passes = [self.model(dict(features)) for _ in range(2 if self.consistency_weight else 1)]
            views = [tuple(embedded[name] for name in outputs) for embedded in passes]
        views = [gather_batch(*view, labels) for view in views]
        logits, embeddings, labels = (torch.cat(parts) for parts in zip(*views))
        # With --bf16 the similarities would lose the digits that the contrastive loss lives on.
        with torch.autocast(embeddings.device.type, enabled=False):
            losses = {"cross_entropy": nn.functional.cross_entropy(logits.float(), labels)}
            if self.contrastive_weight:
                contrastive = supervised_contrastive_loss(embeddings, labels, self.temperature)
                losses["supervised_contrastive"] = self.contrastive_weight * contrastive
            if self.consistency_weight:
                losses["consistency"] = self.consistency_weight * symmetric_divergence(*logits.float().chunk(2))
        if not all(torch.isfinite(loss) for loss in losses.values()):
            raise ValueError(
                "The training loss is NaN or infinite: the weights of a backbone are damaged, or the learning rate is too "
                "high."
            )
        return losses


def symmetric_divergence(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Half the sum of both KL divergences between two predictions (batch, labels) of the same texts, mean over the texts.

    Together the two are the sum of (p - q) (log p - log q).
    """
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def gather_batch(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The rows that all processes have of each of `tensors`, which on one process have the same number of rows.

    Gradients flow back to the process that a row comes from, summed over the processes. Each takes the same loss of the
    same rows, so the mean over the processes, which DDP takes, is the gradient of that loss.
    """
    if get_world_size() == 1:
        return list(tensors)
    sizes = all_gather(torch.tensor([len(tensors[0])], device=tensors[0].device)).tolist()
    longest = max(sizes)
    gathered = []
    for tensor in tensors:
        padded = nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, longest - len(tensor)))
        parts = all_gather(padded, with_grad=tensor.requires_grad).split(longest)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes)]))
    return gathered


def supervised_contrastive_loss(embeddings: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """L_out of Khosla et al. 2020 ("Supervised Contrastive Learning", arXiv:2004.11362), equation 2.

    Args:
        embeddings (batch, dim): normalised here to length 1.
        labels (batch): texts with the same label are positives of each other.

    Returns:
        The mean over the texts that have a positive in the batch; zero where none has.
    """
    embeddings = nn.functional.normalize(embeddings.float(), dim=-1)
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (embeddings @ embeddings.T / temperature).masked_fill(~others, float("-inf"))
    log_probability = similarity - similarity.logsumexp(dim=1, keepdim=True)
    positives = (labels[:, None] == labels[None, :]) & others
    num_positives = positives.sum(1)
    per_text = -log_probability.masked_fill(~positives, 0.0).sum(1) / num_positives.clamp(min=1)
    return per_text.sum() / (num_positives > 0).sum().clamp(min=1)


class HeadEvaluator(BaseEvaluator):
    """Accuracy and macro F1 of the head's predictions."""

    def __init__(self, texts, labels, batch_size: int = 64):
        super().__init__()
        self.texts, self.labels, self.batch_size = list(texts), list(labels), batch_size
        self.primary_metric = "accuracy"

    def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
        was_training = model.training
        model.eval()
        order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i]))
        predictions = [0] * len(order)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            features = model.preprocess([self.texts[i] for i in batch])
            features = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in features.items()}
            with torch.no_grad():
                logits = model(features)["logits"]
            for i, prediction in zip(batch, logits.argmax(-1).tolist()):
                predictions[i] = prediction
        model.train(was_training)
        return accuracy_and_f1(self.labels, predictions)


def accuracy_and_f1(labels, predictions) -> dict[str, float]:
    """Accuracy and macro F1."""
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": float(f1_score(labels, predictions, average="macro")),
    }


class EpochBatchSampler(DefaultBatchSampler):
    """Batches of texts of like length, so that little is padded, in random order.

    The order depends on seed and epoch alone: a run resumed in epoch n sees the batches of an undisturbed one. In a
    distributed run the batches are those of one process with `batch_size` times their number, and each process gets its
    part of each: with n of them every n-th text, so that the parts are alike in length and differ by at most a text. A
    batch with fewer texts than processes goes to each of them whole, which leaves the mean of its losses as it is.
    """

    def __init__(self, dataset, batch_size: int, **kwargs):
        super().__init__(dataset, batch_size * get_world_size(), **kwargs)
        self.lengths = [len(text) for text in dataset["text"]]

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self.drop_last and len(batches[-1]) < self.batch_size:
            batches.pop()
        for i in torch.randperm(len(batches), generator=generator).tolist():
            whole = len(batches[i]) < get_world_size()
            yield batches[i] if whole else batches[i][get_rank() :: get_world_size()]


class HybridTrainer(SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` whose checkpoints hold the head too, and not the frozen LLM."""

    def get_train_dataloader(self):
        # The sampler has divided the batches. accelerate would divide them too: it drops what is not full, and forgets
        # the epoch when a run goes on in the middle of one.
        dataloader = self._build_dataloader(self.train_dataset, self.args.train_batch_size, dataset_kind="train")
        return prepare_data_loader(dataloader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def _save(self, output_dir=None, state_dict=None):
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        save_file(trained_state(self.model), output_dir / TRAINED_WEIGHTS)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if get_world_size() > 1:
            # The first process writes `trainer_state.json` next, which says that the checkpoint is complete.
            distributed.barrier()

    def _load_best_model(self):
        # sentence-transformers would only log that it could not, and end with the last weights.
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, checkpoint_path):
        load_trained_state(self.model, checkpoint_path)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `model` apart from the frozen LLM's."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not re.search(r"(^|\.)llm\.", name)
    }


def load_trained_state(model: nn.Module, checkpoint_path):
    state = load_file(Path(checkpoint_path) / TRAINED_WEIGHTS)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not re.search(r"(^|\.)llm\.", name)]
    if missing or unexpected:
        raise ValueError(f"{checkpoint_path} is of another model: missing {missing[:3]}, unexpected {unexpected[:3]}.")


def last_complete_checkpoint(output_dir, num_processes: int = 1) -> str | None:
    """The newest checkpoint that was written to its end; what a killed run left half-written or half-deleted is removed.

    The trainer writes a checkpoint's `trainer_state.json` last, and deletes its files in any order.
    """
    random_states = [f"rng_state_{process}.pth" for process in range(num_processes)]
    needed = [TRAINED_WEIGHTS, OPTIMIZER_NAME, SCHEDULER_NAME]
    needed += random_states if num_processes > 1 else ["rng_state.pth"]
    checkpoints = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            step = json.loads((path / TRAINER_STATE_NAME).read_text())["global_step"]
            complete = all((path / name).exists() for name in needed)
        except (OSError, ValueError):
            complete = False
        if complete:
            checkpoints[step] = path
        else:
            shutil.rmtree(path)
    return str(checkpoints[max(checkpoints)]) if checkpoints else None
