"""The model card of a trained directory, written from its files alone."""

import json
import re
from pathlib import Path

import mteb
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from backbones import HUB_ID, OFFLINE_LLM
from licensing import License
from repository import LOCAL, read_config, read_record

PAPERS = {
    "gemma": "2403.08295, Gemma: Open Models Based on Gemini Research and Technology",
    "gemma2": "2408.00118, Gemma 2: Improving Open Language Models at a Practical Size",
    "gemma3_text": "2503.19786, Gemma 3 Technical Report",
    "qwen3": "2505.09388, Qwen3 Technical Report",
    "roberta": "1907.11692, RoBERTa: A Robustly Optimized BERT Pretraining Approach",
    "xlm-roberta": "1911.02116, Unsupervised Cross-lingual Representation Learning at Scale",
    "bert": "1810.04805, BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    "modernbert": "2412.13663, Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder",
    "sentence-transformers/all-MiniLM-L6-v2": "1908.10084, Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
}
RECIPE = (
    "learning_rate head_learning_rate contrastive_weight contrastive_temperature consistency_weight num_train_epochs "
    "per_device_train_batch_size warmup_steps weight_decay lr_scheduler_type seed"
).split()
# Settings of the LLM's states and the projector.
HYBRID_RECIPE = "projector_learning_rate projector_init standardize projector_dropout layer_dropout".split()


_HUB_LANGUAGE = {"eng": "en"}  # the Hub's usual name; it knows the three letters of mteb too


def hub_ids(record: dict) -> dict[str, str]:
    """The Hub ids of the backbones by role; a backbone that was a local directory has none."""
    names = {role: backbone["name"] for role, backbone in record["backbones"].items()}
    return {role: HUB_ID.get(name, name) for role, name in names.items() if not name.startswith(LOCAL)}


def mteb_results(results: str, revision: str) -> list[dict]:
    """mteb's classification results of the model whose files have the hash `revision` (see `backbone_revision`).

    The same weights may have been measured in several directories: a task counts once.
    """
    found = {}
    for path in sorted(Path(results).glob(f"results/*/{revision}/*.json")):
        result = json.loads(path.read_text()) if path.name != "model_meta.json" else {}
        entries = [scores for split in result.get("scores", {}).values() for scores in split]
        if entries and all("accuracy" in scores and "f1" in scores for scores in entries):
            found[result["task_name"]] = result
    return list(found.values())


def model_card(
    directory: Path,
    repo_id: str,
    license: License,
    licenses: dict[str, License],
    results: list[dict],
    figures: list[str],
) -> ModelCard:
    """The card of the model in `directory`, to be published as `repo_id`.

    Args:
        directory: what `train.py` left in `final/`.
        license: that of the model; `licenses` those of the backbones by role.
        results: from [`mteb_results`].
        figures: paths of pictures in the repository.
    """
    record, config = read_record(directory), read_config(directory)
    bases = hub_ids(record)
    data = ModelCardData(
        language=[_HUB_LANGUAGE.get(code := name.split("-")[0], code) for name in languages(record) or []] or None,
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "feature-extraction", "mteb"]
        + ["text-classification", "custom_code", "hybrid-embedder"] * ("llm" in record["backbones"]),
        base_model=list(bases.values()) or None,
        base_model_relation="finetune" if bases else None,
        datasets=[dataset] if (dataset := hub_dataset(record)) else None,
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(results) or None,
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        _architecture(directory, record, config, bases),
        _usage(repo_id, record, config),
        _training(record),
        _results(results, record),
        *(f"![accuracy against the layer]({figure})" for figure in figures),
        _limits(directory, record),
        _license(licenses, bases),
        _citation(config, bases),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def modifications(directory: Path) -> str:
    """What was changed in the backbones' files, which the licences of Gemma and Llama want said."""
    record, config = read_record(directory), read_config(directory)
    parts = []
    if "llm" in record["backbones"]:
        quantised = record["backbones"]["llm"]["name"] == OFFLINE_LLM
        values = "dequantised from a 4-bit version (Q4_K_M)" if quantised else "as they were but for their precision"
        kept = config.llm_config.num_hidden_layers
        parts.append(f"the LLM's token embeddings and its first {kept} of {config.llm_depth} blocks, {values}")
        if record["settings"]["standardize"]:
            parts.append("statistics of its hidden states")
        if "encoder" in record["backbones"]:
            parts.append("a trained projector")
        parts.append("a classification head")
    if "encoder" in record["backbones"]:
        without = " without its word embeddings" * ("llm" in record["backbones"])
        parts.append(f"the encoder{without}, its weights changed by training")
    return (
        "Modified files: model.safetensors (or its parts) and config.json are not those of the original models. They hold "
        f"{'; '.join(parts)}."
    )


