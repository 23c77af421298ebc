"""A server with a model that sees images: its scores are those of the oracle."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from tests.engine.harness import relative_l1
from tests.measured import Measured
from tests.server.live_server import OURS, Server, serve
from tests.server.test_image_requests import data_url, messages
from tests.tiny_vision import make_tiny_vision_model, picture_scores
from vllm_flashtrace.core.weights import TargetWeights

URLS = (data_url(4, 6), data_url(5, 3, seed=1))
OPTIONS = {"preset": "paper", "top_k": None, "hops": 0, "target": {"tokens": [[0, 8]]}}
OPTIONS_OF_TEXT = {"preset": "paper", "hops": 1}


def expected(folder: Path, tokens: list[int]) -> torch.Tensor:
    """The oracle's scores of the eight tokens at the end."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        for url in URLS
    ]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    target = TargetWeights.from_spans([(len(tokens) - 8, len(tokens))])
    return picture_scores(model, processor, tokens, target, pictures)


class Asked:
    """A server, and its answers to a chat with pictures."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder

    def __call__(self, *urls: str, **field: Any) -> Any:
        body = {"messages": messages(*urls), "max_tokens": 8, "temperature": 0.0, **field}
        asked = {"model": "m", "ignore_eos": True, "return_token_ids": True, **body}
        answer = httpx.post(f"{self.server.url}/v1/chat/completions", json=asked, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A server with room for two images in its engine's cache."""
    folder = tmp_path_factory.mktemp("pictures")
    make_tiny_vision_model("qwen3_vl", folder / "vl")
    options = (
        "--limit-mm-per-prompt",
        '{"image": 4, "video": 0}',
        "--block-size=32",
        "--dtype=float32",
        "--mm-processor-cache-gb=0.00002",
    )
    with serve(OURS, str(folder / "vl"), folder / "server.log", *options) as server:
        yield Asked(server, folder / "vl")


@pytest.mark.timeout(480)
def test_scores_are_the_oracles(ask: Asked, measured: Measured) -> None:
    plain = ask(*URLS)  # Now vLLM knows the images, and has sent them to its engine.
    tokens = [*plain["prompt_token_ids"], *plain["choices"][0]["token_ids"]]
    scores = expected(ask.folder, tokens)
    for _ in range(2):
        traced = ask(*URLS, flashtrace=OPTIONS)
        assert traced["choices"][0]["token_ids"] == tokens[-8:]
        found = traced["choices"][0]["flashtrace"]
        assert found["status"] == "completed", found
        ours = torch.tensor([score["score"] for score in found["scores"]])
        error = relative_l1(ours, scores[: len(ours)])
        measured("images", "through a server, the images sent before", qwen3_vl=error)
        assert error <= 1e-5
        assert [image["rows"] for image in found["images"]] == [4, 5]
    assert ask(*URLS)["choices"][0]["token_ids"] == tokens[-8:]


@pytest.mark.timeout(300)
def test_traces_leave_the_cache_of_images_to_vllm(ask: Asked) -> None:
    """No trace makes the engine forget an image that its API server believes to be there."""
    urls = [data_url(4, 6, seed=seed) for seed in range(10, 14)]
    first = [ask(url)["choices"][0]["token_ids"] for url in urls]
    # Blocks in the prefix cache would hide that pixels are missing, but not from vLLM's cache.
    for kept in (0, 1, 2, 3, 3, 1, 0, 2):
        assert ask(urls[kept])["choices"][0]["token_ids"] == first[kept]
        for other in range(4):
            said = [*messages(urls[other]), {"role": "assistant", "content": "The green box."}]
            body = {"model": "m", "messages": said, "flashtrace": OPTIONS_OF_TEXT}
            answer = httpx.post(f"{ask.server.url}/v1/attributions", json=body, timeout=300)
            assert answer.json()["status"] == "completed", answer.text
        assert ask(urls[kept])["choices"][0]["token_ids"] == first[kept]
        traced = ask(urls[(kept + 1) % 4], flashtrace=OPTIONS)["choices"][0]
        assert traced["token_ids"] == first[(kept + 1) % 4]
        assert traced["flashtrace"]["status"] == "completed", traced
        assert ask(urls[kept])["choices"][0]["token_ids"] == first[kept]
