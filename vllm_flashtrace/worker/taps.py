"""Taps on the residual stream that survive compilation and change nothing that is computed.

A tap is a custom operator on tensors that exist anyway, placed before the model is compiled: on the
two inputs of the norm behind a layer's attention block, the stream in front of it (``x_prev``) and
what it adds; their sum is the stream behind it (``x_mid``). Where these two are written to memory
in any case, by the code before the attention operator and by the output projection, compiled code
computes the same bits with the tap as without. A tap on ``x_mid`` itself would make the compiler
round it to the model's dtype where it keeps float32.

With tensor parallelism what the block adds comes out of an all-reduce, which vLLM may fuse with the
norm; a tap between the two would undo that. There the stream is seen as it enters the norm behind
the block (``x_prev``) and the next norm, that of the following layer or the model's last
(``x_mid``). A pipeline stage that is not the last has no next norm; there ``x_mid`` is the residual
that its last layer returns.

Where what the block adds is the norm of the block's output, compiled code need not write it to
memory. There the taps are on the norm's input, which the output projection has written, and on the
stream in front of the block as the next norm takes it; what is added is computed from these. A tap
on that input would undo the fusion of the all-reduce with this norm, so such a model is refused
where vLLM fuses the two.

Where a gate lies between attention and the output projection, one more tap is on what goes into the
block, the input of a matrix product, of which the gates of target rows are computed.

Of layers that are not traced the stream is seen in the same way, by operators of their own, to tell
how much of its change is theirs.

A model whose layers do not carry the stream beside what is to be added to it norms the stream
itself, in front of the attention block (``x_prev``) and behind it (``x_mid``), or gives it as it is
to the block and to the MLP. Where what its block adds is normed, the stream is seen in front of the
block and the norm's input behind it. In models that vLLM runs in Transformers' code, what is seen
has one more dimension, of size 1.

Compiled code calls the operator like eager code does, so a step with a trace runs the same compiled
forward as every other step. With no observer the operator returns at once, so that it is no
part of vLLM's CUDA graphs; in those of trace steps it is a copy, see `trace_graphs`.

Invariant: an operator call carries nothing that differs between layers, so that compilers may
share code between them; layers are told apart by the order of the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker.config_checks import check_config
from vllm_flashtrace.worker.decoder_stream import (
    NORMS_IN_FRONT,
    Args,
    Kwargs,
    Names,
    argument,
    argument_names,
)
from vllm_flashtrace.worker.layers import (
    TracedLayer,
    find_layers,
    is_last_stage,
    other_layers,
    stage_layers,
)
from vllm_flashtrace.worker.observer import current

_MARK = "_flashtrace_taps"
_CACHE_KEY = "flashtrace_taps"
_STREAM = "hidden_states"
_VERSION = 6  # To be raised whenever compiled code changes.

_library = torch.library.Library("flashtrace", "FRAGMENT")
# The tensors are declared as mutated, though they are not, so that no compiler pass drops or moves
# the call: it stays in front of the norm.
_library.define("observe_update(Tensor(a!) update, Tensor(b!) residual) -> ()")
_library.define("observe_residual(Tensor(a!) residual) -> ()")
_library.define("observe_block(Tensor(a!) output) -> ()")
_library.define("observe_other_update(Tensor(a!) update, Tensor(b!) residual) -> ()")
_library.define("observe_other_residual(Tensor(a!) residual) -> ()")
_library.define("observe_block_input(Tensor(a!) hidden_states) -> ()")


def _rows(stream: torch.Tensor) -> torch.Tensor:
    return stream.flatten(0, -2)


def _observe_update(update: torch.Tensor, residual: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_update(_rows(update), _rows(residual))


def _observe_residual(residual: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_residual(_rows(residual))


def _observe_block(output: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_block(_rows(output))


def _observe_other_update(update: torch.Tensor, residual: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_other_update(_rows(update), _rows(residual))


def _observe_other_residual(residual: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_other_residual(_rows(residual))


def _observe_block_input(hidden_states: torch.Tensor) -> None:
    observer = current()
    if observer is not None:
        observer.on_block_input(_rows(hidden_states))


def _observe_nothing(*_: torch.Tensor) -> None:
    pass


_library.impl("observe_update", _observe_update, "CompositeExplicitAutograd")
_library._register_fake("observe_update", _observe_nothing)
_library.impl("observe_residual", _observe_residual, "CompositeExplicitAutograd")
_library._register_fake("observe_residual", _observe_nothing)
_library.impl("observe_block", _observe_block, "CompositeExplicitAutograd")
_library._register_fake("observe_block", _observe_nothing)
_library.impl("observe_other_update", _observe_other_update, "CompositeExplicitAutograd")
_library._register_fake("observe_other_update", _observe_nothing)
_library.impl("observe_other_residual", _observe_other_residual, "CompositeExplicitAutograd")
_library._register_fake("observe_other_residual", _observe_nothing)
_library.impl("observe_block_input", _observe_block_input, "CompositeExplicitAutograd")
_library._register_fake("observe_block_input", _observe_nothing)


def place_taps(model: nn.Module, config: VllmConfig) -> None:
    """Places a tap on every decoder layer; call after loading and before compiling.

    Compiled code is cached on disk under a key made of the engine's configuration, so the taps are
    noted there: code with taps and code without must never be taken for each other.

    Raises:
        UnsupportedModelError: The model cannot be traced; it is left as it is.
    """
    check_config(config)
    layers, last = find_layers(model, config), is_last_stage(config)
    fuses = _fuses_all_reduce(config)
    fused = fuses and all(layer.in_front is None for layer in layers)
    if fuses and any(layer.block_norm is not None for layer in layers):
        raise UnsupportedModelError(
            "traces are not supported with a norm of what attention adds that is fused with the "
            "all-reduce: --compilation-config.pass_config.fuse_allreduce_rms false"
        )
    if fused and len(layers) < len(stage_layers(model, config)):
        raise UnsupportedModelError(
            "traces of some layers alone are not supported where the all-reduce is fused with the "
            "next norm: --compilation-config.pass_config.fuse_allreduce_rms false"
        )
    following = _following_norms(model, layers, last) if fused else []
    additional = config.additional_config or {}
    if not isinstance(additional, dict):
        raise UnsupportedModelError("additional_config is not a dictionary")
    config.additional_config = {**additional, _CACHE_KEY: _VERSION}
    for layer in layers:
        if layer.gate is not None:
            layer.block.register_forward_pre_hook(_tap_block_input, with_kwargs=True)
        if layer.in_front is not None:
            _place(partial(_tap_stream, _place_of_stream(layer)), layer.in_front)
        if layer.block_norm is not None:
            _place(_tap_block, layer.block_norm.module)
            if layer.in_front is None:
                _place(_tap_residual, layer.behind)
        elif layer.in_front is not None:
            _place(partial(_tap_stream, 0), layer.behind)
        else:
            _place(_tap_residual if fused else _tap_update, layer.behind)
    for other in other_layers(model, config, layers):
        if other.in_front is None:
            _place(_tap_other_update, other.behind)
        else:
            for norm in (other.in_front, other.behind):
                _place(_tap_other_residual, norm)
    for norm in following:
        _place(_tap_residual, norm)
    if fused and not last:
        layers[-1].decoder.register_forward_hook(_tap_output)
    setattr(model, _MARK, len(layers))


def has_taps(model: nn.Module) -> bool:
    """Whether :func:`place_taps` was successful on this model."""
    return hasattr(model, _MARK)


def _fuses_all_reduce(config: VllmConfig) -> bool:
    """Whether compiled code may have the all-reduce of an attention block inside the next norm."""
    return config.parallel_config.tensor_parallel_size > 1 and bool(
        config.compilation_config.pass_config.fuse_allreduce_rms
    )


def _following_norms(
    model: nn.Module, layers: Sequence[TracedLayer], last: bool
) -> list[nn.Module]:
    """The norms that see the stream next after each layer's norm behind the attention block."""
    norms = [_norm(layer, layer.decoder, NORMS_IN_FRONT) for layer in layers[1:]]
    if last:
        norms.append(_norm(layers[-1], getattr(model, "model", None), ("norm",)))
    return norms


