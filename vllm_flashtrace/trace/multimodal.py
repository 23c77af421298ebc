"""The images of a prompt, as vLLM's renderer has prepared them for the engine.

A trace has the same images as the completion that it explains: the same tokens stand for them, at
the same places and with the same hashes, so that blocks are found in the prefix cache; and their
pixels go with it, so that they are encoded again where blocks are no longer there. They are taken
from vLLM's own input for the completion: nothing is fetched or decoded a second time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.inputs import TokensPrompt
from vllm.inputs.engine import mm_input

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import PromptImage
from vllm_flashtrace.trace.engines import HANDING_OVER

KNOWN_ITEMS = "flashtrace_known_items"
"""Key of an engine input for its images' pixels, where vLLM leaves them out (see `as_sent`)."""

_IMAGE, _TYPE = "image", "multimodal"
# What vLLM's cache in shared memory puts in the place of pixels.
_ADDRESS = "address"
# The patches of an image in front of the merger, as Qwen's processors give them: time, height and
# width.
_GRID = "image_grid_thw"


@dataclass(frozen=True, eq=False)
class PromptImages:
    """What vLLM's ``MultiModalInput`` holds beside tokens.

    Attributes:
        kwargs: Of each image what its encoder takes, pixels among it.
        hashes: Of each image what tells it from others.
        placeholders: Of each image the range of its tokens in the prompt.
    """

    kwargs: Mapping[str, Sequence[Any]]
    hashes: Mapping[str, list[str]]
    placeholders: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, engine_input: Any) -> PromptImages | None:
        """The images of a rendered engine input; None if it has none.

        Raises:
            TraceError: ``unsupported_input``: it has something that is neither text nor an image,
                or a renderer that keeps no pixels has left them out.
        """
        if not isinstance(engine_input, Mapping):
            return None
        kind = engine_input.get("type", "token")
        if kind == "token":
            return None
        if kind != _TYPE or "encoder_prompt_token_ids" in engine_input:
            raise TraceError(
                "unsupported_input",
                f"the prompt is neither text nor images (engine input type {kind!r})",
            )
        placeholders = engine_input["mm_placeholders"]
        others = sorted(name for name in placeholders if name != _IMAGE and placeholders[name])
        if others:
            raise TraceError(
                "unsupported_input", f"traces are not supported with {' or '.join(others)} inputs"
            )
        kwargs = engine_input.get(KNOWN_ITEMS, engine_input["mm_kwargs"])
        if not has_pixels(kwargs):
            raise TraceError("unsupported_input", "the pixels of an image are not known")
        return cls(kwargs, engine_input["mm_hashes"], placeholders)

    def prompt(self, token_ids: list[int]) -> TokensPrompt:
        """Engine input with these tokens, which begin with the prompt's or end within it.

        Images behind the last token are left out.

        Raises:
            ValueError: The tokens end within an image; see `whole`.
        """
        length = len(token_ids)
        if self.whole(length) != length:
            raise ValueError(f"{length} tokens end within an image")
        count = sum(place.offset < length for place in self.placeholders[_IMAGE])
        if count == 0:
            return TokensPrompt(prompt_token_ids=token_ids)
        prompt: Any = mm_input(
            token_ids,
            {_IMAGE: self.kwargs[_IMAGE][:count]},
            {_IMAGE: self.hashes[_IMAGE][:count]},
            {_IMAGE: self.placeholders[_IMAGE][:count]},
        )
        return prompt

    def whole(self, length: int) -> int:
        """The fewest tokens, ``length`` at least, that do not end within an image."""
        for place in self.placeholders[_IMAGE]:
            if place.offset < length:
                length = max(length, place.offset + place.length)
        return length

    @cached_property
    def nbytes(self) -> int:
        """What its pixels, and all else that encoders take, hold of memory."""
        return sum(
            part.data.nbytes
            for item in self.kwargs[_IMAGE]
            for part in item.values()
            if isinstance(part.data, Tensor)
        )

    @property
    def count(self) -> int:
        """How many images the prompt has."""
        return len(self.placeholders[_IMAGE])

    @cached_property
    def in_prompt(self) -> tuple[PromptImage, ...]:
        """Where the images are, in the order that the client gave them."""
        images = []
        items = zip(self.placeholders[_IMAGE], self.kwargs[_IMAGE], strict=True)
        for index, (place, item) in enumerate(items):
            mask = place.is_embed
            own = range(place.length) if mask is None else mask.nonzero().flatten().tolist()
            tokens = tuple(place.offset + i for i in own)
            rows, columns = _grid(item, len(tokens)) or (None, None)
            span = (place.offset, place.offset + place.length)
            images.append(PromptImage(index, tokens, span, rows, columns))
        return tuple(images)


def has_pixels(kwargs: Mapping[str, Sequence[Any]]) -> bool:
    """Whether all images of an input are there, none only by what a cache of vLLM's knows of it."""
    return all(item is not None and _ADDRESS not in item for item in kwargs.get(_IMAGE, ()))


def as_sent(engine_input: Any) -> Any:
    """An engine input as vLLM's own renderer makes it, without `KNOWN_ITEMS`."""
    if not isinstance(engine_input, Mapping) or KNOWN_ITEMS not in engine_input:
        return engine_input
    return {key: value for key, value in engine_input.items() if key != KNOWN_ITEMS}


def check_images(config: Any) -> None:
    """Refuses images where something in vLLM's configuration treats them in a way not traced.

    Args:
        config: vLLM's ``VllmConfig``, of an API server or an engine.

    Raises:
        TraceError: ``unsupported_input``, naming what.
    """
    model = config.model_config
    refusals = {
        "attention to later image tokens": bool(model.is_mm_prefix_lm),
        "pruned image or video tokens": model.multimodal_config is not None
        and model.multimodal_config.is_multimodal_pruning_enabled(),
        "encoders that run elsewhere": config.ec_transfer_config is not None,
        "prefill in another engine": config.kv_transfer_config is not None
        and config.kv_transfer_config.kv_connector in HANDING_OVER,
    }
    for feature, present in refusals.items():
        if present:
            raise TraceError(
                "unsupported_input", f"traces of images are not supported with {feature}"
            )


def _grid(item: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of an image's tokens, which lie row by row; None where this is not known."""
    if _GRID not in item:
        return None
    time, height, width = (int(size) for size in item[_GRID].data.flatten())
    merged = math.isqrt(time * height * width // max(tokens, 1))
    if time != 1 or merged == 0 or tokens * merged**2 != height * width:
        return None
    return height // merged, width // merged
