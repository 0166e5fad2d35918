"""Many threads, and many texts, through one model."""

import gc
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from conftest import TEXTS
from sentence_transformers import SentenceTransformer

from encoding import encode

THREADS = 8
WARM_UP_TEXTS = 50_000
SOAK_SECONDS = 180


@pytest.fixture(scope="module")
def model(trained_run):
    return SentenceTransformer(str(trained_run), trust_remote_code=True, device="cpu")


def varied_texts(generator: random.Random, count: int, lengths=(1, 60)) -> list[str]:
    """Of one to sixty words, some of them new."""
    words = " ".join(TEXTS).split()
    texts = [" ".join(generator.choices(words, k=generator.randint(*lengths))) for _ in range(count)]
    return [f"{text} {generator.getrandbits(30):x}" for text in texts]


@pytest.fixture
def hurried_threads():
    """Threads take turns far more often than usual, so that they meet where they should not."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("way", [SentenceTransformer.encode, encode], ids=["model.encode", "encoding.encode"])
def test_threads_give_what_one_thread_gives(model, way, hurried_threads):
    # Of like length, so that texts share a batch and need a little padding.
    batches = [varied_texts(random.Random(seed), 4, (9, 10)) for seed in range(20 * THREADS)]
    expected = [way(model, batch) for batch in batches]
    with ThreadPoolExecutor(THREADS) as pool:
        for got, want in zip(pool.map(lambda batch: way(model, batch), batches), expected):
            np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.long
def test_memory_stays_flat(model):
    """An hour's soak, scaled: resident memory grows by less than 2%, once two caches of bounded size are full.

    They are the tokenizer's, of 10,000 words, and oneDNN's, of matrix products by their shape: without them it grows by
    nothing.
    """
    process, generator, texts, marks = psutil.Process(), random.Random(0), 0, []

    def soak(is_over):
        nonlocal texts
        while not is_over():
            batch = varied_texts(generator, generator.randint(1, 200))
            (encode if texts % 2 else SentenceTransformer.encode)(model, batch)
            texts += len(batch)
        gc.collect()
        marks.append(round(process.memory_info().rss / 1e6, 1))

    soak(lambda: texts >= WARM_UP_TEXTS)
    start = time.monotonic()
    for third in (1, 2, 3):
        soak(lambda: time.monotonic() - start >= SOAK_SECONDS * third / 3)
    print(f"\n{texts} texts; resident MB after {WARM_UP_TEXTS} and after each third of the others: {marks}")
    assert texts > WARM_UP_TEXTS + 1000
    assert max(marks) < marks[0] * 1.02
