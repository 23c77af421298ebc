"""Where a prompt has its images, by hand-made tokens and messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_flashtrace.base.errors import InvalidRequestError, TraceError
from vllm_flashtrace.base.records import PromptImage
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.prompt_images import (
    has_media,
    image_part,
    image_places,
    image_urls,
    refuse_media,
    scored_image,
    without_pictures,
    without_text,
)
from vllm_flashtrace.trace.multimodal import PromptImages, check_images

TOKENS = ["<", "I", "I", "I", "I", ">", "a", "I", "b"]
IMAGES = [PromptImage(0, (1, 2, 3, 4), (0, 6), 2, 2), PromptImage(1, (7,), (7, 8))]
PIXEL = "data:image/png;base64,AA=="
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Look."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": PIXEL}},
            {"type": "input_image", "image_url": "https://pictures.example/a.png"},
            {"image_pil": object()},
        ],
    },
]


def token_text(tokens: list[str]) -> TokenText:
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0).tolist()
    return TokenText("".join(tokens), [0, *ends[:-1]], ends)


@pytest.mark.parametrize(
    ("but_first", "expected"),
    [
        (False, ["<", "", "", "", "", ">", "a", "", "b"]),
        (True, ["<", "I", "", "", "", ">", "a", "I", "b"]),
    ],
)
def test_tokens_of_images_lose_their_text(but_first: bool, expected: list[str]) -> None:
    left = without_text(token_text(TOKENS), IMAGES, but_first=but_first)
    assert left.tokens() == expected
    assert left.text == "".join(expected)
    assert left.starts == sorted(left.starts)


def test_a_prompt_without_images_is_as_it_was() -> None:
    prompt = token_text(TOKENS)
    assert without_text(prompt, [], but_first=False) is prompt


def test_images_of_messages() -> None:
    assert has_media(MESSAGES) and not has_media(MESSAGES[:1])
    assert image_places(MESSAGES, 3) == [(1, 1), (1, 2), (1, 3)]
    assert image_places(MESSAGES, 2) is image_places(None, 1) is None
    assert image_urls(MESSAGES, 3) == [PIXEL, None, None]
    assert image_urls(MESSAGES, 1) == image_urls(None, 0) == []


def test_pictures_are_left_out_of_renderings() -> None:
    bare = without_pictures(MESSAGES)
    assert image_places(bare, 3) == [(1, 1), (1, 2), (1, 3)]
    assert len(set(image_urls(bare, 3))) == 1
    assert bare[1]["content"][0] is MESSAGES[1]["content"][0]
    assert image_urls(MESSAGES, 3)[0] == PIXEL  # The client's own are as they were.


def test_scores_by_part() -> None:
    scores = [0.1 * i for i in range(len(TOKENS))]
    entry = scored_image(IMAGES[0], (1, 1), scores)
    assert (entry["rows"], entry["columns"], entry["tokens"]) == (2, 2, 4)
    assert "kind" not in entry
    assert entry["scores"] == scores[1:5]
    assert entry["score"] == pytest.approx(1.0)
    assert image_part(IMAGES[0], 3) == {"image": 0, "row": 1, "column": 1}
    assert image_part(IMAGES[1], 0) == {"image": 1}
    assert not {"message", "rows"} & scored_image(IMAGES[1], None, scores).keys()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "audio_url", "audio_url": {"url": "x"}},
        {"type": "input_audio", "input_audio": {}},
        {"video_url": {"url": "x"}},
        {"audio_url": None, "uuid": "u"},
        {"type": "image_url", "video_url": {"url": "x"}, "uuid": "u"},
        {"image_url": {}, "uuid": "u"},
        {"type": "image_url", "image_url": {"url": None}, "uuid": "u"},
        {"type": "image_pil", "uuid": "u"},
    ],
)
def test_other_media_are_refused(part: dict[str, Any]) -> None:
    refuse_media(MESSAGES, "messages")
    with pytest.raises(InvalidRequestError) as caught:
        refuse_media([{"role": "user", "content": [part]}], "messages")
    assert caught.value.param == "messages[0].content[0]"


def engine_input(modality: str = "image", grid: tuple[int, ...] = (1, 4, 6), **item: Any) -> Any:
    place = SimpleNamespace(offset=3, length=6, is_embed=None)
    known = {"image_grid_thw": SimpleNamespace(data=torch.tensor(grid))} | item
    return {
        "type": "multimodal",
        "prompt_token_ids": [0] * 12,
        "mm_kwargs": {modality: [known]},
        "mm_hashes": {modality: ["h"]},
        "mm_placeholders": {modality: [place]},
    }


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((1, 4, 6), (2, 3)),
        ((1, 2, 3), (2, 3)),
        ((2, 4, 6), (None, None)),  # Frames of a film.
        ((1, 4, 5), (None, None)),
    ],
)
def test_grids(grid: tuple[int, ...], expected: tuple[int | None, int | None]) -> None:
    images = PromptImages.of(engine_input(grid=grid))
    assert images is not None
    [image] = images.in_prompt
    assert (image.tokens, image.span) == (tuple(range(3, 9)), (3, 9))
    assert (image.rows, image.columns) == expected


def test_tokens_that_only_mark_an_image_are_none_of_its_parts() -> None:
    given = engine_input()
    mask = torch.tensor([False, True, True, False, True, False])
    given["mm_placeholders"]["image"][0].is_embed = mask
    images = PromptImages.of(given)
    assert images is not None
    assert images.in_prompt[0].tokens == (4, 5, 7)


def test_images_behind_the_end_are_left_out() -> None:
    given = engine_input()
    second = SimpleNamespace(offset=10, length=2, is_embed=None)
    given["mm_kwargs"]["image"].append({})
    given["mm_hashes"]["image"].append("other")
    given["mm_placeholders"]["image"].append(second)
    images = PromptImages.of(given)
    assert images is not None
    assert [images.whole(length) for length in (3, 4, 9, 10, 11, 14)] == [3, 9, 9, 10, 12, 14]
    for length, hashes in ((14, ["h", "other"]), (12, ["h", "other"]), (10, ["h"]), (9, ["h"])):
        prompt: Any = images.prompt([0] * length)
        assert prompt["mm_hashes"] == {"image": hashes}
        for of_images in (prompt["mm_kwargs"], prompt["mm_placeholders"]):
            assert len(of_images["image"]) == len(hashes)
    assert images.prompt([0] * 3) == {"prompt_token_ids": [0] * 3}
    for length in (5, 11):
        with pytest.raises(ValueError, match="within an image"):
            images.prompt([0] * length)


def test_what_is_no_image() -> None:
    assert PromptImages.of({"type": "token", "prompt_token_ids": [1]}) is None
    for given, word in (
        (engine_input("video"), "video"),
        ({"type": "embeds"}, "embeds"),
        ({**engine_input(), "mm_kwargs": {"image": [None]}}, "pixels"),
    ):
        with pytest.raises(TraceError, match=word):
            PromptImages.of(given)


@pytest.mark.parametrize("feature", ["later image tokens", "pruned", "elsewhere", "another engine"])
def test_configurations(feature: str) -> None:
    pruned = SimpleNamespace(is_multimodal_pruning_enabled=lambda: feature == "pruned")
    model = SimpleNamespace(
        is_mm_prefix_lm=feature == "later image tokens", multimodal_config=pruned
    )
    transfer = SimpleNamespace(kv_connector="NixlConnector")
    config = SimpleNamespace(
        model_config=model,
        ec_transfer_config=object() if feature == "elsewhere" else None,
        kv_transfer_config=transfer if feature == "another engine" else None,
    )
    with pytest.raises(TraceError, match=feature):
        check_images(config)
