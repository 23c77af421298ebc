"""Outcome of the recursion over hops, for everything downstream to read.

Invariant: masses are float64 shares of the whole, and those of one record sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HopMass:
    """Where the mass of one hop went; the four parts sum to 1.

    Attributes:
        hop: Index of the hop, 0 for the target itself.
        input_mass: On prompt tokens that recursion does not follow.
        reasoning_mass: On tokens that recursion follows (rho of this hop).
        target_mass: On generated tokens that recursion does not follow, the target among them.
        skipped_mass: On skipped tokens, wherever they are.
        weight: Share of the whole that this hop redistributes, the product of the earlier rho.
    """

    hop: int
    input_mass: float
    reasoning_mass: float
    target_mass: float
    skipped_mass: float
    weight: float


@dataclass(frozen=True, eq=False)
class HopResult:
    """The recursion's outcome.

    ``input_mass + remaining_mass + target_mass + skipped_mass == 1`` up to float64 rounding.

    Attributes:
        scores: float64 ``[N]``, final mass on each input token, zero elsewhere.
        generated_scores: float64 ``[N]``, mass that passed through each token that is not input
            (reasoning, target, skipped), each hop counted with its weight; zero on input tokens.
            For display: mass on reasoning is counted again wherever it flows next.
        layer_scores: float64 ``[L, N]``, each layer's share of `scores`, or None.
        hops: Mass of each hop.
        input_mass: Sum of `scores`.
        remaining_mass: Mass still on reasoning after the last hop.
        target_mass: Mass on generated tokens that recursion does not follow.
        skipped_mass: Mass on skipped tokens.
        per_hop_scores: float64 ``[N]`` of each hop, normalised to sum to 1.
    """

    scores: Tensor
    generated_scores: Tensor
    layer_scores: Tensor | None
    hops: tuple[HopMass, ...]
    input_mass: float
    remaining_mass: float
    target_mass: float
    skipped_mass: float
    per_hop_scores: tuple[Tensor, ...]