def _norm(layer: TracedLayer, holder: Any, names: Sequence[str]) -> nn.Module:
    for name in names:
        norm = getattr(holder, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, PPMissingLayer):
            return norm
    raise UnsupportedModelError(f"no {' or '.join(names)} was found behind {layer.name}")


def _place(tap: Any, module: nn.Module) -> None:
    """Has ``tap(names, module, args, kwargs)`` called in front of the module."""
    tap = partial(tap, argument_names(module))
    module.register_forward_pre_hook(tap, with_kwargs=True)


def _tap_update(names: Names, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Norms are called as ``norm(update, residual)`` wherever there is a stream to add to."""
    update, residual = (argument(names, place, args, kwargs) for place in (0, 1))
    if update is not None and residual is not None:
        torch.ops.flashtrace.observe_update(update, residual)


def _tap_other_update(names: Names, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    update, residual = (argument(names, place, args, kwargs) for place in (0, 1))
    if update is not None and residual is not None:
        torch.ops.flashtrace.observe_other_update(update, residual)


def _tap_other_residual(names: Names, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    stream = argument(names, 0, args, kwargs)
    if stream is not None:
        torch.ops.flashtrace.observe_other_residual(stream)


def _tap_residual(names: Names, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    residual = argument(names, 1, args, kwargs)
    if residual is not None:
        torch.ops.flashtrace.observe_residual(residual)


def _tap_block(names: Names, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Norms of blocks are called as ``norm(output)``."""
    output = argument(names, 0, args, kwargs)
    if output is not None:
        torch.ops.flashtrace.observe_block(output)


def _tap_block_input(_: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Blocks with gates are called as ``block(positions, hidden_states)``."""
    hidden_states = args[1] if len(args) > 1 else kwargs[_STREAM]
    torch.ops.flashtrace.observe_block_input(hidden_states)


def _tap_stream(place: int, names: Names, _: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Where layers do not carry the stream, it is what they and their norms are called with."""
    stream = argument(names, place, args, kwargs)
    if stream is not None:
        torch.ops.flashtrace.observe_residual(stream)


def _place_of_stream(layer: TracedLayer) -> int:
    """Which argument of `TracedLayer.in_front` the stream is."""
    if layer.in_front is not layer.decoder:
        return 0  # Norms take nothing else.
    names = argument_names(layer.decoder)
    if _STREAM not in names:
        raise UnsupportedModelError(f"the layer of {layer.name} takes no {_STREAM}")
    return names.index(_STREAM)


def _tap_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    """Decoder layers return ``(update, residual)``."""
    torch.ops.flashtrace.observe_residual(output[1])
