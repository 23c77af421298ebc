"""Traces of prompts with images through the engine, against the oracle, which sees the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.measured import Measured
from tests.tiny_vision import PIXELS, VISION_FAMILIES, make_tiny_vision_model, picture_scores
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.multimodal import PromptImages

BOUND = 1e-3


def image(rows: int, columns: int, seed: int) -> Image.Image:
    noise = numpy.random.default_rng(seed).integers(0, 255, (rows * PIXELS, columns * PIXELS, 3))
    return Image.fromarray(noise.astype(numpy.uint8))


IMAGES = (image(4, 6, 0), image(5, 3, 1))


def chat(*texts_and_images: Any) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_pil", "image_pil": part}
        for part in texts_and_images
    ]
    return [{"role": "user", "content": parts}]


MESSAGES = chat(
    "The harbour master wrote the tide times. ",
    IMAGES[0],
    "Which box holds the key? ",
    IMAGES[1],
    "Think step by step, then give the final answer.",
)


class Seen:
    """An engine with a model that sees images, and the same model as the oracle runs it."""

    def __init__(self, folder: Path, family: Any, **arguments: Any) -> None:
        import transformers

        make_tiny_vision_model(family, folder)
        self.family = family
        self.engine = Engine(
            folder,
            f"a model that sees images: {family}",
            max_model_len=1024,
            block_size=32,
            max_num_batched_tokens=64,
            limit_mm_per_prompt={"image": 4, "video": 0},
            **{"in_process": True, **arguments},
        )
        self.reference = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).double()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def answer(self, messages: Any, new_tokens: int = 24) -> tuple[list[int], PromptImages]:
        """Prompt and completion, and the images of the prompt."""
        from vllm import SamplingParams

        from vllm_flashtrace.offline.engine import noting_inputs

        llm = self.engine.llm
        with noting_inputs(llm) as inputs:
            [output] = llm.chat(
                messages,
                SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True),
                use_tqdm=False,
            )
        images = PromptImages.of(inputs[0])
        assert images is not None
        return [*output.prompt_token_ids, *output.outputs[0].token_ids], images

    def expected(self, tokens: list[int], target: TargetWeights, messages: Any) -> torch.Tensor:
        """The oracle's scores."""
        parts = [part for message in messages for part in message["content"]]
        pictures = [part["image_pil"] for part in parts if "image_pil" in part]
        return picture_scores(self.reference, self.processor, tokens, target, pictures)


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Seen]:
    seen = Seen(tmp_path_factory.mktemp("vision") / request.param, request.param)
    yield seen
    seen.engine.close()


def last(tokens: list[int], count: int) -> TargetWeights:
    length = len(tokens)
    return TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(length - count, length)})


def test_scores_are_the_oracles(seen: Seen, measured: Measured) -> None:
    tokens, images = seen.answer(MESSAGES)
    [first, second] = images.in_prompt
    assert (first.rows, first.columns, len(first.tokens)) == (4, 6, 24)
    assert (second.rows, second.columns, len(second.tokens)) == (5, 3, 15)
    target = last(tokens, 20)
    expected = seen.expected(tokens, target, MESSAGES)
    report = seen.engine.trace(TraceJob(tokens, target, images=images))
    error = relative_l1(report.scores, expected)
    measured("images", "two images, prefix cached", **{seen.family: error})
    assert error <= BOUND / 100
    assert report.cached_tokens > second.tokens[-1]


def test_batches(seen: Seen, measured: Measured) -> None:
    """Several traces with images in chunks of 64 tokens, beside requests with and without any."""
    asked = [MESSAGES, chat("The key is in the box of ", IMAGES[1], " and not here.")]
    answers = [seen.answer(messages) for messages in asked]
    jobs = [TraceJob(tokens, last(tokens, 30), images=images) for tokens, images in answers]
    seen.engine.llm.reset_prefix_cache()
    reports = seen.engine.trace_many(jobs, [answers[0][0][70:], answers[1][0][40:]], 20)
    errors = [
        relative_l1(report.scores, seen.expected(tokens, job.weights, messages))
        for (tokens, _), messages, job, report in zip(answers, asked, jobs, reports, strict=True)
    ]
    row = "all computed again, in chunks of 64 tokens, beside other requests"
    measured("images", row, **{seen.family: max(errors)})
    assert max(errors) <= BOUND / 100


def test_hops_from_one_prefill(seen: Seen) -> None:
    tokens, images = seen.answer(MESSAGES)
    length = len(tokens)
    target, followed = last(tokens, 10), torch.zeros(length, dtype=torch.bool)
    followed[-24:-10] = True
    further = FurtherHops(followed.nonzero().flatten(), 2)
    report = seen.engine.trace(TraceJob(tokens, target, images=images, further=further))
    weights = target
    for scores in (report.scores, *report.later_scores):
        expected = seen.expected(tokens, weights, MESSAGES)
        assert relative_l1(scores, expected) <= BOUND / 100
        share = expected / expected.sum() * followed
        weights = TargetWeights.from_mapping(
            {i: float(w) for i, w in enumerate(share) if followed[i]}
        )
    assert len(report.later_scores) == 2


def test_targets_in_front_of_an_image_and_within_one(seen: Seen) -> None:
    """A trace ends at its last target; it has the images in front of it, each of them whole."""
    tokens, images = seen.answer(MESSAGES)
    first, second = images.in_prompt
    for end, count in ((second.span[0] - 2, 1), (second.tokens[3], 2), (first.span[0] - 1, 0)):
        target = TargetWeights.from_spans([(end - 4, end)])
        cut = tokens[: images.whole(end)]
        assert len(images.prompt(cut).get("mm_hashes", {"image": ()})["image"]) == count  # type: ignore[attr-defined]
        expected = seen.expected(tokens, target, MESSAGES)[: len(cut)]
        report = seen.engine.trace(TraceJob(cut, target, images=images))
        assert relative_l1(report.scores, expected) <= BOUND / 100


