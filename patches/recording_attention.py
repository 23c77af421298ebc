"""What the recording backends share: stock attention whose queries a forward pass's observer sees.

A recording backend is a subclass of a stock one that differs in its implementation class only, and
that class differs in :class:`RecordingAttention` alone. Name, metadata builder, capabilities and
everything else vLLM asks a backend for are inherited, and the class can be found under its own
module and qualified name, by which vLLM passes backends around.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_flashtrace.worker.observer import current


class RecordingAttention:
    """Comes first among the bases of an implementation, before the stock one."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs the stock kernel, then shows the queries ``[tokens, H, d]`` to the observer.

        Without an observer the cost is reading one variable. There is no metadata in runs that only
        measure memory.
        """
        result: torch.Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        observer = current()
        if observer is not None and attn_metadata is not None:
            observer.on_attention(layer.layer_name, query)
        return result


FORWARD_PARAMETERS = (
    "self",
    "layer",
    "query",
    "key",
    "value",
    "kv_cache",
    "attn_metadata",
    "output",
)
"""How the ``forward`` of a stock implementation must begin."""