def languages(record: dict) -> list[str] | None:
    """The languages of the training texts as mteb writes them (`eng-Latn`); None where they are not an mteb task's."""
    if not record["settings"]["task"]:
        return None
    metadata = mteb.get_task(record["source"]).metadata
    if not metadata.is_multilingual:
        return list(metadata.eval_langs)
    return list(metadata.eval_langs[record["settings"]["task_subset"] or "en"])


def max_tokens(directory: Path) -> int:
    """After how many tokens `SentenceTransformer` cuts a text."""
    settings = json.loads((directory / "sentence_bert_config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    return settings.get("max_seq_length") or tokenizer["model_max_length"]


def hub_dataset(record: dict) -> str | None:
    """The Hub id of the dataset trained on; None where the texts are the user's own files."""
    settings = record["settings"]
    if settings["task"]:
        return mteb.get_task(record["source"]).metadata.dataset["path"]
    name = settings["dataset"]
    return name if name and not name.startswith(LOCAL) else None


def _eval_results(results: list[dict]) -> list[EvalResult]:
    found = []
    for result in results:
        metadata = mteb.get_task(result["task_name"]).metadata
        for split, entries in result["scores"].items():
            for scores in entries:
                for metric in ("accuracy", "f1"):
                    found.append(
                        EvalResult(
                            task_type="text-classification",
                            task_name="Classification",
                            dataset_type=metadata.dataset["path"],
                            dataset_name=f"MTEB {result['task_name']} ({scores['hf_subset']})",
                            dataset_config=scores["hf_subset"],
                            dataset_split=split,
                            dataset_revision=result["dataset_revision"],
                            metric_type=metric,
                            metric_value=round(100 * scores[metric], 4),  # in percent, as mteb's cards have it
                        )
                    )
    return found


def _architecture(directory: Path, record: dict, config, bases: dict[str, str]) -> str:
    def describe(role):
        backbone = record["backbones"][role]
        link = f"[{bases[role]}](https://huggingface.co/{bases[role]})" if role in bases else "a local checkpoint"
        package = f", from the package `{backbone['name']}`" if backbone["name"] in HUB_ID else ""
        return f"{link}{package}, revision `{backbone['revision']}`"

    rows = []
    if "llm" in record["backbones"]:
        layers = ", ".join(map(str, config.llm_layers))
        merging = "side by side" if config.layer_pooling == "concat" else f"merged by {config.layer_pooling}"
        merged = f", {merging}" if len(config.llm_layers) > 1 else ""
        summary = "A text-embedding model in which a frozen LLM reads the text for a small trained encoder."
        rows += [
            f"| LLM, frozen | {describe('llm')}: hidden states of layer {layers} of {config.llm_depth}{merged} |",
        ]
        if record["settings"]["standardize"]:
            rows.append("| standardisation | each dimension of the states, by statistics of the training texts |")
        if "encoder" in record["backbones"]:
            inputs = config.llm_config.hidden_size * config.layers_side_by_side
            reads = "the projected states in place of word embeddings"
            if config.read_words:
                reads = (
                    "each text twice, from the projected states and from its own word embeddings; both are averaged"
                )
            rows += [
                f"| projector, trained | linear, {inputs} to {config.hidden_size} |",
                f"| encoder, trained | {describe('encoder')}; it reads {reads} |",
            ]
        else:
            summary = "The hidden states of a frozen LLM, standardised and pooled, as text embeddings."
    else:
        summary = "A fine-tuned encoder as a text-embedding model."
        rows.append(f"| encoder, trained | {describe('encoder')} |")
    rows += [
        "| pooling | mean over the text's tokens, padding left out |",
        f"| embedding | {config.hidden_size} dimensions |",
        f"| parameters | {count_parameters(directory)[0] / 1e6:.1f} million |",
    ]
    return "\n".join([summary, "", "| part | |", "|---|---|", *rows])


def count_parameters(directory: Path) -> tuple[int, int]:
    """All weights in the directory's safetensors files, and those of token-embedding tables among them."""
    total = embeddings = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
                embeddings += size if re.search(r"(embed_tokens|word_embeddings|tok_embeddings)\.weight$", name) else 0
    return total, embeddings


def _usage(repo_id: str, record: dict, config) -> str:
    remote = ", trust_remote_code=True" if "llm" in record["backbones"] else ""
    text = f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo_id}"{remote})
embeddings = model.encode(["I wish it had pockets.", "The bus leaves at nine."])
print(model.similarity(embeddings, embeddings))
```"""
    if not remote:
        return text
    text += f"""

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
batch = tokenizer(["I wish it had pockets."], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    embedding = model(**batch).pooler_output  # (1, {config.hidden_size})
```

The classification head of the training is there too:

```python
from transformers import pipeline

classify = pipeline("text-classification", "{repo_id}", trust_remote_code=True)
print(classify("I wish it had pockets.", truncation=True))
```

`trust_remote_code=True` runs the model's code from this repository, two files that import torch and transformers alone.
It needs transformers 5.24 or newer (and sentence-transformers 6.2 or newer for the first way)."""
    return text


def _training(record: dict) -> str:
    settings, texts = record["settings"], record["texts"]
    source = record["source"].removeprefix(LOCAL)
    recipe = [*RECIPE, *(HYBRID_RECIPE if "llm" in record["backbones"] else [])]
    validation = f", {texts['validation']:,} more chose the epoch" if texts["validation"] else ""
    lines = [
        "## Training",
        "",
        f"Trained as a classifier with the labels {', '.join(record['label_names'][:20])}"
        f"{', ...' if len(record['label_names']) > 20 else ''} on {texts['train']:,} texts of {source} (split "
        f"`{settings['train_split']}`){validation}.",
        "",
        "| setting | |",
        "|---|---|",
        *(
            f"| {name} | {settings[name]} |"
            for name in recipe
            if settings.get(name) is not None and (name != "layer_dropout" or settings["layer_pooling"] == "concat")
        ),
    ]
    return "\n".join(lines)


def _results(results: list[dict], record: dict) -> str:
    lines = ["## Results", ""]
    if results:
        lines += [
            "Scores of mteb's few-shot probe: logistic regression on a few texts a label, mean of ten experiments.",
            "",
            "| task | language | split | accuracy | F1 |",
            "|---|---|---|---|---|",
        ]
        for result in results:
            for split, entries in result["scores"].items():
                lines += [
                    f"| {result['task_name']} | {scores['hf_subset']} | {split} | {scores['accuracy']:.4f} | "
                    f"{scores['f1']:.4f} |"
                    for scores in entries
                ]
        sources = {result["dataset_source"] for result in results if "dataset_source" in result}
        if sources:
            lines += ["", "Measured on a local copy of the datasets rather than on the Hub's own."]
        lines.append("")
    for name, metrics in record["metrics"].items():
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        lines.append(f"The classification head of the training on the {name} texts: {values}.")
    return "\n".join(lines) if len(lines) > 2 else ""


def _limits(directory: Path, record: dict) -> str:
    lines = [
        "## Limits",
        "",
        f"- It was tuned for the labels above, on {record['texts']['train']:,} texts; how it does on other tasks, and in "
        "other languages, is to be measured before it is relied on.",
        f"- Texts are cut after {max_tokens(directory)} tokens.",
        "- It has the biases of its backbones and of its training texts.",
    ]
    if "llm" in record["backbones"]:
        lines.append("- float16 is refused, since the LLM's activations overflow it: use float32 or bfloat16.")
    return "\n".join(lines)


def _license(licenses: dict[str, License], bases: dict[str, str]) -> str:
    lines = ["## Licence", ""]
    if any(license.id == "gemma" for license in licenses.values()):
        lines += [
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "[ai.google.dev/gemma/terms](https://ai.google.dev/gemma/terms). This model is a derivative of Gemma: whoever "
            "uses it or passes it on is bound by those terms, the use restrictions of their section 3.2 (the "
            "[Prohibited Use Policy](https://ai.google.dev/gemma/prohibited_use_policy)) included. `NOTICE` says what was "
            "modified, `GEMMA_TERMS_OF_USE.txt` is a copy of the terms.",
            "",
        ]
    if any(license.id.startswith("llama") for license in licenses.values()):
        lines += ["Built with Llama. `NOTICE` says what was modified.", ""]
    lines += [f"- {role}: {bases.get(role, 'a local checkpoint')}, `{license}`" for role, license in licenses.items()]
    lines.append("- model code (`*.py`): `apache-2.0`")
    return "\n".join(lines)


def _citation(config, bases: dict[str, str]) -> str:
    lines = [
        "## Citation",
        "",
        "The idea is that of a student report of 2024, which joined gemma-2b and roberta-base in this way and compared "
        "them on two tasks of MTEB. Frozen LLM states in front of a small model: Bergner et al. 2024, *Think Big, Generate "
        "Quick*, [arXiv:2402.16844](https://arxiv.org/abs/2402.16844). The backbones, as far as their papers are known:",
        "",
    ]
    parts = [getattr(config, name, None) for name in ("llm_config", "encoder_config")]
    keys = [part.model_type for part in parts if part is not None] or [config.model_type]
    for paper in dict.fromkeys(PAPERS[key] for key in [*keys, *bases.values()] if key in PAPERS):
        number, title = paper.split(", ", 1)
        lines.append(f"- *{title}*, [arXiv:{number}](https://arxiv.org/abs/{number})")
    return "\n".join(lines)
