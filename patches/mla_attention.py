"""Shows a trace the queries and the output of multi-head latent attention (MLA).

What it changes: after ``MLAAttention.forward_impl`` the current observer is called with the queries
that the layer was given, and its output. There is an observer only during a step that computes
target rows of a trace.

Why here: this method sees all rows of a step. It gives those that decode and those that prefill to
the backend by two methods, neither of which is told the layer's name, so a backend that is
registered over the stock one, as `attention_backends` does, would see neither.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.model_executor.layers.attention import MLAAttention

from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.worker.observer import current

_PARAMETERS = ("self", "q", "k_c_normed", "k_pe", "kv_cache", "attn_metadata", "output")


def check() -> None:
    """Raises PatchError unless ``forward_impl`` takes the expected parameters."""
    name = "forward_impl"
    require_parameters(getattr(MLAAttention, name, None), f"MLAAttention.{name}", *_PARAMETERS)


def apply() -> None:
    """Wraps ``forward_impl``."""
    stock = MLAAttention.forward_impl

    @functools.wraps(stock)
    def forward_impl(
        self: MLAAttention,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        result: torch.Tensor = stock(
            self, q, k_c_normed, k_pe, kv_cache, attn_metadata, *args, **kwargs
        )
        observer = current()
        # There is no metadata in runs that only measure memory.
        if observer is not None and attn_metadata is not None:
            observer.on_attention(self.layer_name, q, result)
        return result

    MLAAttention.forward_impl = forward_impl
