"""The real server: `mtp-megatron serve`, concurrent requests, the example client, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mtp_megatron.serving.simulate import Counts, total
from mtp_megatron.serving.verify import compare_counts, padded_drafts
from tests.serving.conftest import NEW_TOKENS

pytestmark = [pytest.mark.serving, pytest.mark.slow]
REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS, STOP_SECONDS = 400, 60


def free_port() -> int:
    """One that is still free when the server has started: below those that systems hand out themselves."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def server(bundle, vllm_python, tmp_path_factory):
    """A running server's address; ended with SIGTERM, and the command must then return 0 with nothing left behind."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mtp_megatron", "serve", str(bundle), "--port", str(port)]
    command += ["--vllm-python", vllm_python, "--", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert status == 0, log.read_text()[-3000:]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health", timeout=5)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no answer in {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def complete(url: str, model: str, prompt: list[int]) -> list[int]:
    """New tokens of one request, sent as ids."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        choice = json.load(reply)["choices"][0]
    return list(choice["token_ids"])


def test_concurrent_requests(server, bundle, simulations):
    """16 requests, 8 at a time: the text of torch, and its acceptances in the server's counters."""
    sys.path.insert(0, str(REPOSITORY / "examples" / "serving"))
    try:
        import client
    finally:
        sys.path.pop(0)
    some = simulations[:16]
    before = client.counters(server)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda simulation: complete(server, str(bundle), list(simulation.prompt)), some))
    assert made == [simulation.text for simulation in some]
    gained = {key: value - before.get(key, 0) for key, value in client.counters(server).items()}
    expected = total(some, 3)
    accepted = tuple(gained[f"accepted_tokens_per_pos[{position}]"] for position in range(3))
    compare_counts("vLLM", Counts(gained["drafts"], accepted), expected, padded=padded_drafts(some))


def test_example_client(server):
    """It streams text and says what each head contributed."""
    done = subprocess.run(
        [sys.executable, "examples/serving/client.py", "--url", server, "--prompt", " ! # %", "--max-tokens", "24"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip()
    assert "tokens per forward pass" in done.stderr
    assert "head 4:" in done.stderr
