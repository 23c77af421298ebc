"""Taps on the residual stream that survive compilation.

A tap is a custom operator, placed before the model is compiled, on two tensors that exist anyway:
the inputs of the norm behind the attention block, which are the residual stream ``x_prev`` and
what the attention block adds to it. Compiled code calls the operator like eager code does, so a
step with a trace runs the same compiled forward as every other step. With no observer the operator
returns at once; under CUDA graphs it launches nothing and is not part of the graph.

Invariant: an operator call carries nothing that differs between layers, so that compilers may
share code between them; layers are told apart by the order of the calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_flashtrace.adapter.model import check_config, find_layers
from vllm_flashtrace.capture.observer import current
from vllm_flashtrace.errors import UnsupportedModelError

_MARK = "_flashtrace_taps"
_CACHE_KEY = "flashtrace_taps"

_library = torch.library.Library("flashtrace", "FRAGMENT")
# ``update`` is declared as mutated, though it is not, so that no compiler pass drops or moves the
# call: it stays between the attention block and the norm.
_library.define("observe_residual(Tensor(a!) update, Tensor residual) -> ()")


def _observe_residual(update: torch.Tensor, residual: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_residual(update, residual)


def _observe_nothing(update: torch.Tensor, residual: torch.Tensor) -> None:
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
    layers = find_layers(model, config)
    norms = []
    for layer in layers:
        norm = getattr(layer.decoder, "post_attention_layernorm", None)
        if not isinstance(norm, nn.Module):
            raise UnsupportedModelError(f"{layer.name} has no norm behind its attention block")
        norms.append(norm)
    additional = config.additional_config or {}
    if not isinstance(additional, dict):
        raise UnsupportedModelError("additional_config is not a dictionary")
    config.additional_config = {**additional, _CACHE_KEY: 1}
    for norm in norms:
        norm.register_forward_pre_hook(_tap)
    setattr(model, _MARK, len(norms))


def has_taps(model: nn.Module) -> bool:
    """Whether :func:`place_taps` was successful on this model."""
    return hasattr(model, _MARK)


def _tap(_: nn.Module, args: tuple[Any, ...]) -> None:
    torch.ops.flashtrace.observe_residual(args[0], args[1])
