"""Requests with images on all routes: what traces are given, and what answers say of the images."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import numpy
import pytest
import pytest_asyncio
import torch
from PIL import Image

from tests.api.samples import check_described
from tests.server.scripted_app import App, build
from tests.server.test_deferred import pending, until
from tests.tiny_vision import IMAGE_TOKEN, PIXELS, make_tiny_vision_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "Which box holds the key?"


def data_url(rows: int, columns: int, seed: int = 0) -> str:
    noise = numpy.random.default_rng(seed).integers(0, 255, (rows * PIXELS, columns * PIXELS, 3))
    file = io.BytesIO()
    Image.fromarray(noise.astype(numpy.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


URL = data_url(4, 6)
MULTI_MODAL_INPUT = {
    "arrival_time",
    "cache_salt",
    "mm_hashes",
    "mm_kwargs",
    "mm_placeholders",
    "prompt",
    "prompt_token_ids",
    "type",
}


def messages(*urls: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]},
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seeing(plugins: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    folder = make_tiny_vision_model("qwen2_5_vl", tmp_path_factory.mktemp("seeing") / "vl")
    app = await build(
        str(folder),
        "--dtype=float32",
        "--limit-mm-per-prompt",
        '{"image": 2}',
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    )
    yield app
    await app.client.aclose()


@pytest.fixture
def app(seeing: App) -> App:
    seeing.engine.reset()
    return seeing


def check_traces(app: App, images: int = 1) -> None:
    """Every trace has the completion's images, with their pixels."""
    [generation] = app.engine.generations
    assert set(generation.prompt) <= MULTI_MODAL_INPUT
    assert app.engine.traces
    for trace in app.engine.traces:
        assert trace.prompt["type"] == "multimodal"
        for key in ("mm_hashes", "mm_placeholders"):
            assert trace.prompt[key] == generation.prompt[key]
        items = trace.prompt["mm_kwargs"]["image"]
        assert len(items) == images
        assert all(item["pixel_values"].data.numel() for item in items)
        prompt = generation.prompt["prompt_token_ids"]
        assert trace.prompt["prompt_token_ids"][: len(prompt)] == prompt


async def test_an_image_has_scores(app: App) -> None:
    for _ in range(2):  # The second time vLLM knows the image.
        app.engine.reset()
        app.engine.trace_scores = lambda length: torch.arange(length, dtype=torch.float32)
        options = {"top_k": None, "include": ["segments", "tokens"], "hops": 0}
        answer = await app.chat(messages=messages(URL), flashtrace=options)
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"][0]["flashtrace"]
        assert found["status"] == "completed", found
        check_described(found)
        check_traces(app)
        [image] = found["images"]
        assert {key: image[key] for key in ("index", "message", "part", "rows", "columns")} == {
            "index": 0,
            "message": 1,
            "part": 0,
            "rows": 4,
            "columns": 6,
        }
        own = [score for score in found["scores"] if score["token_id"] == IMAGE_TOKEN]
        assert [score["score"] for score in own] == image["scores"]
        assert [(score["row"], score["column"]) for score in own[5:8]] == [(0, 5), (1, 0), (1, 1)]
        assert {score["token"] for score in own} == {""}
        assert image["score"] == pytest.approx(sum(image["scores"]))
        texts = [
            score["token"]
            for score in found["scores"]
            if score.get("message") == 1 and score["token"]
        ]
        assert "".join(texts) == QUESTION
        assert "<|vision_start|><|vision_end|>" in "".join(found["tokens"])
        user = next(segment for segment in found["segments"] if segment.get("message") == 1)
        assert user["score"] > image["score"]


async def test_top_tokens_tell_where_in_the_image(app: App) -> None:
    app.engine.trace_scores = lambda length: torch.arange(length, 0, -1.0)
    answer = await app.chat(
        messages=messages(data_url(3, 5), URL), flashtrace={"top_k": 40, "scope": "content"}
    )
    found = answer.json()["choices"][0]["flashtrace"]
    check_traces(app, 2)
    assert [image["rows"] for image in found["images"]] == [3, 4]
    parts = [score for score in found["scores"] if "image" in score]
    assert [(score["image"], score["row"], score["column"]) for score in parts[14:16]] == [
        (0, 2, 4),
        (1, 0, 0),
    ]
    assert parts[15]["part"] == 1


async def test_streams_and_deferred_ones(app: App) -> None:
    answer = await app.chat(messages=messages(URL), flashtrace=True, stream=True)
    assert '"images":[' in answer.text.replace(" ", "")
    check_traces(app)
    app.engine.reset()
    answer = await app.chat(messages=messages(URL), flashtrace={"mode": "deferred"})
    name = answer.json()["choices"][0]["flashtrace"]["id"]
    await until(lambda: not pending(app))
    kept = await app.client.get(f"/v1/attributions/{name}")
    assert len(kept.json()["images"]) == 1, kept.text


async def test_text_that_exists(app: App) -> None:
    said = [*messages(URL), {"role": "assistant", "content": "The small green box."}]
    answer = await app.post("/v1/attributions", messages=said, flashtrace={"top_k": 5})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["status"] == "completed", found
    assert (found["images"][0]["rows"], found["images"][0]["message"]) == (4, 1)
    assert app.engine.traces
    assert all(trace.prompt["type"] == "multimodal" for trace in app.engine.traces)


