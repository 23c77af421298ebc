"""What the attention baselines need of one forward pass, taken by hooks.

Invariant: hooks are there for one forward pass only, and the decoder layers alone are run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class OutputProjection(NamedTuple):
    """``W_O`` of one layer by heads: float32 ``[H, d, D]``, and its columns' norms ``[H, D]``."""

    weight: Tensor
    column_norms: Tensor


@dataclass(frozen=True)
class LayerRecord:
    """What one decoder layer computed for ``N`` tokens, float32.

    Attributes:
        attention: ``[H, N, N]``, attention weights.
        before: ``[N, D]``, the residual stream entering the attention block.
        after: ``[N, D]``, the residual stream after attention has been added.
        values: ``[N, G, d]``, value vectors with their bias.
        projection: ``W_O`` of the layer.
    """

    attention: Tensor
    before: Tensor
    after: Tensor
    values: Tensor
    projection: OutputProjection


@dataclass(frozen=True)
class RecordedForward:
    """One forward pass of the decoder layers, and what it cost."""

    layers: tuple[LayerRecord, ...]
    seconds: float


@torch.no_grad()
def record_forward(
    model: Any, token_ids: Sequence[int], projections: Sequence[OutputProjection]
) -> RecordedForward:
    """Runs a model that stores its attention weights (``attn_implementation="eager"``).

    Args:
        model: A causal language model with ``q/k/v/o_proj`` attention.
        token_ids: ``[N]``.
        projections: ``W_O`` of each layer.
    """
    layers = model.model.layers
    with _recording(layers) as taken:
        began = time.perf_counter()
        model.model(input_ids=torch.tensor([token_ids]), use_cache=False)
        seconds = time.perf_counter() - began
    records = (
        LayerRecord(
            attention=found["attention"],
            before=found["before"],
            after=found["before"] + found["added"],
            values=_by_head(found["values"], layer.self_attn.head_dim),
            projection=projection,
        )
        for found, layer, projection in zip(taken, layers, projections, strict=True)
    )
    return RecordedForward(tuple(records), seconds)


@contextmanager
def _recording(layers: Any) -> Iterator[list[dict[str, Tensor]]]:
    taken: list[dict[str, Tensor]] = [{} for _ in layers]
    hooks = []
    for layer, found in zip(layers, taken, strict=True):
        hooks += [
            layer.register_forward_pre_hook(_take_input(found), with_kwargs=True),
            layer.self_attn.v_proj.register_forward_hook(_take_values(found)),
            layer.self_attn.register_forward_hook(_take_attention(found)),
        ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _by_head(values: Tensor, head_dim: int) -> Tensor:
    """``[N, G * d]`` as ``[N, G, d]`` that lies in memory as ``[G, N, d]``, as the maths likes."""
    return values.view(len(values), -1, head_dim).transpose(0, 1).contiguous().transpose(0, 1)


def _take_input(found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, args: Any, kwargs: Any) -> None:
        found["before"] = (args[0] if args else kwargs["hidden_states"])[0].float()

    return hook


def _take_values(found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        found["values"] = output[0].float()

    return hook


def _take_attention(found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        found["added"], found["attention"] = output[0][0].float(), output[1][0].float()

    return hook
