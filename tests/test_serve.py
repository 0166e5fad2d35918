import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, TEXTS
from openai import APIConnectionError, BadRequestError, InternalServerError, OpenAI
from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="module")
def client(trained_run, tmp_path_factory):
    """The real client, connected to `serve.py` with a tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "serve.py", str(trained_run), "--port", str(port)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                client.embeddings.create(model="tiny", input="ready?")
                break
            except (APIConnectionError, InternalServerError):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(trained_run):
    return SentenceTransformer(str(trained_run), trust_remote_code=True, device="cpu").encode(TEXTS)


def test_the_openai_client_gets_the_models_embeddings(client, expected):
    response = client.embeddings.create(model="tiny", input=TEXTS)
    np.testing.assert_allclose([item.embedding for item in response.data], expected, atol=1e-5)
    assert [item.index for item in response.data] == list(range(len(TEXTS)))
    assert response.usage.prompt_tokens == response.usage.total_tokens > len(TEXTS)
    (one,) = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float").data
    np.testing.assert_allclose(one.embedding, expected[0], atol=1e-5)


def test_requests_at_the_same_time_get_each_their_own(client, expected):
    with ThreadPoolExecutor(8) as pool:
        responses = pool.map(lambda i: client.embeddings.create(model="tiny", input=TEXTS[i:]), range(len(TEXTS)))
        for i, response in enumerate(responses):
            np.testing.assert_allclose([item.embedding for item in response.data], expected[i:], atol=1e-5)


@pytest.mark.parametrize("refused", [{"input": [1, 2, 3]}, {"input": [[1], [2]]}, {"input": "x", "dimensions": 7}])
def test_what_it_cannot_embed_is_a_bad_request(client, expected, refused):
    with pytest.raises(BadRequestError):
        client.embeddings.create(model="tiny", **refused)
    (still,) = client.embeddings.create(model="tiny", input=TEXTS[0]).data
    np.testing.assert_allclose(still.embedding, expected[0], atol=1e-5)
