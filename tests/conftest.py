"""Tiny backbones, made here: random weights, tokenizers trained on a few sentences."""

import json
import os
import random
import shutil
import tempfile

# Nothing here needs the Hub; without this every look-up would wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# datasets and the Hub's client keep what they once read; the tests start from nothing.
_caches = tempfile.TemporaryDirectory(prefix="hf-caches-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_caches.name, "datasets")
os.environ["HF_HUB_CACHE"] = os.path.join(_caches.name, "hub")

import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub import TOKEN, Hub
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

ROOT = Path(__file__).resolve().parent.parent

TEXTS = [
    "I wish the lid had fitted.",
    "The bus leaves at nine.",
    "If only it were larger, I would have kept it!",
    "We walked home along the river and talked about nothing much until it was dark.",
    "A fine pan.",
    "Had they asked, she would have told them everything about the café and its owner.",
    "It works.",
    "He reads two newspapers before breakfast, every day of the week.",
]
VOCABULARY = 200


def llm_configs():
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4, pad_token_id=0)
    gemma = dict(num_key_value_heads=1, head_dim=8, bos_token_id=2, eos_token_id=1)
    return {
        "gemma": GemmaConfig(num_hidden_layers=4, **gemma, **sizes),
        "gemma2": Gemma2Config(num_hidden_layers=4, sliding_window=8, **gemma, **sizes),
        # Seven layers: the sixth has full attention, the others a window shorter than the texts.
        "gemma3": Gemma3TextConfig(num_hidden_layers=7, sliding_window=8, **gemma, **sizes),
        "llama": LlamaConfig(num_hidden_layers=4, bos_token_id=2, eos_token_id=1, **sizes),
        "qwen3": Qwen3Config(num_hidden_layers=4, num_key_value_heads=2, head_dim=8, **sizes),
    }


def encoder_configs():
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return {
        "roberta": RobertaConfig(max_position_embeddings=66, **sizes),
        "xlm-roberta": XLMRobertaConfig(max_position_embeddings=66, **sizes),
        "bert": BertConfig(max_position_embeddings=64, **sizes),
        "modernbert": ModernBertConfig(
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=1,
            sep_token_id=1,
            **sizes,
        ),
    }


def _train_tokenizer(model, trainer, template, specials):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=template, special_tokens=[(s, tokenizer.token_to_id(s)) for s in specials]
            ),
        ]
    )
    return tokenizer


def make_llm_tokenizer() -> PreTrainedTokenizerFast:
    """Like Gemma's: <bos> in front, padded on the left, and with a chat template that must not travel."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()[: VOCABULARY // 2],
    )
    tokenizer = _train_tokenizer(models.BPE(unk_token=None), trainer, "<bos> $A", ["<bos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        chat_template="{{ messages }}",
    )


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    tokenizer = _train_tokenizer(models.BPE(), trainer, "<s> $A </s>", ["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        eos_token="</s>",
        model_max_length=64,
    )


def save_backbone(directory, config, tokenizer, seed) -> str:
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def llm_tokenizer():
    return make_llm_tokenizer()


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory, llm_tokenizer) -> str:
    """The directory of a tiny random Gemma 3 with its tokenizer."""
    return save_backbone(tmp_path_factory.mktemp("llm"), llm_configs()["gemma3"], llm_tokenizer, seed=0)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> str:
    """The directory of a tiny random RoBERTa with its tokenizer."""
    return save_backbone(
        tmp_path_factory.mktemp("encoder"), encoder_configs()["roberta"], make_encoder_tokenizer(), seed=1
    )


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory) -> str:
    """Small datasets laid out as mteb's repositories on the Hub are."""
    generator = random.Random(0)
    words = "the lid bus river pan owner book door café street lamp coat".split()
    root = tmp_path_factory.mktemp("hub")
    for path, labels in (("amazon_counterfactual/en", 2), ("emotion", 6)):
        directory = root / "datasets" / "mteb" / path
        directory.mkdir(parents=True)
        for split, count in (("train", 300), ("validation", 24), ("test", 48)):
            rows = [
                {
                    "text": " ".join(generator.choices(words, k=4)) + f" {i % labels}",
                    "label": i % labels,
                    "label_text": f"l{i % labels}",
                }
                for i in range(count)
            ]
            (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "datasets/mteb/amazon_counterfactual/README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: en/{s}.jsonl\n" for s in ("train", "validation", "test"))
        + "---\n"
    )
    return str(root)


def licensed(directory: str, target: Path, license: str | None) -> str:
    """A copy of a backbone with a model card that names `license`."""
    shutil.copytree(directory, target)
    (target / "README.md").write_text(f"---\nlicense: {license}\n---\n" if license else "A model.\n")
    return str(target)


@pytest.fixture(scope="session")
def licensed_options(tiny_llm, tiny_encoder, dataset_root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("backbones")
    return [
        *("--llm", licensed(tiny_llm, directory / "llm", "gemma"), "--llm_layers", "2"),
        *("--encoder", licensed(tiny_encoder, directory / "encoder", "mit"), "--max_seq_length", "64"),
        *("--task", "AmazonCounterfactual", "--dataset_root", dataset_root, "--max_steps", "3"),
        *("--validation_share", "0", "--llm_cache_dir", str(directory / "states")),
        # So that AutoModel, which pools alone, gives what SentenceTransformer gives.
        "--no_normalize_embeddings",
    ]


@pytest.fixture(scope="session")
def trained_run(licensed_options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    from train import parse_arguments, train

    train(*parse_arguments([*licensed_options, "--output_dir", str(output)]))
    return output / "final"


@pytest.fixture
def final(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "final"))


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def api(hub, monkeypatch) -> HfApi:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def fresh_process(tmp_path):
    """Runs Python code in a process that knows nothing of this checkout: other directory, empty module cache."""

    def run(code: str) -> str:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "PYTHONPATH": "",
        }
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
