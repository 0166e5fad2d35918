"""Embeds many texts: each once, in batches of like length under a budget of tokens.

A batch costs its number of texts times its longest text, so batches are cut by tokens and not by texts.
"""

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

# The share of a batch that may be padding.
MAX_PADDING = 0.1
# Texts whose tokens are counted at once.
TEXTS_PER_COUNT = 1024


def encode(model: SentenceTransformer, texts, tokens_per_batch: int | None = None, show_progress_bar=False, **kwargs):
    """What `model.encode(texts, **kwargs)` returns as an array (texts, dim), to rounding.

    Several threads may encode through one model.

    Args:
        texts: strings; one that comes again is not computed again.
        tokens_per_batch: see [`token_batches`]; by default what suits the model's device.
        kwargs: of `SentenceTransformer.encode`, except for those of its output's type.

    Raises:
        TypeError: `texts` is a single string, or one of them is not a string.
        ValueError: one of `texts` has a lone surrogate, which no tokenizer takes.
    """
    if isinstance(texts, str):
        raise TypeError("Give a list of texts: a single string would be taken for a list of characters.")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text {position} is not a string but {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text {position} has a lone surrogate at {error.start}: it was decoded wrongly. "
                'Replace it, e.g. with text.encode(errors="replace").decode().'
            ) from error
    if not texts:
        return encode(model, [""], **kwargs)[:0]
    unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(unique)
    lengths = _token_counts(model, distinct)
    embeddings = None
    with tqdm(
        total=sum(lengths), desc="Encoding", unit=" tokens", unit_scale=True, disable=not show_progress_bar
    ) as bar:
        for batch in token_batches(lengths, tokens_per_batch or suitable_tokens_per_batch(model.device)):
            batch_texts = [distinct[i] for i in batch]
            embedded = model.encode(batch_texts, batch_size=len(batch), show_progress_bar=False, **kwargs)
            if embeddings is None:
                embeddings = np.empty((len(distinct), embedded.shape[1]), dtype=embedded.dtype)
            embeddings[batch] = embedded
            bar.update(sum(lengths[i] for i in batch))
    return embeddings[[unique[text] for text in texts]]


def _token_counts(model: SentenceTransformer, texts: list[str]) -> list[int]:
    """The number of tokens of each text, as `model.encode` cuts it."""
    counts = [0] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), TEXTS_PER_COUNT):
        chunk = order[start : start + TEXTS_PER_COUNT]
        # Padded, as `model.encode` asks for it: the tokenizer keeps the setting, and to switch it off here would switch
        # it off for a thread that is about to tokenize its batch.
        masks = model.tokenizer(
            [texts[i] for i in chunk], padding=True, truncation=True, max_length=model.max_seq_length
        )["attention_mask"]
        for i, mask in zip(chunk, masks):
            counts[i] = sum(mask)
    return counts


def token_batches(lengths: list[int], tokens_per_batch: int):
    """Yields lists of indices into `lengths`, the longest texts first.

    A batch has at most `tokens_per_batch` tokens, padding included, and of those at most `MAX_PADDING` is padding. A
    text that is longer than a batch is one of its own.
    """
    batch, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            computed = (len(batch) + 1) * lengths[batch[0]]
            if computed > tokens_per_batch or computed - (tokens + lengths[i]) > MAX_PADDING * computed:
                yield batch
                batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def suitable_tokens_per_batch(device) -> int:
    """On a CPU, larger batches no longer speed up the matrix products and no longer fit its caches."""
    return 1024 if torch.device(device).type == "cpu" else 16384
