"""Taps on the residual stream that survive compilation.

A tap is a custom operator on a tensor that exists anyway, placed before the model is compiled: on
the residual stream as it enters the norm behind a layer's attention block (``x_prev``), and as it
enters the next norm, that of the following layer or the model's last (``x_mid``). A pipeline stage
that is not the last has no next norm; there ``x_mid`` is the residual that its last layer returns.

Compiled code calls the operator like eager code does, so a step with a trace runs the same compiled
forward as every other step. With no observer the operator returns at once; under CUDA graphs it
launches nothing and is not part of the graph. The other input of these norms, what a block adds to
the stream, is left alone: with tensor parallelism it comes out of an all-reduce that vLLM fuses
with the norm, and a tap between the two would undo that.

Invariant: an operator call carries nothing that differs between layers, so that compilers may
share code between them; layers are told apart by the order of the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker.layers import TracedLayer, check_config, find_layers, is_last_stage
from vllm_flashtrace.worker.observer import current

_MARK = "_flashtrace_taps"
_CACHE_KEY = "flashtrace_taps"
_VERSION = 2  # To be raised whenever compiled code changes.

_library = torch.library.Library("flashtrace", "FRAGMENT")
# ``residual`` is declared as mutated, though it is not, so that no compiler pass drops or moves the
# call: it stays in front of the norm.
_library.define("observe_residual(Tensor(a!) residual) -> ()")


def _observe_residual(residual: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_residual(residual)


def _observe_nothing(residual: torch.Tensor) -> None:
    pass


_library.impl("observe_residual", _observe_residual, "CompositeExplicitAutograd")
_library._register_fake("observe_residual", _observe_nothing)


def place_taps(model: nn.Module, config: VllmConfig) -> None:
    """Places a tap on every decoder layer; call after loading and before compiling.

    Compiled code is cached on disk under a key made of the engine's configuration, so the taps are
    noted there: code with taps and code without must never be taken for each other.

    Raises:
        UnsupportedModelError: The model cannot be traced; it is left as it is.
    """
    check_config(config)
    layers, last = find_layers(model, config), is_last_stage(config)
    norms = _norms(model, layers, last)
    additional = config.additional_config or {}
    if not isinstance(additional, dict):
        raise UnsupportedModelError("additional_config is not a dictionary")
    config.additional_config = {**additional, _CACHE_KEY: _VERSION}
    for norm in norms:
        norm.register_forward_pre_hook(_tap)
    if not last:
        layers[-1].decoder.register_forward_hook(_tap_output)
    setattr(model, _MARK, len(norms))


def has_taps(model: nn.Module) -> bool:
    """Whether :func:`place_taps` was successful on this model."""
    return hasattr(model, _MARK)


def _norms(model: nn.Module, layers: Sequence[TracedLayer], last: bool) -> list[nn.Module]:
    """The norms that see the stream before and after each attention block, in order of calls."""
    following = [getattr(layer.decoder, "input_layernorm", None) for layer in layers[1:]]
    if last:
        following.append(getattr(getattr(model, "model", None), "norm", None))
    norms: list[nn.Module] = []
    for layer, after in zip_longest(layers, following):
        before = getattr(layer.decoder, "post_attention_layernorm", None)
        for norm in (before,) if layer is layers[-1] and not last else (before, after):
            if not isinstance(norm, nn.Module) or isinstance(norm, PPMissingLayer):
                raise UnsupportedModelError(f"{layer.name} has no norm behind its attention block")
            norms.append(norm)
    return norms


def _tap(_: nn.Module, args: tuple[Any, ...]) -> None:
    """Norms are called as ``norm(update, residual)`` wherever there is a stream to add to."""
    if len(args) > 1 and args[1] is not None:
        torch.ops.flashtrace.observe_residual(args[1])


def _tap_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    """Decoder layers return ``(update, residual)``."""
    torch.ops.flashtrace.observe_residual(output[1])
