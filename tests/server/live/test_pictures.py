"""A server with a model that sees images: its scores are those of the oracle."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from tests.engine.harness import relative_l1
from tests.oracle import oracle_scores
from tests.server.live_server import OURS, serve
from tests.server.test_image_requests import data_url, messages
from tests.tiny_vision import IMAGE_TOKEN, make_tiny_vision_model
from vllm_flashtrace.core.weights import TargetWeights

URLS = (data_url(4, 6), data_url(5, 3, seed=1))
OPTIONS = {"preset": "paper", "top_k": None, "hops": 0, "target": {"tokens": [[0, 8]]}}


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
    seen = processor(images=pictures, return_tensors="pt")
    target = TargetWeights.from_spans([(len(tokens) - 8, len(tokens))])
    return oracle_scores(
        model,
        tokens,
        target.positions,
        target.weights,
        mm_token_type_ids=(torch.tensor([tokens]) == IMAGE_TOKEN).int(),
        pixel_values=seen["pixel_values"].double(),
        image_grid_thw=seen["image_grid_thw"],
    )


@pytest.mark.timeout(480)
def test_scores_are_the_oracles(tmp_path: Path) -> None:
    folder = make_tiny_vision_model("qwen3_vl", tmp_path / "vl")
    limits = (
        "--limit-mm-per-prompt",
        '{"image": 4, "video": 0}',
        "--block-size=32",
        "--dtype=float32",
    )
    with serve(OURS, str(folder), tmp_path / "server.log", *limits) as server:

        def ask(**field: Any) -> Any:
            body = {"messages": messages(*URLS), "max_tokens": 8, "temperature": 0.0, **field}
            asked = {"model": "m", "ignore_eos": True, "return_token_ids": True, **body}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=300)
            assert answer.status_code == 200, answer.text
            return answer.json()

        plain = ask()  # Now vLLM knows the images, and has sent them to its engine.
        tokens = [*plain["prompt_token_ids"], *plain["choices"][0]["token_ids"]]
        scores = expected(folder, tokens)
        for _ in range(2):
            traced = ask(flashtrace=OPTIONS)
            assert traced["choices"][0]["token_ids"] == tokens[-8:]
            found = traced["choices"][0]["flashtrace"]
            assert found["status"] == "completed", found
            ours = torch.tensor([score["score"] for score in found["scores"]])
            error = relative_l1(ours, scores[: len(ours)])
            print(f"relative L1 {error:.1e}")
            assert error <= 1e-5
            assert [image["rows"] for image in found["images"]] == [4, 5]
        assert ask()["choices"][0]["token_ids"] == tokens[-8:]
