"""How a decoder layer carries the residual stream past its attention block.

Read of its modules, and of its own code: what takes the stream in front of the block and behind it,
whether it goes along beside what is to be added to it, and what that is multiplied by and normed
with.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.base.logs import log_unexpected

# Of the norms of a decoder layer, the one that sees the stream, or what is added to it, behind the
# attention block. Where there is one more, that norms the block's output before it is added: the
# same name means one or the other. Where block and MLP take the stream as it is, as in OLMo 2, the
# norm of that name is the block's.
NORMS_BEHIND = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_attention_layernorm",
    "feedforward_layernorm",
)
_NORMS_OF_BLOCKS = {
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "post_self_attn_layernorm",
    "mlp": "post_attention_layernorm",
}
NORMS_IN_FRONT = ("input_layernorm", "attention_layernorm")
MLP, _NORM_OF_MLP = "mlp", "post_feedforward_layernorm"
_NORMS = (RMSNorm, GemmaRMSNorm)
# What vLLM makes of the norms of models in Transformers' code; they gather what ranks have cut,
# which the stream is not.
_GATHERING_NORMS = ("TPAwareRMSNorm", "TPAwareGemmaRMSNorm")

Names = tuple[str, ...]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BlockNorm:
    """The RMSNorm that an attention block's output passes before it is added to the stream.

    With ``u_i`` the block's output, ``gain * u_i / sqrt(mean(u_i^2) + epsilon)`` is added. The
    root is a number of row ``i`` that all heads and tokens share, so it belongs to the row's
    weight, and the gain to ``M``: see `core.proximity`.

    Attributes:
        module: The norm.
        epsilon: What it adds to the mean of the squares.
    """

    module: Any
    epsilon: float

    @classmethod
    def read(cls, layer_name: str, norm: Any) -> BlockNorm:
        """Reads a norm.

        Raises:
            UnsupportedModelError: It is none of the norms that are known.
        """
        kind = type(norm)
        gathers = kind.__name__ in _GATHERING_NORMS and isinstance(norm, _NORMS)
        known = kind in _NORMS or gathers
        if not known or getattr(norm, "variance_size_override", None) is not None:
            raise UnsupportedModelError(
                f"traces are not supported with a {kind.__name__} of what the attention "
                f"block adds ({layer_name})"
            )
        return cls(norm, float(norm.variance_epsilon))

    def gain(self) -> torch.Tensor:
        """Its factor on each coordinate as it is now, float32 ``[D]``."""
        weight: torch.Tensor = self.module.weight.detach().float()
        return weight + 1 if isinstance(self.module, GemmaRMSNorm) else weight


def stream_takers(
    layer_name: str, decoder: nn.Module, block: nn.Module, out_proj: nn.Module | None
) -> tuple[nn.Module | None, str]:
    """What takes the stream around an attention block.

    Args:
        layer_name: The attention layer's, for messages.
        decoder: The decoder layer.
        block: Its attention block.
        out_proj: The block's output projection.

    Returns:
        `TracedLayer.in_front`, and the name of `TracedLayer.behind` in the decoder layer.

    Raises:
        UnsupportedModelError: The layer has no norm of a known name there.
    """
    if _norms_outputs_alone(decoder):
        return decoder, MLP
    behind = norm_name(layer_name, decoder, NORMS_BEHIND)
    takes_residual = "residual" in inspect.signature(decoder.forward).parameters
    if takes_residual and _carries_stream(decoder, block, getattr(decoder, behind), out_proj):
        return None, behind
    return getattr(decoder, norm_name(layer_name, decoder, NORMS_IN_FRONT)), behind


def _norms_outputs_alone(decoder: nn.Module) -> bool:
    """Whether a layer has norms of what its block and MLP give, and none of what they take."""
    has = [_has(decoder, name) for name in (_NORMS_OF_BLOCKS[MLP], _NORM_OF_MLP, MLP)]
    taken = [*NORMS_IN_FRONT, *(n for n in NORMS_BEHIND if n != _NORMS_OF_BLOCKS[MLP])]
    return all(has) and not any(_has(decoder, name) for name in taken)


def _has(decoder: nn.Module, name: str) -> bool:
    return isinstance(getattr(decoder, name, None), nn.Module)


def norm_name(layer_name: str, decoder: nn.Module, names: Names) -> str:
    """Which of these names, `NORMS_IN_FRONT` or `NORMS_BEHIND`, a decoder layer has a norm of.

    Raises:
        UnsupportedModelError: It has none.
    """
    for name in names:
        if _has(decoder, name):
            return name
    raise UnsupportedModelError(
        f"the decoder layer of {layer_name} has no {' or '.join(names)}: its norm "
        f"{'in front of' if names == NORMS_IN_FRONT else 'behind'} attention was not found"
    )


def norm_of_block(layer_name: str, decoder: nn.Module, behind: str) -> BlockNorm | None:
    """The norm of what the block adds, if any; ``behind`` as `stream_takers` gives it.

    Raises:
        UnsupportedModelError: See `BlockNorm.read`.
    """
    norm = getattr(decoder, _NORMS_OF_BLOCKS.get(behind, ""), None)
    return BlockNorm.read(layer_name, norm) if isinstance(norm, nn.Module) else None


def residual_multiplier(layer_name: str, decoder: nn.Module) -> float:
    """Factor on what the block adds to the stream.

    Raises:
        UnsupportedModelError: It is no positive number.
    """
    multiplier = float(getattr(decoder, "residual_multiplier", 1.0))
    if not 0 < multiplier < math.inf:
        raise UnsupportedModelError(
            f"traces are not supported with a residual multiplier of {multiplier} ({layer_name})"
        )
    return multiplier


class _NormSeenError(Exception):
    """Ends a decoder layer's code where the stream behind its block is normed."""


