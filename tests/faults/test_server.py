# SPDX-License-Identifier: Apache-2.0
"""Generated requests to a running `hmf serve`: none is a failure of the server, none is left in it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.campaign import SIZE, examples
from tests.serving import engines
from tests.serving.scripted import save_scripted

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, which `make test-faults` installs")
pytestmark = [
    pytest.mark.faults,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(SIZE == 1, reason="minutes long: part of `make test-faults`"),
]
HI = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, name of the model) of a server, which ends well after all that."""
    model, log = tmp_path_factory.mktemp("scripted"), tmp_path_factory.mktemp("log") / "server.log"
    save_scripted(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hmf.cli", "serve", str(model), "--", "--port", str(port), "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *engines.SMALL],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 600
    try:
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield address, str(model)
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    assert code == 0, log.read_text()[-3000:]


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.RequestException:
        return False


def answer(server: tuple[str, str]) -> str:
    address, model = server
    reply = requests.post(f"{address}/v1/chat/completions", json={"model": model, **HI}, timeout=120)
    return reply.json()["choices"][0]["message"]["content"]


def unfinished(address: str) -> float:
    """Requests that the server has in hand."""
    lines = requests.get(f"{address}/metrics", timeout=30).text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    found = [line for line in lines if line.startswith(names)]
    assert len(found) >= 2
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_generated_requests(server, campaign):
    address, model = server
    before = answer(server)
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert any(operation.path == "/v1/chat/completions" for operation in operations)
    wrong = {}

    @examples(len(operations))
    @given(st.data())
    def attempt(data):
        operation = data.draw(st.sampled_from(operations))
        case = data.draw(operation.as_strategy(data.draw(st.sampled_from(list(schemathesis.GenerationMode)))))
        if isinstance(case.body, dict) and "model" in case.body and data.draw(st.integers(0, 3)):
            case.body["model"] = model  # else nearly every request ends there
        reply = case.call(timeout=60)
        campaign.count(f"requests: answers {reply.status_code // 100}xx")
        if reply.status_code >= 500 and reply.status_code != 501:  # "The model does not support ..." is an answer
            wrong.setdefault(f"{operation.label}: {reply.status_code}", (case.body, reply.text[:500]))

    attempt()
    until = time.monotonic() + 30
    while (left := unfinished(address)) and time.monotonic() < until:
        time.sleep(0.5)
    assert not left
    assert answer(server) == before
    assert not wrong
