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
    """An hour's soak, scaled: resident memory grows by less than 2% after the first third."""
    process, generator = psutil.Process(), random.Random(0)
    start, marks, texts = time.monotonic(), {}, 0
    for third in (1, 2, 3):
        while time.monotonic() - start < SOAK_SECONDS * third / 3:
            batch = varied_texts(generator, generator.randint(1, 200))
            (encode if texts % 2 else SentenceTransformer.encode)(model, batch)
            texts += len(batch)
        gc.collect()
        marks[third] = process.memory_info().rss
    print(f"{texts} texts; resident MB after each third: {[round(mark / 1e6, 1) for mark in marks.values()]}")
    assert texts > 1000
    assert marks[3] < marks[1] * 1.02