@pytest.mark.parametrize("hops", [1, 3])
def test_earlier_turns_with_images_behind_them(seen: Seen, hops: int) -> None:
    """Hops of their own end in the assistant's turn, the last tokens of which are an image's."""
    from vllm_flashtrace import FlashTrace

    [said] = chat("It is in this box: ", IMAGES[0])
    turns = [*chat("Where is the key?"), {**said, "role": "assistant"}, *chat("Or?", IMAGES[1])]
    options = {"top_k": None, "recurse_over": "assistant", "hops": hops, "include": ["hops"]}
    answer = FlashTrace(llm=seen.engine.llm).attribute(turns, "In the other one.", options)
    assert answer.status == "completed", answer.error
    assert [image["message"] for image in answer.images] == [1, 2]


def test_another_image_is_another_trace(seen: Seen, measured: Measured) -> None:
    """What a mistake would cost: no pixels, or those of another image of the same size."""
    messages = chat("Which box holds the key? ", IMAGES[0])
    tokens, images = seen.answer(messages)
    _, others = seen.answer(chat("Which box holds the key? ", image(4, 6, 2)))
    target = last(tokens, 20)
    expected = seen.expected(tokens, target, messages)
    cases = {"without the pixels": None, "with those of another image": others, "": images}
    for name, given in cases.items():
        report = seen.engine.trace(TraceJob(tokens, target, images=given))
        error = relative_l1(report.scores, expected)
        if name:
            measured("images", f"what it would be {name}", **{seen.family: error})
        assert (error <= BOUND / 100) is (given is images)
        assert given is images or error > 10 * BOUND


def test_lost_blocks_are_computed_from_the_pixels_again(seen: Seen) -> None:
    tokens, images = seen.answer(MESSAGES)
    target = last(tokens, 20)
    seen.engine.llm.reset_prefix_cache()
    seen.engine.llm.reset_mm_cache()
    report = seen.engine.trace(TraceJob(tokens, target, images=images))
    assert report.cached_tokens == 0
    error = relative_l1(report.scores, seen.expected(tokens, target, MESSAGES))
    print(f"relative L1 {error:.1e}")
    assert error <= BOUND / 100


def test_offline(seen: Seen) -> None:
    from vllm import SamplingParams

    from vllm_flashtrace import FlashTrace

    ft = FlashTrace(llm=seen.engine.llm)
    options = {
        "preset": "paper",
        "top_k": None,
        "hops": 0,
        "target": {"tokens": [[0, 12]]},
        "include": ["segments", "tokens"],
    }
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    [answer] = ft.generate(MESSAGES, params, options)
    assert answer.status == "completed", answer.error
    tokens, images = seen.answer(MESSAGES, 12)
    target = TargetWeights.from_spans([(len(tokens) - 12, len(tokens))])
    expected = seen.expected(tokens, target, MESSAGES)
    expected = (expected / expected.sum())[: len(answer.scores)]
    scores = torch.tensor([score.score for score in answer.scores], dtype=torch.float64)
    assert float((scores - expected).abs().sum()) <= BOUND / 100
    first, second = answer.images
    assert (first["rows"], first["columns"], first["message"], first["part"]) == (4, 6, 0, 1)
    assert (second["rows"], second["columns"], second["message"], second["part"]) == (5, 3, 0, 3)
    for entry, image in zip(answer.images, images.in_prompt, strict=True):
        assert entry["scores"] == [answer.scores[token].score for token in image.tokens]
        where = [
            (score.token, score.image, score.row, score.column)
            for score in (answer.scores[token] for token in image.tokens)
        ]
        assert where == [
            ("", image.index, row, column)
            for row in range(image.rows or 0)
            for column in range(image.columns or 0)
        ]
    user = answer.segments[0]
    texts = [score.score for score in answer.scores if score.start is not None]
    assert user["score"] == pytest.approx(sum(texts) + first["score"] + second["score"])
    assert sum(score.start is not None for score in answer.scores) > 30
    # The same answer as a text that exists.
    given = ft.attribute(MESSAGES, tokens[-12:], options)
    assert [score.score for score in given.scores] == pytest.approx(
        [score.score for score in answer.scores], abs=1e-6
    )


@pytest.mark.parametrize("option", [{"verify": 1}, {"guard": True}])
def test_refusals(seen: Seen, option: dict[str, Any]) -> None:
    from vllm_flashtrace import FlashTrace

    ft = FlashTrace(llm=seen.engine.llm)
    ft._reads_tool_calls = True
    options = {"targets": "claims", **option} if "guard" in option else option
    [answer] = ft.generate(MESSAGES, None, options)
    assert (answer.error or {})["code"] == "unsupported_input"


def test_other_media_are_refused(seen: Seen) -> None:
    from vllm_flashtrace import FlashTrace
    from vllm_flashtrace.base.errors import InvalidRequestError

    ft = FlashTrace(llm=seen.engine.llm)
    messages = [{"role": "user", "content": [{"video_url": "https://pictures.example/a.mp4"}]}]
    for attribute in (ft.generate, lambda asked: ft.attribute(asked, "Green.")):
        with pytest.raises(InvalidRequestError, match="video_url parts"):
            attribute(messages)
