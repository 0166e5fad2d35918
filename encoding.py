"""Embeds many texts: each once, in batches of like length under a budget of tokens.

A batch costs its number of texts times its longest text, so batches are cut by tokens and not by texts.
"""

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

# The share of a batch that may be padding.
MAX_PADDING = 0.1


def encode(model: SentenceTransformer, texts, tokens_per_batch: int | None = None, show_progress_bar=False, **kwargs):
    """What `model.encode(texts, **kwargs)` returns as an array (texts, dim), to rounding.

    Args:
        texts: strings; one that comes again is not computed again.
        tokens_per_batch: see [`token_batches`]; by default what suits the model's device.
        kwargs: of `SentenceTransformer.encode`, except for those of its output's type.

    Raises:
        TypeError: one of `texts` is not a string.
    """
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text {position} is not a string but {type(text).__name__}.")
    if not texts:
        return np.empty((0, model.get_embedding_dimension()), dtype=np.float32)
    unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(unique)
    lengths = [
        len(ids) for ids in model.tokenizer(distinct, truncation=True, max_length=model.max_seq_length)["input_ids"]
    ]
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
