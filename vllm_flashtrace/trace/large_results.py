"""Attribution objects with many numbers: what they take of an API server's memory, and how long.

A result of 30 layers and 32,768 tokens is 4 MB as float32, 64 MB as Python's own lists and 22 MB as
JSON. So it stays a tensor until it is written out, and its bytes are held of a budget from before
the engine measures it until the last of them is sent or stored. Pixels of prompts are bounded
likewise.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm_flashtrace.api.request import FlashTraceRequest
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.trace.multimodal import PromptImages

LARGE_BYTES = 128 << 10
"""From here on a result is written out piece by piece, and counted in the budget."""

# float32 as received, weighted by its hop, added up, and without what is not input.
_BYTES_PER_LAYER_SCORE = 16
# float64 as added up, and without what is not input.
_BYTES_PER_HOP_SCORE = 16
# float16 as received, put side by side, filled up and in its file.
_BYTES_PER_ATTENTION_SUM = 10
# A dict with a text, four whole numbers and a score.
_BYTES_PER_ENTRY = 512
_BYTES_PER_TEXT = 64
# A score in a list.
_BYTES_PER_IMAGE_TOKEN = 32
# JSON of a number and of an entry; a deferred result is JSON as a whole, twice while it is stored.
_JSON_BYTES_PER_NUMBER, _JSON_BYTES_PER_ENTRY = 2 * 24, 2 * 160
# Base64, by itself and behind that JSON.
_TEXT_BYTES_PER_ATTENTION_SUM = 6


def result_bytes(
    request: FlashTraceRequest,
    *,
    prompt: int,
    generated: int,
    layers: int,
    max_hops: int,
    targets: int = 1,
    heads: int = 0,
    sources: int = 0,
    image_tokens: int = 0,
) -> int:
    """Bytes of an API server that an attribution's result takes at most at one time.

    Args:
        request: What is asked for.
        prompt: Prompt tokens.
        generated: Generated tokens.
        layers: Layers of the model.
        max_hops: Where ``hops: "auto"`` stops at the latest.
        targets: How many parts of the completion are explained.
        heads: Query heads of a layer.
        sources: How many sources have scores, each with a sentence in a citation.
        image_tokens: Prompt tokens that stand for parts of images.
    """
    include = request.include
    tokens = prompt + generated
    hops = 1 + (max_hops if request.hops == "auto" else request.hops)
    of_layers = layers * tokens if "layers" in include else 0
    # The scores of all targets are there before the first of them is written out.
    of_hops = targets * hops * tokens if "hops" in include or targets > 1 else 0
    of_images = targets * image_tokens
    entries = prompt if request.top_k is None else min(request.top_k, prompt)
    # No more sentences than tokens, of the messages and of the sources.
    entries *= 1 + ("sentences" in include) + (sources > 0)
    entries += request.verify
    entries += generated if "generated" in include else 0
    entries += 2 * sources
    entries *= targets
    of_attention = layers * heads * tokens if "attention" in include else 0
    total = _BYTES_PER_ATTENTION_SUM * of_attention
    total += _BYTES_PER_LAYER_SCORE * of_layers + _BYTES_PER_HOP_SCORE * of_hops
    total += _BYTES_PER_ENTRY * entries
    total += _BYTES_PER_TEXT * prompt if "tokens" in include else 0
    total += _BYTES_PER_IMAGE_TOKEN * of_images
    if request.mode == "deferred":
        total += _TEXT_BYTES_PER_ATTENTION_SUM * of_attention
        numbers = of_layers + of_hops + of_images
        total += _JSON_BYTES_PER_NUMBER * numbers + _JSON_BYTES_PER_ENTRY * entries
    return total


class LargeAttribution(dict[str, Any]):
    """An attribution object whose long lists of numbers are tensors, and whose files are bytes.

    Attributes:
        release: Gives back what it holds of the budget; the first call counts. Called at the latest
            when nobody refers to the object any more.
    """

    def __init__(self, data: Mapping[str, Any], release: Callable[[], None]) -> None:
        """Takes over ``data``; ``release`` will be called in the running event loop, once."""
        super().__init__(data)
        loop = asyncio.get_running_loop()
        self.release = weakref.finalize(self, _call_in, loop, release)
        self.release.atexit = False


class ImageMemory:
    """What the images of an API server's attributions take of its memory.

    Those of a completion count once, however many of its choices are traced at a time.

    Attributes:
        limit_bytes: What they may take together.
        held_bytes: What they take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._holders: Counter[PromptImages] = Counter()

    @contextmanager
    def held(self, images: PromptImages | None) -> Iterator[None]:
        """Counts the images of an attribution's completion within the block.

        Raises:
            TraceError: ``overloaded``: with those of others they take more than is allowed.
        """
        if images is None:
            yield
            return
        if images not in self._holders:
            nbytes = images.nbytes
            if self.held_bytes + nbytes > self.limit_bytes:
                raise TraceError(
                    "overloaded",
                    f"the prompt's images take {nbytes} bytes and those of other attributions "
                    f"{self.held_bytes}, of {self.limit_bytes} (max_result_mib)",
                )
            self.held_bytes += nbytes
        self._holders[images] += 1
        try:
            yield
        finally:
            self._holders[images] -= 1
            if not self._holders[images]:
                del self._holders[images]
                self.held_bytes -= images.nbytes


def _call_in(loop: asyncio.AbstractEventLoop, release: Callable[[], None]) -> None:
    # The last reference may end in any thread.
    if not loop.is_closed():
        loop.call_soon_threadsafe(release)
