"""What is estimated from the LLM's states before training: their statistics, and a projector that starts in place.

A random projector feeds the encoder inputs that it has never seen, and small data cannot teach it otherwise. So the
projector starts as the ridge regression, over the training texts' tokens, from the standardised LLM states to the
encoder's own word embeddings. The two tokenizers cut a text differently; characters align them: the target of an LLM
token is the mean of the embeddings of the encoder tokens that overlap it.

Both estimates stream over the texts and keep only sufficient statistics, in float64.
"""

import logging

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from backbones import check_tokenizer

logger = logging.getLogger(__name__)

# Candidates for the ridge, as shares of the mean variance of a standardised dimension.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT_EVERY = 10
TEXTS_PER_STEP = 256


def fit_standardizer(model, cache, tokenizer, texts):
    """Sets the mean and deviation of each chosen layer's dimensions over the tokens of `texts`, BOS left out."""
    skip = _bos_tokens(tokenizer)
    count, total, total_of_squares = 0, 0.0, 0.0
    shift = None
    for text in tqdm(texts, desc="Statistics", unit=" texts"):
        states = cache.states(text)[:, skip:].double()
        if shift is None and states.shape[1]:
            # Deviations from some token keep the sums small: a few dimensions have means far from zero.
            shift = states[:, :1]
        if states.shape[1]:
            states = states - shift
            count += states.shape[1]
            total = total + states.sum(1)
            total_of_squares = total_of_squares + (states**2).sum(1)
    if count < 2:
        raise ValueError("The training texts have no tokens to estimate the statistics of the LLM states from.")
    mean = total / count
    deviation = (total_of_squares / count - mean**2).clamp(min=0).sqrt()
    model.standardizer.set_statistics((mean + shift[:, 0]).float(), deviation.float())


def fit_projector(
    model,
    cache,
    tokenizer,
    encoder: str,
    texts,
    max_length: int,
    encoder_revision: str = "main",
    device: str | torch.device = "cpu",
) -> dict:
    """Sets the projector of `model` to the ridge regression onto the word embeddings of `encoder`.

    The ridge is the one of `RIDGES` that predicts every tenth text best from the others; the projector is then fitted
    on all of them. `device` is where the products are summed up; all else is on the CPU.

    Returns:
        `{"r2", "ridge", "tokens"}`: R^2 on the tenth that was held out, over all target dimensions together; the ridge
        chosen; the number of aligned tokens. Of layers side by side, a list of the first two.
    """
    encoder_tokenizer = check_tokenizer(AutoTokenizer.from_pretrained(encoder, revision=encoder_revision), encoder)
    word_embeddings = AutoModel.from_pretrained(encoder, revision=encoder_revision, dtype=torch.float32)
    word_embeddings = word_embeddings.get_input_embeddings().weight.detach()

    # Layers side by side are fitted each alone, and their mean is what the encoder reads: with layer dropout any of them
    # must do without the others.
    parts = model.config.layers_side_by_side
    fitted, held_out = ([_Moments(device) for _ in range(parts)] for _ in range(2))
    for start in tqdm(range(0, len(texts), TEXTS_PER_STEP), desc="Projector", unit=" steps"):
        for i, text in enumerate(texts[start : start + TEXTS_PER_STEP], start):
            rows, targets = aligned_targets(text, tokenizer, encoder_tokenizer, word_embeddings, max_length)
            if not rows:
                continue
            states = cache.states(text).unsqueeze(0)
            with torch.no_grad():
                inputs = model.standardizer(states)[0] if parts > 1 else model.merge_layers(states)
            for moments, part in zip(held_out if (i + 1) % HELD_OUT_EVERY == 0 else fitted, inputs[:, rows]):
                moments.add(part, targets)
        for moments in (*fitted, *held_out):
            moments.flush()
    if not fitted[0].count:
        raise ValueError("No token of the training texts could be aligned between the LLM and the encoder.")

    chosen = []
    for train, test in zip(fitted, held_out):
        chosen.append(
            max((test.r2(*train.solve(ridge)), ridge) for ridge in RIDGES) if test.count else (None, RIDGES[2])
        )
        train.merge(test)
    solved = [moments.solve(ridge) for moments, (_, ridge) in zip(fitted, chosen)]
    linear = model.projector[-1]
    with torch.no_grad():
        linear.weight.copy_(torch.cat([weight for weight, _ in solved]).T)
        linear.bias.copy_(sum(bias for _, bias in solved) / parts)
    r2, ridges = [r2 for r2, _ in chosen], [ridge for _, ridge in chosen]
    logger.info("Projector fitted on %d tokens: held-out R^2 %s, ridge %s", fitted[0].count, r2, ridges)
    if parts == 1:
        r2, ridges = r2[0], ridges[0]
    return {"r2": r2, "ridge": ridges, "tokens": fitted[0].count}


def aligned_targets(text, tokenizer, encoder_tokenizer, word_embeddings, max_length):
    """The positions of the LLM tokens of `text` that overlap an encoder token, and the mean embeddings of those.

    Returns:
        `(rows, targets)`: a list of n token positions, and a tensor (n, encoder hidden size). Special tokens cover no
        characters and so are left out.
    """
    llm_spans = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)["offset_mapping"]
    encoded = encoder_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans, ids = encoded["offset_mapping"], encoded["input_ids"]
    rows, targets = [], []
    first = 0
    for row, (start, end) in enumerate(llm_spans):
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        last = first
        while last < len(spans) and spans[last][0] < end:
            last += 1
        if end > start and last > first:
            rows.append(row)
            targets.append(word_embeddings[ids[first:last]].mean(0))
    return rows, torch.stack(targets) if targets else word_embeddings[:0]


def _bos_tokens(tokenizer) -> int:
    """How many tokens (0 or 1) the tokenizer puts in front of a text."""
    return int(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


class _Moments:
    """Count, sums and products of inputs x (n, p) and targets y (n, q), in float64."""

    def __init__(self, device="cpu"):
        # Double precision is slow on some accelerators and unknown to others (MPS).
        self.device = device if torch.device(device).type == "cuda" else "cpu"
        self.count, self.x, self.y, self.xx, self.xy, self.yy = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        self._pending = []

    def add(self, inputs, targets):
        self._pending.append((inputs, targets))

    def flush(self):
        """Adds what is pending in one matrix product, which is far faster than one a text."""
        if not self._pending:
            return
        x = torch.cat([inputs for inputs, _ in self._pending]).to(self.device).double()
        y = torch.cat([targets for _, targets in self._pending]).to(self.device).double()
        self._pending = []
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + (y**2).sum(0)

    def merge(self, other):
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def solve(self, ridge):
        """Weight (p, q) and bias (q) that minimise |y - x weight - bias|^2 + penalty |weight|^2 / n."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(mean_x, mean_x)
        penalty = ridge * covariance.diagonal().mean()
        covariance.diagonal().add_(penalty.clamp(min=1e-12))
        weight = torch.linalg.solve(covariance, self.xy / self.count - torch.outer(mean_x, mean_y))
        return weight, mean_y - mean_x @ weight

    def r2(self, weight, bias):
        """R^2 of `weight` and `bias` on these moments' tokens, over all target dimensions together."""
        residual = (
            self.yy.sum()
            - 2 * (weight * self.xy).sum()
            - 2 * (bias * self.y).sum()
            + (weight * (self.xx @ weight)).sum()
            + 2 * ((self.x @ weight) * bias).sum()
            + self.count * (bias**2).sum()
        )
        return 1 - (residual / (self.yy - self.y**2 / self.count).sum()).item()
