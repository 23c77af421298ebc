"""The images of a prompt: which message each stands in, and what its parts have scored.

In the place of an image the prompt has one token for each of its parts. These tokens have no text:
what they decode to is the same for all of them, and in no text of the client's.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import PromptImage
from vllm_flashtrace.text.offsets import TokenText

_TEXT_TYPES = frozenset(
    {"text", "input_text", "output_text", "thinking", "refusal", "tool_reference"}
)
_IMAGE_KEYS = ("image_url", "image_pil", "image_embeds", "image")
_IMAGE_TYPES = frozenset({*_IMAGE_KEYS, "input_image"})
_OTHER_MEDIA = ("video", "audio", "input_audio")
_DATA_IMAGE = "data:image/"
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAA"
    "AAAgAB5Sfe/AAAAABJRU5ErkJggg=="
)


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chat has content parts that are no text."""
    return any(_type(part) not in _TEXT_TYPES for _, _, part in _parts(messages))


def refuse_media(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    """Refuses content parts that cannot be traced, before anything of them is fetched.

    Args:
        messages: Chat messages in OpenAI's form.
        name: The request field, or the argument, that they come from.

    Raises:
        InvalidRequestError: ``unsupported_input``: a part is a video or sound, or an image that is
            known by its uuid alone, whose pixels only vLLM's cache may have.
    """
    for message, index, part in _parts(messages):
        kind = _type(part)
        where = f"{name}[{message}].content[{index}]"
        other = kind if kind.startswith(_OTHER_MEDIA) else _other_media(part)
        if other is not None:
            raise InvalidRequestError(
                where, f"{where}: traces are not supported with {other} parts", "unsupported_input"
            )
        pictures = [part[key] for key in _IMAGE_KEYS if key in part]
        if kind in _IMAGE_TYPES and part.get("uuid") is not None and not any(map(_given, pictures)):
            raise InvalidRequestError(
                where,
                f"{where}: traces are not supported with an image that is known by its uuid alone",
                "unsupported_input",
            )


def _given(picture: Any) -> bool:
    return (picture.get("url") if isinstance(picture, Mapping) else picture) is not None


def without_pictures(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with one pixel in the place of each picture.

    What a chat template writes for an image does not depend on it, and a renderer would fetch and
    decode it for nothing.
    """
    changed: list[Mapping[str, Any]] = list(messages)
    for message, index, _ in _image_parts(messages):
        content = list(changed[message]["content"])
        content[index] = {"type": "image_url", "image_url": {"url": _PIXEL}}
        changed[message] = {**changed[message], "content": content}
    return changed


def image_places(
    messages: Sequence[Mapping[str, Any]] | None, images: int
) -> list[tuple[int, int]] | None:
    """Message and content part of each image of a prompt, in their order.

    Args:
        messages: The client's messages, None for a plain prompt.
        images: How many images the prompt has.

    Returns:
        None where the messages have another number of images than the prompt.
    """
    found = [(message, part) for message, part, _ in _image_parts(messages or ())]
    return found if len(found) == images else None


def image_urls(messages: Sequence[Mapping[str, Any]] | None, images: int) -> list[str | None]:
    """The images of a prompt as data URLs; None for one that was given in another way.

    Args:
        messages: See `image_places`.
        images: Likewise.

    Returns:
        Nothing where the messages have another number of images than the prompt.
    """
    urls: list[str | None] = []
    for _, _, part in _image_parts(messages or ()):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        urls.append(url if isinstance(url, str) and url.startswith(_DATA_IMAGE) else None)
    return urls if len(urls) == images else []


def without_text(prompt: TokenText, images: Sequence[PromptImage], *, but_first: bool) -> TokenText:
    """A prompt whose images' tokens have no text.

    Args:
        prompt: The decoded tokens.
        images: Its images.
        but_first: Leaves the first token of each image its text, as a chat template writes it
            where an image goes.
    """
    tokens = sorted(token for image in images for token in image.tokens[1 if but_first else 0 :])
    if not tokens:
        return prompt
    starts = [prompt.starts[token] for token in tokens]
    removed = [0, *accumulate(prompt.ends[token] - prompt.starts[token] for token in tokens)]
    kept, at = [], 0
    for token in tokens:
        kept.append(prompt.text[at : prompt.starts[token]])
        at = max(at, prompt.ends[token])
    text = "".join(kept) + prompt.text[at:]
    own = frozenset(tokens)

    def moved(position: int) -> int:
        return position - removed[bisect_left(starts, position)]

    return TokenText(
        text,
        [moved(start) for start in prompt.starts],
        [moved(prompt.starts[i] if i in own else end) for i, end in enumerate(prompt.ends)],
    )


def scored_image(
    image: PromptImage, place: tuple[int, int] | None, scores: Sequence[float]
) -> dict[str, Any]:
    """What a response says of an image.

    Args:
        image: The image.
        place: Its message and content part, if they are known.
        scores: Score of each prompt token.
    """
    own = [scores[token] for token in image.tokens]
    grid = {} if image.rows is None else {"rows": image.rows, "columns": image.columns}
    return {
        "index": image.index,
        **({} if place is None else {"message": place[0], "part": place[1]}),
        "tokens": len(own),
        **grid,
        "score": math.fsum(own),
        "scores": own,
    }


def image_part(image: PromptImage, number: int) -> dict[str, int]:
    """Which part of which image a token stands for, in the words of a response.

    Args:
        image: The image.
        number: The token's place among its tokens.
    """
    if image.columns is None:
        return {"image": image.index}
    row, column = divmod(number, image.columns)
    return {"image": image.index, "row": row, "column": column}


def _image_parts(
    messages: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    for message, index, part in _parts(messages):
        if _type(part) in _IMAGE_TYPES:
            yield message, index, part


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            for index, part in enumerate(content):
                if isinstance(part, Mapping):
                    yield number, index, part


def _other_media(part: Mapping[str, Any]) -> str | None:
    """The key under which a part holds a video or sound; vLLM reads it where there is no type."""
    keys = (key for key in part if isinstance(key, str) and key.startswith(_OTHER_MEDIA))
    return next((key for key in keys if part[key] is not None or "type" not in part), None)


def _type(part: Mapping[str, Any]) -> str:
    """A content part's type; vLLM also takes parts that have none."""
    named = part.get("type")
    if isinstance(named, str):
        return named
    return next((key for key in _IMAGE_KEYS if key in part), "text" if "text" in part else "")
