"""Keeps traces out of the cache of images that an API server and its engine hold in step.

What it changes: for a request with a sealed spec, ``EngineCore.preprocess_add_request`` leaves the
engine's cache of images alone: the request has its pixels with it, and nothing is looked up, stored
or evicted for it. And `with_pixels` makes a copy of a renderer whose inputs are those of vLLM's
own, with the pixels beside them that vLLM leaves out where the engine holds them already.

Why here: an API server leaves out the pixels of an image that by its own list the engine holds. The
list is right only while both see the same images in the same order. Traces come later, and would
evict from the engine's cache what the list still has. No request field keeps one out of that cache,
and no option of the renderer gives both inputs at once.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from vllm.renderers.base import BaseRenderer
from vllm.utils.async_utils import make_async
from vllm.v1.engine.core import EngineCore

from vllm_flashtrace.patches._check import require_keyword, require_parameters
from vllm_flashtrace.trace.multimodal import KNOWN_ITEMS, has_pixels
from vllm_flashtrace.trace.wire import verified_spec


class _WithoutCache:
    """A view of an engine core without a cache of images; everything else is the core's own."""

    mm_receiver_cache = None

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def check() -> None:
    """Raises PatchError unless images are rendered and received as expected."""
    require_parameters(
        getattr(EngineCore, "preprocess_add_request", None),
        "EngineCore.preprocess_add_request",
        *("self", "request"),
    )
    process = getattr(BaseRenderer, "_process_multimodal", None)
    require_keyword(process, "BaseRenderer._process_multimodal", "skip_mm_cache")


def apply() -> None:
    """Wraps ``preprocess_add_request``."""
    stock = EngineCore.preprocess_add_request

    @functools.wraps(stock)
    def preprocess_add_request(self: EngineCore, request: Any) -> Any:
        params = request.sampling_params
        if not request.mm_features or params is None or not params.extra_args:
            return stock(self, request)
        if verified_spec(params.extra_args) is None:
            return stock(self, request)
        return stock(_WithoutCache(self), request)

    EngineCore.preprocess_add_request = preprocess_add_request


def with_pixels(renderer: Any) -> Any:
    """A copy of vLLM's renderer that gives all pixels of an input's images beside it.

    What it renders is what ``renderer`` renders, in the same order and with the same effect on its
    caches; under `KNOWN_ITEMS` there is in addition what ``mm_kwargs`` would be without a cache.

    Args:
        renderer: A ``BaseRenderer``.
    """

    def process(*args: Any, **kwargs: Any) -> Any:
        rendered = renderer._process_multimodal(*args, **kwargs)
        known: Mapping[str, Any] = rendered
        if not has_pixels(rendered["mm_kwargs"]):
            # In the same task of the one thread for images: what the list of the engine's images
            # has taken in must be sent before what is rendered after it.
            known = renderer._process_multimodal(*args, **{**kwargs, "skip_mm_cache": True})
        return {**rendered, KNOWN_ITEMS: known["mm_kwargs"]}

    copied = copy.copy(renderer)
    copied._process_multimodal = process
    copied._process_multimodal_async = make_async(process, executor=renderer._mm_executor)
    return copied
