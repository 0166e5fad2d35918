"""Many threads, and many texts, through one model."""

import gc
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from conftest import ROOT, TEXTS
from sentence_transformers import SentenceTransformer

from encoding import encode

THREADS = 8
WARM_UP_TEXTS = 20_000
SOAK_SECONDS = 150


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


def soak(directory: str):
    """Prints the number of texts that were embedded, and the resident MB after the warm-up and each third of the rest."""
    model = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
    process, generator, texts, marks = psutil.Process(), random.Random(0), 0, []
    start = None
    while len(marks) < 4:
        batch = varied_texts(generator, generator.randint(1, 200))
        (encode if texts % 2 else SentenceTransformer.encode)(model, batch)
        texts += len(batch)
        if start is None and texts >= WARM_UP_TEXTS:
            start = time.monotonic()
        if start is not None and time.monotonic() - start >= SOAK_SECONDS * len(marks) / 3:
            gc.collect()
            marks.append(round(process.memory_info().rss / 1e6, 1))
    print(json.dumps([texts, marks]))


@pytest.mark.long
def test_memory_stays_flat(trained_run, fresh_process, monkeypatch):
    """An hour's soak, scaled, in a process of its own: resident memory grows by less than 2%.

    Two caches of bounded size must be full first: the tokenizer's, of 10,000 words, and oneDNN's, of 1,024 matrix
    products by their shape. The latter takes longer than the test to fill, so that it is made smaller here.
    """
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    path = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {path}; import test_load; test_load.soak({str(trained_run)!r})"
    texts, marks = json.loads(fresh_process(code).splitlines()[-1])
    print(f"\n{texts} texts; resident MB after the first {WARM_UP_TEXTS} and after each third of the others: {marks}")
    assert texts > WARM_UP_TEXTS + 1000
    assert max(marks) < marks[0] * 1.02
