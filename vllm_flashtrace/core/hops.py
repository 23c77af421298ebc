"""Recursion of attribution over the reasoning (section 3.3).

Hop 0 explains the target; hop ``k`` explains the reasoning, weighted by the scores that hop ``k-1``
put on it. Each hop's scores are normalised to sum to 1 over the context. With ``rho_k`` the mass of
hop ``k`` on the reasoning and ``w_I^(k)`` its scores on the input,

    final scores = w_I^(0) + sum_{k>=1} (prod_{j<k} rho_j) w_I^(k)

Mass is conserved: after any number of hops, what is on the input, on skipped tokens and on
generated tokens that are not followed, plus what is still on the reasoning, sums to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_flashtrace.core.weights import TargetWeights


class HopRecursion:
    """Chooses the target of each hop and adds up the hops; the caller runs the attribution.

    Use::

        while (weights := recursion.next_weights()) is not None:
            recursion.add(attribute(weights))
        result = recursion.result()
    """

    def __init__(
        self,
        target: TargetWeights,
        prompt_length: int,
        length: int,
        recursion_mask: Tensor,
        *,
        hops: int | Literal["auto"] = 1,
        skip_mask: Tensor | None = None,
        auto_threshold: float = 0.05,
        max_hops: int = 8,
        predicting: bool = False,
    ) -> None:
        """Starts a recursion.

        Args:
            target: What hop 0 explains, generated tokens only.
            prompt_length: Number of prompt tokens.
            length: Number of tokens N of the trace, prompt and generated.
            recursion_mask: bool ``[N]``, tokens that later hops explain in turn. Prompt tokens
                in it (earlier assistant turns) count as reasoning, not as input.
            hops: Number of hops after hop 0, or ``"auto"``: until less than `auto_threshold` of
                the mass is left on reasoning, at most `max_hops`.
            skip_mask: bool ``[N]``, tokens that are never explained and never credited.
            auto_threshold: Remaining mass at which ``"auto"`` stops.
            max_hops: Limit for ``"auto"``.
            predicting: Whether hop 0 explains the rows that predict the target's tokens, one to
                the left of each, in place of the tokens' own. Later hops explain what earlier
                ones read, at the rows where it stands.

        Raises:
            ValueError: Every target token is skipped (``target.without(skip_mask) is None``), the
                target lies outside the generated tokens, a mask does not fit, or a number is out
                of range.
        """
        if not 0 <= prompt_length <= length:
            raise ValueError(f"prompt_length {prompt_length} is not within 0..{length}")
        if target.first < prompt_length or target.last >= length:
            raise ValueError(
                f"target positions {target.first}..{target.last} are not all generated tokens "
                f"({prompt_length}..{length - 1})"
            )
        if hops != "auto" and (isinstance(hops, bool) or not isinstance(hops, int) or hops < 0):
            raise ValueError(f'hops must be an integer >= 0 or "auto", got {hops!r}')
        if not 0 <= auto_threshold <= 1:
            raise ValueError(f"auto_threshold must be within 0..1, got {auto_threshold}")
        if max_hops < 0:
            raise ValueError(f"max_hops must not be negative, got {max_hops}")

        skipped = torch.zeros(length, dtype=torch.bool) if skip_mask is None else skip_mask
        skipped = _checked_mask("skip_mask", skipped, length)
        followed = _checked_mask("recursion_mask", recursion_mask, length) & ~skipped
        first = target.without(skipped)
        if first is None:
            raise ValueError("every target token is skipped")
        self._target_tokens = first.positions
        if predicting:
            first = first.predicting()

        in_prompt = torch.arange(length) < prompt_length
        self._parts = {
            "input_mass": in_prompt & ~followed & ~skipped,
            "reasoning_mass": followed,
            "target_mass": ~in_prompt & ~followed & ~skipped,
            "skipped_mass": skipped,
        }
        self._length = length
        self._last_hop = max_hops if hops == "auto" else hops
        self._threshold = auto_threshold if hops == "auto" else 0.0
        self._hops: list[_Hop] = []
        # Added up hop by hop: a long trace of a deep model is 42 MB a hop.
        self._layers: Tensor | None = None
        self._next: TargetWeights | None = first

    def next_weights(self) -> TargetWeights | None:
        """Weights of the hop to run now, or None when the recursion is finished.

        Answers the same until `add` is called.
        """
        return self._next

    @property
    def target_tokens(self) -> Tensor:
        """Positions of the tokens that hop 0 explains, int64 ``[R]``."""
        return self._target_tokens

    def weigh(self, factors: Tensor) -> None:
        """Multiplies the weights of the target's tokens, before hop 0.

        Args:
            factors: ``[R]``, positive, in the order of `target_tokens`.

        Raises:
            ValueError: A factor is not positive, or their number is another.
            RuntimeError: A hop has been run.
        """
        if self._next is None or self._hops:
            raise RuntimeError("the target has been explained")
        if factors.shape != self._target_tokens.shape or not bool((factors > 0).all()):
            raise ValueError(f"need {len(self._target_tokens)} positive factors, got {factors}")
        self._next = TargetWeights(self._next.positions, self._next.weights * factors.float())

    @property
    def begun(self) -> bool:
        """Whether a hop has been run."""
        return bool(self._hops)

    def next_target(self) -> TracedTarget | None:
        """The hop to run now and those that may follow it, or None as `next_weights`."""
        return None if self._next is None else TracedTarget(self._next, self.further_hops())

    def further_hops(self) -> FurtherHops | None:
        """What may follow the hop that `next_weights` asks for; None if it is the last."""
        left = self._last_hop - len(self._hops)
        if self._next is None or left < 1:
            return None
        # What lies behind a hop's last target gets no score, so no later hop explains it.
        positions = self._parts["reasoning_mass"][: self._next.last + 1].nonzero().squeeze(1)
        if not len(positions):
            return None
        return FurtherHops(positions, left, self._threshold / self._remaining_mass())

    def add(self, scores: Tensor, layer_scores: Tensor | None = None) -> None:
        """Takes the outcome of the hop that `next_weights` asked for.

        Args:
            scores: ``[N]``, non-negative, summed over layers, in any scale.
            layer_scores: ``[L, N]``, the same before summing; given for every hop or for none.

        Raises:
            ValueError: The shape is wrong, a score is negative or not finite, all are zero, or
                the layers do not sum to the scores. The recursion is left unchanged.
            RuntimeError: No hop is awaited.
        """
        if self._next is None:
            raise RuntimeError("the recursion is finished; no hop is awaited")
        scores = _checked_scores("scores", scores, (self._length,), torch.float64)
        total = scores.sum()
        if total <= 0:
            raise ValueError("all scores of the hop are zero")
        weight = self._remaining_mass()
        if layer_scores is not None:
            share = self._checked_layers(layer_scores, scores) * (weight / float(total))
            self._layers = share if self._layers is None else self._layers.add_(share)
        elif self._layers is not None:
            raise ValueError("earlier hops had layer_scores, this one has none")

        scores = scores / total
        mass = HopMass(
            hop=len(self._hops),
            weight=weight,
            **{name: float(scores[part].sum()) for name, part in self._parts.items()},
        )
        self._hops.append(_Hop(scores, mass))
        self._next = self._following()

    def result(self) -> HopResult:
        """Adds up the hops run so far (fewer than asked for leave more `remaining_mass`).

        Raises:
            RuntimeError: No hop has been run.
        """
        if not self._hops:
            raise RuntimeError("no hop has been run")
        masses = [hop.mass for hop in self._hops]
        coefficients = [mass.weight for mass in masses]
        is_input = self._parts["input_mass"]
        scores = _weighted_sum([hop.scores for hop in self._hops], coefficients)
        return HopResult(
            scores=scores * is_input,
            generated_scores=scores * ~is_input,
            layer_scores=None if self._layers is None else self._layers * is_input,
            hops=tuple(masses),
            input_mass=sum(m.weight * m.input_mass for m in masses),
            remaining_mass=self._remaining_mass(),
            target_mass=sum(m.weight * m.target_mass for m in masses),
            skipped_mass=sum(m.weight * m.skipped_mass for m in masses),
            per_hop_scores=tuple(hop.scores for hop in self._hops),
        )

    def _remaining_mass(self) -> float:
        """Mass on reasoning that no hop has redistributed yet."""
        if not self._hops:
            return 1.0
        last = self._hops[-1].mass
        return last.weight * last.reasoning_mass

    def _following(self) -> TargetWeights | None:
        if len(self._hops) > self._last_hop or self._remaining_mass() < self._threshold:
            return None
        return TargetWeights.from_scores(self._hops[-1].scores, self._parts["reasoning_mass"])

    def _checked_layers(self, layer_scores: Tensor, scores: Tensor) -> Tensor:
        if layer_scores.dim() != 2:
            raise ValueError(f"layer_scores must be [L, N], got {tuple(layer_scores.shape)}")
        layers = layer_scores.shape[0]
        if self._hops:
            earlier = self._layers
            if earlier is None or earlier.shape[0] != layers:
                had = "none" if earlier is None else str(earlier.shape[0])
                raise ValueError(f"layer_scores has {layers} layers, earlier hops had {had}")
        shape = (layers, self._length)
        checked = _checked_scores("layer_scores", layer_scores, shape, torch.float32)
        summed = checked.sum(dim=0, dtype=torch.float64)
        difference = float((summed - scores).abs().sum() / scores.sum())
        if difference > 1e-3:
            raise ValueError(f"layer_scores do not sum to scores: relative L1 {difference:.1e}")
        return checked


@dataclass(frozen=True, eq=False)
class FurtherHops:
    """The hops that may follow a first one, for whoever runs several of them in a row.

    It asks for what `HopRecursion` asks for, and the recursion still judges the scores. So where
    rounding lets one of the two end a hop earlier, that hop is dropped or run by itself.

    Attributes:
        positions: int64 ``[F]``, ascending, on the CPU: tokens that may be explained.
        hops: Most hops, at least 1.
        threshold: Share of the first hop's mass left on reasoning below which they end.
    """

    positions: Tensor
    hops: int
    threshold: float = 0.0

    def after(self, scores: Tensor, mass: float) -> tuple[TargetWeights | None, float]:
        """The target of the hop after one that has run.

        Args:
            scores: ``[N]``, what the hop found, in any scale.
            mass: Share of the first hop's mass that it redistributed.

        Returns:
            The target, None where the hops end; and the share of mass that it redistributes.
        """
        scores = scores.detach().to("cpu", torch.float64)
        total = scores.sum()
        if not total.isfinite() or total <= 0:
            return None, mass
        scores = scores / total
        followed = torch.zeros(len(scores), dtype=torch.bool)
        followed[self.positions[: int(torch.searchsorted(self.positions, len(scores)))]] = True
        mass *= float(scores[followed].sum())
        if mass < self.threshold:
            return None, mass
        return TargetWeights.from_scores(scores, followed), mass


@dataclass(frozen=True, eq=False)
class TracedTarget:
    """A target, with the hops that whoever traces it is to run.

    Attributes:
        weights: Of the first hop.
        further: The hops that may follow it; None if that is all.
    """

    weights: TargetWeights
    further: FurtherHops | None = None

    @property
    def rows(self) -> Tensor:
        """Positions that one of its hops weighs, int64, ascending."""
        if self.further is None:
            return self.weights.positions
        return torch.cat([self.weights.positions, self.further.positions]).unique()


def rows_of(targets: Sequence[TracedTarget]) -> Tensor:
    """Positions that a hop of any of the targets weighs, int64, ascending."""
    return torch.cat([target.rows for target in targets]).unique()


@dataclass(frozen=True, slots=True)
class HopMass:
    """Where the mass of one hop went, in shares of the hop; the four parts sum to 1.

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
        layer_scores: float32 ``[L, N]``, each layer's share of `scores`, or None.
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


@dataclass(frozen=True, eq=False)
class _Hop:
    """Normalised scores ``[N]`` of one hop, and their mass by part."""

    scores: Tensor
    mass: HopMass


def _checked_mask(name: str, mask: Tensor, length: int) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (length,):
        raise ValueError(f"{name} must be bool [{length}], got {mask.dtype} {tuple(mask.shape)}")
    return mask.cpu()


def _checked_scores(
    name: str, scores: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    if scores.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(scores.shape)}")
    scores = scores.detach().to("cpu", dtype)
    if not scores.isfinite().all() or (scores < 0).any():
        raise ValueError(f"{name} of the hop must be finite and not negative")
    return scores


def _weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    pairs = zip(tensors, coefficients, strict=True)
    return torch.stack([tensor * coefficient for tensor, coefficient in pairs]).sum(dim=0)