def _carries_stream(decoder: Any, block: Any, behind: nn.Module, out_proj: Any) -> bool:
    """Whether a layer hands the stream on beside what is to be added to it.

    One may take both and add up by itself, as those of Granite 4 do. Its own code tells, run on one
    row up to the norm behind the block, which does nothing meanwhile.
    """
    names = argument_names(behind)
    seen: list[Any] = []

    def end(_: Any, args: Args, kwargs: Kwargs) -> None:
        seen.extend(argument(names, place, args, kwargs) for place in (0, 1))
        raise _NormSeenError

    row = torch.zeros(1, out_proj.output_size, dtype=out_proj.params_dtype)
    row = row.to(next(behind.parameters()).device)
    arguments = dict.fromkeys(inspect.signature(decoder.forward).parameters)
    given = {"positions": torch.zeros_like(row[:, 0], dtype=torch.int64)}
    given |= {"hidden_states": row, "residual": row.clone()}
    stock = vars(block).get("forward")
    hook = behind.register_forward_pre_hook(end, prepend=True, with_kwargs=True)
    block.forward = lambda *_, **__: row.clone()
    try:
        with torch.inference_mode():
            decoder(**{name: given[name] for name in arguments if name in given})
    except _NormSeenError:
        return all(stream is not None for stream in seen)
    except Exception as error:
        log_unexpected("reading how a decoder layer hands on its stream", error)
        return True  # The proof at the start tells.
    finally:
        hook.remove()
        vars(block).pop("forward", None)
        if stock is not None:
            block.forward = stock
    return True


def argument_names(module: nn.Module) -> Names:
    """What a module calls its arguments, in their order.

    The code of an operator of vLLM says it: its ``forward`` passes on whatever it is given.
    """
    passes_on = isinstance(module, CustomOp) and type(module).forward is CustomOp.forward
    forward: Any = module.forward_native if passes_on else module.forward
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def argument(names: Names, place: int, args: Args, kwargs: Kwargs) -> Any:
    """What a call gives for the argument at a place, also if by its name; None without it."""
    if len(args) > place:
        return args[place]
    return kwargs.get(names[place]) if len(names) > place else None
