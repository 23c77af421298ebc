"""A model that is not proven at the start: every route refuses the field in the proof's words."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from tests.server.live_server import OURS, serve
from tests.tiny_models import make_tiny_model

ASKED = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Which?"}], **ASKED}
PLAIN = {"model": "m", "prompt": "Which?", **ASKED}
GIVEN = {"model": "m", "prompt": "Which?", "completion": " The code is 4821."}


@pytest.mark.timeout(480)
def test_the_words_of_the_proof(tmp_path: Path) -> None:
    # Nothing is as exact as this asks for.
    limit = '--additional-config={"flashtrace": {"probe_limit": 1e-12}}'
    folder = make_tiny_model("llama", tmp_path / "llama")
    with serve(OURS, str(folder), tmp_path / "server.log", limit) as server:

        def answer(route: str, **body: object) -> httpx.Response:
            return httpx.post(f"{server.url}{route}", json=body, timeout=300)

        status = httpx.get(f"{server.url}/v1/attributions/status", timeout=30).json()
        words = status["model"]["reason"]
        assert re.fullmatch(
            r"the proof at the start failed in layer 0 \(model\.layers\.0\.self_attn\.attn\): "
            r"the recomputed attention weights .*: relative error \S+, limit 1e-12",
            words,
        )
        assert (status["status"], status["model"]["supported"]) == ("unsupported_model", False)
        first = answer("/v1/chat/completions", **CHAT).json()["choices"]
        for response in (
            answer("/v1/chat/completions", **CHAT, flashtrace=True),
            answer("/v1/completions", **PLAIN, flashtrace={"hops": 1}, stream=True),
            answer("/v1/attributions", **GIVEN),
        ):
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == "flashtrace" and words in error["message"]
        assert answer("/v1/chat/completions", **CHAT).json()["choices"] == first
        assert answer("/v1/completions", **PLAIN).status_code == 200
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert f"served without attribution: {words}" in log
