"""Target of an attribution pass: weights ``w_i > 0`` over positions of the trace (section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.base.records import Span


@dataclass(frozen=True, eq=False)
class TargetWeights:
    """Sparse weights ``w_i > 0`` over absolute token positions; at least one.

    Zero weights given to the constructor are dropped, so no row is computed for nothing.

    Attributes:
        positions: int64 ``[R]``, strictly ascending, on the CPU.
        weights: float32 ``[R]``, positive and finite, on the CPU.

    Raises:
        ValueError: A weight is negative or not finite, no weight is positive, a position is
            negative, or positions do not ascend strictly.
    """

    positions: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        positions = torch.as_tensor(self.positions, dtype=torch.int64, device="cpu")
        weights = torch.as_tensor(self.weights, dtype=torch.float32, device="cpu")
        if positions.dim() != 1 or positions.shape != weights.shape:
            raise ValueError(
                f"positions and weights must be of one length; "
                f"got {tuple(positions.shape)} and {tuple(weights.shape)}"
            )
        # As nearly all are; NumPy, because this is done for every trace of a step.
        places, sizes = positions.numpy(), weights.detach().numpy()
        fine = len(places) > 0 and places[0] >= 0 and bool((places[1:] > places[:-1]).all())
        if fine and sizes.min() > 0 and sizes.max() < torch.inf:
            object.__setattr__(self, "positions", positions)
            object.__setattr__(self, "weights", weights)
            return
        bad = ~weights.isfinite() | (weights < 0)
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"target weight at position {int(positions[at])} must be finite and not negative, "
                f"got {float(weights[at])}"
            )
        if (positions < 0).any():
            raise ValueError(f"target position must not be negative, got {int(positions.min())}")
        if (positions.diff() <= 0).any():
            raise ValueError("target positions must ascend strictly")
        kept = weights > 0
        if not kept.any():
            raise ValueError("target has no position of positive weight")
        object.__setattr__(self, "positions", positions[kept])
        object.__setattr__(self, "weights", weights[kept])

    @classmethod
    def from_spans(cls, spans: Iterable[Span]) -> TargetWeights:
        """Gives weight 1 to every position covered by at least one half-open span.

        Raises:
            ValueError: There is no span, or one is empty, reversed or starts below 0.
        """
        covered: set[int] = set()
        for start, end in spans:
            if start < 0 or end <= start:
                raise ValueError(f"target span [{start}, {end}) is empty, reversed or negative")
            covered.update(range(start, end))
        positions = torch.tensor(sorted(covered), dtype=torch.int64)
        return cls(positions, torch.ones(len(covered)))

    @classmethod
    def from_mapping(cls, mapping: Mapping[int, float]) -> TargetWeights:
        """Takes ``{position: weight}`` in any order.

        Raises:
            ValueError: See the class.
        """
        positions = sorted(mapping)
        return cls(
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor([mapping[p] for p in positions], dtype=torch.float32),
        )

    @classmethod
    def from_scores(cls, scores: Tensor, mask: Tensor) -> TargetWeights | None:
        """Takes the positive scores within a mask, the weights of a following hop.

        Args:
            scores: ``[N]``, finite and non-negative.
            mask: bool ``[N]``.

        Returns:
            The target, or None when no score within the mask is positive in float32.

        Raises:
            ValueError: A score within the mask is negative or not finite.
        """
        weights = torch.where(mask, scores, torch.zeros_like(scores)).float()
        if not (weights != 0).any():
            return None
        return cls(torch.arange(weights.shape[0]), weights)

    @property
    def first(self) -> int:
        """Lowest target position."""
        return int(self.positions[0])

    @property
    def last(self) -> int:
        """Highest target position (inclusive)."""
        return int(self.positions[-1])

    @property
    def spans(self) -> list[Span]:
        """Contiguous runs of target positions, half-open."""
        breaks = (self.positions.diff() > 1).nonzero().squeeze(1) + 1
        runs = self.positions.tensor_split(breaks)
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]

    def normalised(self) -> TargetWeights:
        """The same target with weights that sum to 1."""
        weights = self.weights.double()
        return TargetWeights(self.positions, (weights / weights.sum()).float())

    def without(self, mask: Tensor) -> TargetWeights | None:
        """Drops the positions set in a bool mask ``[N]``; None when nothing is left.

        Raises:
            ValueError: The mask is too short for the target.
        """
        if mask.dim() != 1 or mask.dtype != torch.bool or mask.shape[0] <= self.last:
            raise ValueError(
                f"mask must be bool and longer than {self.last}; "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        return self._where(~mask.cpu()[self.positions])

    def below(self, n: int) -> TargetWeights | None:
        """Drops the positions ``>= n``; None when nothing is left."""
        return self._where(self.positions < n)

    def predicting(self) -> TargetWeights:
        """The rows that predict these tokens, one to the left of each, with the same weights.

        Raises:
            ValueError: The first token of the trace is a target; no row predicts it.
        """
        return TargetWeights(self.positions - 1, self.weights)

    def _where(self, kept: Tensor) -> TargetWeights | None:
        if not kept.any():
            return None
        return TargetWeights(self.positions[kept], self.weights[kept])
