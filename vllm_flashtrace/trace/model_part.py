"""Which part of the model a worker holds.

Invariant: parts of one model fit together or :func:`stages` refuses them; a trace of which a layer
or a rank is missing, or there twice, would be well-formed and wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import torch

from vllm_flashtrace.base.errors import TraceError


class ModelPart(msgspec.Struct, frozen=True, array_like=True):
    """The decoder layers of one pipeline stage, as one of its tensor-parallel ranks has them.

    Attributes:
        first_layer: Index of the first layer in the model.
        num_layers: Layers held.
        model_layers: Layers of the whole model.
        ranks: Workers that share each layer's heads.
    """

    first_layer: int = 0
    num_layers: int = 0
    model_layers: int = 0
    ranks: int = 1

    @property
    def whole(self) -> bool:
        """Whether this worker has all heads of all layers."""
        return self.ranks == 1 and self.num_layers == self.model_layers

    def own(self, per_layer: torch.Tensor) -> torch.Tensor:
        """This part of a tensor ``[model_layers, ...]``.

        Raises:
            TraceError: ``recording_failed``: it is not made for all layers of this model.
        """
        if len(per_layer) != self.model_layers:
            raise TraceError(
                "recording_failed", f"{len(per_layer)} numbers for {self.model_layers} layers"
            )
        return per_layer[self.first_layer : self.first_layer + self.num_layers]


def stages(parts: Sequence[ModelPart]) -> list[list[int]]:
    """Sorts workers into pipeline stages.

    Args:
        parts: What each worker holds, in any order.

    Returns:
        Indices into ``parts``, one list per stage in the order of layers.

    Raises:
        TraceError: ``result_missing``: they do not make one whole model.
    """
    by_layers: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        by_layers[part.first_layer, part.num_layers].append(index)
    ordered = [members for _, members in sorted(by_layers.items())]
    reached = 0
    for members in ordered:
        part = parts[members[0]]
        if part.first_layer > reached:
            raise _unfit(f"layer {reached} is missing")
        if part.first_layer < reached:
            raise _unfit(f"layer {part.first_layer} is there twice")
        if any(parts[other] != part for other in members) or len(members) != part.ranks:
            raise _unfit(f"layer {reached} is there in {len(members)} of {part.ranks} parts")
        reached += part.num_layers
    totals = {part.model_layers for part in parts}
    if totals != {reached}:
        raise _unfit(f"{reached} layers of a model of {', '.join(map(str, sorted(totals)))}")
    return ordered


def _unfit(message: str) -> TraceError:
    return TraceError("result_missing", f"the workers' results do not belong together: {message}")
