"""Weights of attention heads, learned from what an answer loses without its sources.

After AT2 (Cohen-Wang et al. 2025, "Learning to attribute with attention"): the log-probability of
an answer, after some sources of its prompt were left out, is foreseen from how much attention the
answer's rows pay to those that are left,

    log p(answer | kept) ~ sum_s kept_s sum_{l,h} theta_{l,h} a_{s,l,h} + constant

with ``a_{s,l,h}`` the column sums ``c_h[j]`` of layer ``l`` over the tokens ``j`` of source ``s``.
Here ``theta`` is not negative, so that ``sum_h theta_h c_h[j]`` can take the place of a layer's
proximities, and a hop's scores can be the next hop's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""How far a fit may be from its optimum: the largest violation of a condition of Karush, Kuhn and
Tucker, as a share of the largest gradient at zero."""

_MOST_STEPS = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class HeadExample:
    """What ablations of the sources of one answer have shown.

    Attributes:
        attention: ``[S, L, H]``, attention of the answer's rows on each source, a mean over rows.
        kept: ``[A, S]``, 1 where an ablation keeps a source, 0 where it leaves it out.
        logprobs: ``[A]``, log-probability of the answer after each ablation, in nats.
    """

    attention: Tensor
    kept: Tensor
    logprobs: Tensor


def fit_head_weights(examples: Sequence[HeadExample], ridge: float) -> Tensor:
    """Weights of heads by a ridge regression without negative weights.

    A feature is the attention of one head on what an ablation keeps, less its mean over the
    example's ablations, and divided by its standard deviation over all examples. Foreseen is the
    log-probability, standardised within the example. With ``n`` ablations in all and these
    features in ``X``, the weights of the features minimise

        ||X theta - y||^2 + ridge n ||theta||^2    such that theta >= 0

    to `TOLERANCE`, in float64. The same examples give the same weights.

    Args:
        examples: Of the same layers and heads.
        ridge: Penalty, in units of the mean square of the features; above 0.

    Returns:
        float32 ``[L, H]``, not negative: standard deviations of the log-probability for each unit
        of attention. Only their proportions matter for scores.

    Raises:
        ValueError: The penalty is not above 0, the examples do not fit together or are not finite,
            or nothing can be learned of them: every weight would be 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    if not examples:
        raise ValueError("there is no example to learn from")
    layers, heads = examples[0].attention.shape[1:]
    features = layers * heads
    squares = torch.zeros(features, features, dtype=torch.float64)
    products = torch.zeros(features, dtype=torch.float64)
    count = 0
    for example in examples:
        x, y = _standardised(example, layers, heads)
        squares.addmm_(x.T, x)
        products.addmv_(x.T, y)
        count += len(y)
    scale = (squares.diagonal() / count).sqrt()
    scale[scale == 0] = 1.0
    gram = squares / (scale[:, None] * scale)
    gram.diagonal().add_(ridge * count)
    weights = (non_negative_minimum(gram, products / scale, ridge * count) / scale).float()
    if not bool(weights.any()):
        raise ValueError(
            f"nothing can be learned of {len(examples)} examples: the log-probability of no answer "
            "rises with the attention of any head on what is kept"
        )
    return weights.view(layers, heads)


def _standardised(example: HeadExample, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """Features ``[A, L * H]`` and targets ``[A]`` of one example, less their means."""
    attention, kept, logprobs = (
        part.double() for part in (example.attention, example.kept, example.logprobs)
    )
    shapes = tuple(attention.shape), tuple(kept.shape), tuple(logprobs.shape)
    sources, ablations = len(attention), len(logprobs)
    if shapes != ((sources, layers, heads), (ablations, sources), (ablations,)) or not ablations:
        raise ValueError(f"an example of shapes {shapes} does not fit {layers} x {heads} heads")
    if not all(bool(part.isfinite().all()) for part in (attention, logprobs)):
        raise ValueError("an example is not finite")
    features = kept @ attention.flatten(1)
    spread = logprobs.std(correction=0)
    targets = (logprobs - logprobs.mean()) / torch.where(spread > 0, spread, 1.0)
    return features - features.mean(0), targets


def non_negative_minimum(matrix: Tensor, vector: Tensor, smallest: float) -> Tensor:
    """The ``x >= 0`` that minimises ``x matrix x / 2 - vector x``.

    Projected gradient steps with Nesterov's momentum for strongly convex functions: each divides
    the distance by ``1 - sqrt(smallest / largest)`` or more, whatever is 0 in the end.

    Args:
        matrix: float64 ``[n, n]``, symmetric.
        vector: float64 ``[n]``.
        smallest: A lower bound of its eigenvalues, above 0.

    Returns:
        float64 ``[n]``, see `TOLERANCE`.

    Raises:
        ValueError: It was not found in 200,000 steps, since ``smallest`` is too small.
    """
    steepest = float(vector.clamp(min=0).max())
    x = torch.zeros_like(vector)
    if steepest <= 0:  # No step from zero helps.
        return x
    largest = float(matrix.abs().sum(1).max())  # No eigenvalue is above it.
    root = (smallest / largest) ** 0.5
    momentum = (1 - root) / (1 + root)
    ahead = x
    for _ in range(_MOST_STEPS):
        following = (ahead - (matrix @ ahead - vector) / largest).clamp_(min=0)
        ahead = following + momentum * (following - x)
        x = following
        gradient = matrix @ x - vector
        violation = torch.where(x > 0, gradient.abs(), -gradient).max()
        if violation <= TOLERANCE * steepest:
            return x
    raise ValueError("the weights of heads were not found; a larger ridge makes it easier")


def head_scores(weights: Tensor, sums: Tensor, out: Tensor | None = None) -> Tensor:
    """Each layer's share of the scores, ``sum_h theta_h c_h[j]``; over layers they add up to them.

    Args:
        weights: float32 ``[L, H]``, see `fit_head_weights`.
        sums: float32 ``[L, H, N]``, column sums of attention.
        out: ``[L, N]``, gets the shares; it may lie in `sums`, since a layer's are read before its
            shares are written.

    Returns:
        float32 ``[L, N]``.
    """
    if out is None:
        out = sums.new_empty(sums.shape[0], sums.shape[2])
    for own, layer, shares in zip(weights, sums, out, strict=True):
        shares.copy_(own @ layer)
    return out


def kept_scores(scores: Tensor, kept: Tensor) -> Tensor:
    """What sources' scores foresee of ablations: the sum of those that are kept, ``[A]``.

    Args:
        scores: ``[S]``.
        kept: ``[A, S]``, see `HeadExample`.
    """
    return kept.double() @ scores.double()


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of ranks, ties with their average; 0 where a side is constant."""
    a, b = (_ranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float((a.square().sum() * b.square().sum()).sqrt())
    return float(a @ b) / size if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[places]
