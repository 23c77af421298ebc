"""Bad input and faults inside the engine, on a live server."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.faults import PHASES
from tests.server.live_server import Server
from tests.server.test_bad_input import BAD_FIELDS

pytestmark = pytest.mark.timeout(1200)
PROMPT = "The capital of France is"


def complete(server: Server, **body: Any) -> httpx.Response:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **body}
    # Not httpx's own encoder, which refuses NaN.
    return httpx.post(
        f"{server.url}/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )


def generated_tokens(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=300).text
    return sum(map(float, re.findall(r"^vllm:generation_tokens_total.* (\S+)$", metrics, re.M)))


def rpc(server: Server, method: str, phase: str) -> None:
    call = {"method": method, "args": [phase]}
    httpx.post(f"{server.url}/collective_rpc", json=call, timeout=300).raise_for_status()


MORE_BAD_FIELDS = [
    ("weight NaN", {"target": {"weights": {"0": float("nan")}}}),
    ("weight infinite", {"target": {"weights": {"0": float("inf")}}}),
    ("span beyond max_tokens", {"target": {"tokens": [[0, 9]]}}),
    ("regex that is too large to compile", {"target": {"regex": "((a{99}){99}){99}"}}),
]
ALL = [*BAD_FIELDS, *MORE_BAD_FIELDS]


@pytest.mark.parametrize("value", [v for _, v in ALL], ids=[n for n, _ in ALL])
def test_bad_field(server: Server, value: Any) -> None:
    before = generated_tokens(server)
    response = complete(server, flashtrace=value)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith("flashtrace")
    assert "flashtrace" in error["message"]
    assert generated_tokens(server) == before


def test_beam_search(server: Server) -> None:
    response = complete(server, flashtrace=True, use_beam_search=True, n=2)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "use_beam_search"


@pytest.mark.parametrize("extra", [{}, {"flashtrace": True}])
def test_forged_spec(server: Server, extra: dict[str, Any]) -> None:
    response = complete(server, vllm_xargs={"flashtrace": "AAAA"}, **extra)
    assert response.status_code == 400
    assert "reserved" in response.json()["error"]["message"]


def test_target_that_was_not_generated(server: Server) -> None:
    [choice] = complete(server, flashtrace={"target": {"text": "xylophone"}}).json()["choices"]
    assert choice["text"]
    assert choice["flashtrace"]["status"] == "failed"
    assert choice["flashtrace"]["error"]["code"] == "target_not_found"


@pytest.mark.long  # `tests/engine/test_offline.py` has one that runs always.
def test_completion_that_fills_the_context(server: Server) -> None:
    response = complete(
        server,
        prompt=[500 + i % 3000 for i in range(2048 - 16)],
        max_tokens=16,
        ignore_eos=True,
        flashtrace={"target": {"tokens": [[0, 16]]}, "rows": "target"},
    )
    trace = response.json()["choices"][0]["flashtrace"]
    assert trace["status"] == "completed"
    assert trace["usage"]["dropped_target_tokens"] == 1


@pytest.fixture(scope="module")
def plain(server: Server) -> str:
    text: str = complete(server).json()["choices"][0]["text"]
    return text


# Every run has all phases on an engine (`tests/engine/test_faults.py`), and here one of each kind:
# of the step, of a layer, of the proximity pass, of the result.
ALWAYS = {"observer", "attention", "proximity", "scores"}


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=[] if p in ALWAYS else pytest.mark.long) for p in PHASES]
)
def test_fault_in_the_worker(server: Server, plain: str, phase: str) -> None:
    rpc(server, "break_phase", phase)
    try:
        [choice] = complete(server, flashtrace={"hops": 0}).json()["choices"]
    finally:
        rpc(server, "mend_phase", phase)
    assert choice["text"] == plain
    assert choice["flashtrace"]["status"] == "failed"
    assert choice["flashtrace"]["error"]["code"] == "recording_failed"
    [after] = complete(server, flashtrace={"hops": 0}).json()["choices"]
    assert after["flashtrace"]["status"] == "completed"
    assert after["text"] == plain