async def test_responses_and_messages(app: App) -> None:
    content = [
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    answer = await app.post(
        "/v1/responses", input=[{"role": "user", "content": content}], flashtrace=True
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()["output"][-1]["flashtrace"]
    assert found["images"][0]["rows"] == 4, found
    check_traces(app)
    app.engine.reset()
    source = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    answer = await app.post(
        "/v1/messages",
        messages=[{"role": "user", "content": content}],
        max_tokens=8,
        flashtrace=True,
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()["flashtrace"]
    assert found["images"][0]["rows"] == 4, found
    check_traces(app)


@pytest.mark.parametrize("option", [{"verify": 1}, {"guard": True, "targets": "claims"}])
async def test_what_is_refused_beside_images(app: App, option: dict[str, Any]) -> None:
    said = [*messages(URL), {"role": "assistant", "content": "The small green box."}]
    source = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}
    user = {"role": "user", "content": [{"type": "image", "source": source}]}
    seen = {
        "role": "user",
        "content": [{"type": "input_image", "image_url": URL, "detail": "auto"}],
    }
    for path, body in (
        ("/v1/chat/completions", {"messages": messages(URL)}),
        ("/v1/chat/completions", {"messages": messages(URL), "stream": True}),
        ("/v1/attributions", {"messages": said}),
        ("/v1/responses", {"input": [seen]}),
        ("/v1/messages", {"messages": [user], "max_tokens": 8}),
    ):
        answer = await app.post(path, flashtrace=option, **body)
        assert answer.status_code == 400, (path, answer.text)
        error = answer.json()["error"]
        assert "prompts with images" in error["message"], (path, error)
        if path != "/v1/messages":  # Anthropic's errors have no such key.
            assert error["param"] == f"flashtrace.{next(iter(option))}", path
    assert not app.engine.calls


def sent_images(app: App) -> list[bool]:
    """Of the images of all generations in order, whether their pixels went to the engine."""
    return [
        item is not None
        for call in app.engine.generations
        for item in call.prompt["mm_kwargs"]["image"]
    ]


async def test_a_request_without_the_field_is_vllms(app: App) -> None:
    """Traced ones in between change nothing of what vLLM sends, and are sent like others."""
    first, second = data_url(4, 6, seed=8), data_url(4, 6, seed=9)
    said = [*messages(second), {"role": "assistant", "content": "The small green box."}]
    answer = await app.post("/v1/attributions", messages=said)
    assert answer.json()["status"] == "completed", answer.text
    assert not app.engine.generations
    fields: list[dict[str, Any]] = [{}, {"flashtrace": True}, {"flashtrace": True}, {}]
    for url, field in zip((first, first, second, second), fields, strict=True):
        answer = await app.chat(messages=messages(url), **field)
        assert answer.status_code == 200, answer.text
    # The engine has each image from its first request on, and not from a trace.
    assert sent_images(app) == [True, False, True, False]
    plain, traced = (call.prompt for call in app.engine.generations[:2])
    assert plain.keys() == traced.keys() <= MULTI_MODAL_INPUT
    for key in ("mm_hashes", "mm_placeholders", "prompt_token_ids"):
        assert plain[key] == traced[key]
    assert all(
        item["pixel_values"].data.numel()
        for trace in app.engine.traces
        for item in trace.prompt["mm_kwargs"]["image"]
    )


async def test_pixels_are_bounded(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of waiting and deferred traces count, those of a completion once, until they end."""
    memory = app.app.state.flashtrace.tracer._images
    await until(lambda: memory.held_bytes == 0)
    app.engine.trace_gate.clear()
    field = {"mode": "deferred"}
    await app.chat(messages=messages(URL), flashtrace=field, n=2)
    await until(lambda: app.engine.traces)
    held = memory.held_bytes
    item = app.engine.traces[0].prompt["mm_kwargs"]["image"][0]
    assert held == sum(part.data.nbytes for part in item.values())
    monkeypatch.setattr(memory, "limit_bytes", held)
    refused = (await app.chat(messages=messages(URL), flashtrace=True)).json()["choices"][0]
    assert refused["message"]["content"]
    assert refused["flashtrace"]["error"]["code"] == "overloaded", refused
    assert "(max_result_mib)" in refused["flashtrace"]["error"]["message"]
    app.engine.trace_gate.set()
    await until(lambda: not pending(app))
    app.engine.reset()
    del item
    await until(lambda: memory.held_bytes == 0)
    again = (await app.chat(messages=messages(URL), flashtrace=True)).json()["choices"][0]
    assert again["flashtrace"]["status"] == "completed", again


async def test_a_picture_is_fetched_once(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.multimodal.media.connector import MediaConnector

    fetched = []

    async def fetch(_: Any, url: str, *__: Any, **___: Any) -> Image.Image:
        fetched.append(url)
        return Image.open(io.BytesIO(base64.b64decode(URL.partition(",")[2]))).convert("RGB")

    def again(_: Any, url: str, *__: Any, **___: Any) -> Image.Image:
        if not url.startswith("data:"):
            raise AssertionError(f"{url} is fetched by another way")
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(MediaConnector, "fetch_image_async", fetch)
    monkeypatch.setattr(MediaConnector, "fetch_image", again)
    address = "https://pictures.example/box.png"
    answer = await app.chat(messages=messages(address), flashtrace={"hops": 2})
    found = answer.json()["choices"][0]["flashtrace"]
    assert found["images"][0]["message"] == 1, found
    assert any(score.get("start") is not None for score in found["scores"])
    assert fetched == [address]
    check_traces(app)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "https://pictures.example/a.mp4"}},
        {"video_url": "https://pictures.example/a.mp4"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_url", "image_url": None, "uuid": "box"},
    ],
)
async def test_other_media_are_refused_by_name(app: App, part: dict[str, Any]) -> None:
    said = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    for answer in (
        await app.chat(messages=said, flashtrace=True),
        await app.post(
            "/v1/attributions", messages=[*said, {"role": "assistant", "content": "Green."}]
        ),
    ):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "messages[0].content[0]", error
        assert error["message"].startswith("messages[0].content[0]: traces are not supported with")
    assert not app.engine.calls
