"""Baselines that read attention matrices, and the paper authors' package.

IFR per token, rollouts, means and value norms use one recorded forward pass, and each is charged
for it. Rows are float64 distributions over the tokens that a row sees, so that composing them never
creates mass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Family, MethodFailed, Prepared, Scores, Span
from benchmarks.faithfulness.hf import HFModel, LayerRecord, RecordedForward, all_cores, one_core
from vllm_flashtrace.core import (
    HopRecursion,
    HopResult,
    TargetWeights,
    l1_proximity,
    token_proximity,
    token_shares,
)

OneHop = Callable[[TargetWeights], Tensor]

_TEMPORARY_FLOATS = 1 << 18
"""Largest block of contributions held at a time (1 MiB, to stay in the cache)."""

_REACH_SLACK = 1 + 1e-5
"""Rounding of the reach must never hide a coordinate."""


def proximity_scores(recorded: RecordedForward, target: TargetWeights) -> Tensor:
    """FlashTrace's attribution pass (arXiv 2602.01914): ``[N]`` float64, summed over layers."""
    rows, weights, seen = target.positions, target.weights, target.last + 1
    scores = torch.zeros(len(recorded.layers[0].before), dtype=torch.float64)
    for layer in recorded.layers:
        attention = layer.attention[:, rows, :seen]
        stream = weights @ layer.after[rows]
        tokens = token_proximity(
            (weights[None, None] @ attention).squeeze(1),
            layer.values[:seen],
            layer.projection.weight,
            stream,
            column_norms=layer.projection.column_norms,
        )
        residual = l1_proximity(weights @ layer.before[rows], stream)
        scores[:seen] += token_shares(tokens, tokens.sum() + residual)
    return scores


def norm_scores(recorded: RecordedForward, target: TargetWeights) -> Tensor:
    """``sum c_h[j] ||v_j^h W_O^h||_2`` over layers and heads (Kobayashi et al. 2020), ``[N]``."""
    rows, weights = target.positions, target.weights
    scores = torch.zeros(len(recorded.layers[0].before), dtype=torch.float64)
    for layer in recorded.layers:
        column_sums = (weights[None, None] @ layer.attention[:, rows]).squeeze(1)  # [H, N]
        projected = layer.projection.weight  # [H, d, D]
        # ||v W||^2 = v (W W^T) v^T, which never makes a vector of size D for each pair.
        gram = projected @ projected.transpose(1, 2)
        groups = layer.values.shape[1]
        values = layer.values.transpose(0, 1).repeat_interleave(len(gram) // groups, dim=0)
        norms = ((values @ gram) * values).sum(-1).clamp(min=0).sqrt()
        scores += (column_sums * norms).double().sum(0)
    return scores


def token_rows(recorded: RecordedForward, positions: Span) -> Tensor:
    """IFR (Ferrando & Voita 2024) of each of these tokens alone: ``[R, N]``, each row sums to 1.

    The same numbers as `proximity_scores` with one position at a time, for all positions at once.
    """
    rows, seen = slice(*positions), positions[1]
    length = len(recorded.layers[0].before)
    scores = torch.zeros(positions[1] - positions[0], length, dtype=torch.float64)
    for layer in recorded.layers:
        stream = layer.after[rows]
        tokens = _row_proximities(layer, rows, seen)
        residual = l1_proximity(layer.before[rows], stream)
        scores[:, :seen] += token_shares(tokens, tokens.sum(-1) + residual)
    return distributions(scores)


def _row_proximities(layer: LayerRecord, rows: slice, seen: int) -> Tensor:
    """``sum_h prox(alpha_ij v_j W_O^h)`` of every row with its own stream, ``[R, seen]``.

    As in `vllm_flashtrace.core.token_proximity`: the sum of ``t = sign(x) z`` is one product for
    each pair, pairs where it is not positive have no proximity, and only pairs that reach past zero
    in some coordinate, ``alpha_ij ||v_j|| ||W_O^h[:, i]|| > |x_i|``, need their vectors.
    """
    attention = layer.attention[:, rows, :seen].transpose(0, 1)  # [R, H, seen]
    weight, column_norms = layer.projection  # [H, d, D], [H, D]
    shared = len(weight) // layer.values.shape[1]
    values = layer.values[:seen].transpose(0, 1).repeat_interleave(shared, dim=0)  # [H, seen, d]
    stream = layer.after[rows]
    signs, size = torch.where(stream < 0, -1.0, 1.0), stream.abs()
    directions = torch.einsum("rD,hdD->hrd", signs, weight)
    totals = torch.bmm(directions, values.transpose(1, 2)).transpose(0, 1) * attention

    nearest = (size[:, None] / column_norms).nan_to_num(torch.inf).amin(-1)  # [R, H]
    reach = attention * torch.linalg.vector_norm(values, dim=-1) * _REACH_SLACK
    row, head, token = ((totals > 0) & (reach > nearest[..., None])).nonzero(as_tuple=True)
    contributions = values @ weight  # [H, seen, D]
    for part in torch.arange(len(row)).split(_TEMPORARY_FLOATS // stream.shape[1]):
        at = row[part], head[part], token[part]
        aligned = contributions[at[1], at[2]] * attention[at][:, None] * signs[at[0]]
        totals[at] -= 2 * (aligned - size[at[0]]).clamp_(min=0).sum(-1)
    return totals.clamp_(min=0).sum(1)


def distributions(rows: Tensor) -> Tensor:
    """Rows divided by their sums; a row without mass stays zero."""
    totals = rows.sum(-1, keepdim=True)
    return torch.where(totals > 0, rows / totals, torch.zeros_like(rows))


def compose(start: Tensor, units: Sequence[Span], rows: Sequence[Tensor]) -> Tensor:
    """Sends mass on units of the reasoning back to what comes before them, the last unit first.

    Args:
        start: float64 ``[N]``, mass that the target puts on every token.
        units: Ascending disjoint ranges of tokens.
        rows: float64 ``[N]`` of each unit: its scores. Mass that a unit gives to itself goes round
            until it has left, so only what comes before the unit counts.

    Returns:
        float64 ``[N]``, what has arrived at each token and was not sent on.
    """
    mass = start.clone()
    for (first, end), row in reversed(list(zip(units, rows, strict=True))):
        earlier = row[:first].sum()
        if earlier > 0:
            mass[:first] += mass[first:end].sum() * row[:first] / earlier
            mass[first:end] = 0
    return mass


def recursion(prepared: Prepared, hops: int, one_hop: OneHop) -> HopResult:
    """Hops from the target through the reasoning, with the attribution pass that is given."""
    length = len(prepared.token_ids)
    followed = torch.zeros(length, dtype=torch.bool)
    followed[slice(*prepared.reasoning)] = True
    target = TargetWeights.from_spans([prepared.target])
    steps = HopRecursion(target, prepared.prompt_length, length, followed, hops=hops)
    while (weights := steps.next_weights()) is not None:
        steps.add(one_hop(weights))
    return steps.result()


# Scores of all tokens [N] and facts.
Outcome = tuple[Tensor, dict[str, float]]

RESIDUAL_SHARE = 0.5
"""Share of the residual connection in attention rollout (Abnar & Zuidema 2020)."""


class AttentionFamily(Family):
    """Methods on the attention matrices and value vectors of one forward pass."""

    labels: Mapping[str, str] = {
        "ifr-per-token": "IFR of every target token alone, averaged",
        "token-rollout": "IFR of every response token, composed back to the prompt",
        "cage": "attribution of every sentence of the reasoning, composed back to the prompt",
        "attention-mean": "attention of the target, mean over layers and heads",
        "attention-rollout": "attention rollout with residual 0.5",
        "alti-rollout": "rollout of ALTI's contributions by l1 proximity, rows that predict",
        "value-norm": "attention times norm of the projected value, one hop",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        methods: dict[str, Callable[[RecordedForward, Prepared], Outcome]] = {
            "ifr-per-token": ifr_per_token,
            "token-rollout": token_rollout,
            "cage": cage,
            "attention-mean": attention_mean,
            "attention-rollout": attention_rollout,
            "alti-rollout": alti_rollout,
            "value-norm": value_norm,
        }
        recorded = self._hf.recorded(prepared)
        results = {}
        for name in names:
            with torch.no_grad(), one_core():
                began = time.perf_counter()
                scores, facts = methods[name](recorded, prepared)
                seconds = recorded.seconds + time.perf_counter() - began
            results[name] = Scores(scores.double()[slice(*prepared.user)].numpy(), seconds, facts)
        return results

    def close(self) -> None:
        """Lets go of the recorded forward pass."""
        self._hf.close()


def ifr_per_token(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """The mean over the target of each token's distribution."""
    scores = token_rows(recorded, prepared.target).mean(0)
    return scores, _on_reasoning(scores, prepared)


def token_rollout(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """`ifr_per_token`, with the mass on reasoning tokens sent on, token by token, to the prompt.

    This is the recursion without a limit on hops or an aggregate; mass on the target stays there.
    """
    start, facts = ifr_per_token(recorded, prepared)
    rows = token_rows(recorded, prepared.reasoning)
    tokens = [(at, at + 1) for at in range(*prepared.reasoning)]
    return compose(start, tokens, list(rows)), facts


def cage(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """The recursion of `token_rollout` with sentences in the place of tokens, and one target."""

    def explain(span: tuple[int, int]) -> Tensor:
        return distributions(proximity_scores(recorded, TargetWeights.from_spans([span])))

    start = explain(prepared.target)
    rows = [explain(sentence) for sentence in prepared.reasoning_sentences]
    scores = compose(start, prepared.reasoning_sentences, rows)
    return scores, _on_reasoning(start, prepared)


def attention_mean(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """Attention from the target's rows, averaged over rows, layers and heads."""
    rows = slice(*prepared.target)
    layers = [layer.attention[:, rows].double().mean((0, 1)) for layer in recorded.layers]
    scores = torch.stack(layers).mean(0)
    return scores, _on_reasoning(scores, prepared)


def attention_rollout(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """Product over layers of ``(1 - r) mean_h(A) + r I``, averaged over the target's rows."""
    scores = torch.zeros(len(prepared.token_ids))
    scores[slice(*prepared.target)] = 1 / (prepared.target[1] - prepared.target[0])
    for layer in reversed(recorded.layers):
        # A row vector from the top down is the same product without a matrix of it.
        heads = (scores[None, None] @ layer.attention).squeeze(1)
        scores = (1 - RESIDUAL_SHARE) * heads.mean(0) + RESIDUAL_SHARE * scores
    return scores, _on_reasoning(scores, prepared)


def alti_rollout(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """Product over layers of ALTI's contributions, averaged over the rows that predict the target.

    Ferrando, Gallego & Costa-jussa, "Measuring the Mixing of Contextual Information in the
    Transformer" (EMNLP 2022). It differs from `attention_rollout` in what a layer hands on, and
    from `token_rollout` in what is composed: there the layers' sums of whole tokens, here the
    layers themselves.
    """
    first, end = prepared.target
    scores = torch.zeros(len(prepared.token_ids))
    scores[first - 1 : end - 1] = 1 / (end - first)
    for layer in reversed(recorded.layers):
        scores = scores @ alti_contributions(layer)
    return scores, _on_reasoning(scores, prepared)


def alti_contributions(layer: LayerRecord) -> Tensor:
    """``max(0, |y_i|_1 - |y_i - T_i(x_j)|_1)``, each row divided by its sum, ``[N, N]``.

    ``y_i`` is the stream after attention, ``T_i(x_j) = sum_h alpha_ij v_j W_O^h``, and ``x_i`` on
    top where ``j = i``. Unlike IFR, all heads and the residual are one vector. The next norm, which
    ALTI folds into ``T`` for models that normalise after the residual, is not in the block here.
    """
    weight = layer.projection.weight
    shared = len(weight) // layer.values.shape[1]
    values = layer.values.repeat_interleave(shared, dim=1)  # [N, H, d]
    signs = torch.where(layer.after < 0, -1.0, 1.0)
    length = len(signs)
    contributions = torch.zeros(length, length)
    step = max(1, _TEMPORARY_FLOATS // layer.after.numel())
    for tokens in torch.arange(length).split(step):
        low = int(tokens[0])  # No earlier row sees these tokens.
        vectors = torch.einsum("jhd,hdD->jhD", values[tokens], weight)
        handed_on = layer.attention[:, low:, tokens].permute(2, 1, 0) @ vectors  # [J, rows, D]
        handed_on[torch.arange(len(tokens)), tokens - low] += layer.before[tokens]
        aligned = handed_on * signs[low:]
        # |y| - |y - t| coordinate by coordinate: the two norms are large and nearly equal.
        beyond = (aligned - layer.after[low:].abs()).clamp_(min=0)
        contributions[low:, tokens] = (aligned.sum(-1) - 2 * beyond.sum(-1)).T.clamp(min=0)
    return distributions(contributions.tril())


def value_norm(recorded: RecordedForward, prepared: Prepared) -> Outcome:
    """Value norms instead of proximity, aggregated and recursed as flashtrace-k1 is."""
    result = recursion(prepared, 1, lambda weights: norm_scores(recorded, weights))
    facts = {
        "reasoning_mass": result.hops[0].reasoning_mass,
        "remaining_mass": result.remaining_mass,
    }
    return result.scores, facts


def _on_reasoning(scores: Tensor, prepared: Prepared) -> dict[str, float]:
    total = float(scores.sum())
    share = float(scores[slice(*prepared.reasoning)].sum()) / total if total > 0 else 0.0
    return {"reasoning_mass": share}


_LLAMA = "llama"


@dataclass(frozen=True)
class PackageResult:
    """What the library says.

    Attributes:
        observation: ``[N]``, its own combination of the hops.
        hops: ``[N]`` of each hop, unnormalised.
        ratios: Running product of the mass on reasoning.
        seconds: Forward pass and hops.
    """

    observation: Tensor
    hops: tuple[Tensor, ...]
    ratios: tuple[float, ...]
    seconds: float

    def by_formula(self, prompt_length: int, reasoning: tuple[int, int]) -> Tensor:
        """The paper's formula on the library's hops, each normalised: float64 ``[N]``.

        The library weighs hops by their raw totals, which differ by the residual's shares.
        """
        total = torch.zeros(len(self.observation), dtype=torch.float64)
        weight = 1.0
        for scores in self.hops:
            normalised = scores.double() / scores.double().sum()
            total[:prompt_length] += weight * normalised[:prompt_length]
            weight *= float(normalised[slice(*reasoning)].sum())
        return total


class PackageFamily(Family):
    """``flashtrace-package``: the library with one hop over the reasoning."""

    labels: Mapping[str, str] = {"flashtrace-package": "the authors' library, one hop"}

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        if not names:
            return {}
        result = run_package(self._hf, prepared, hops=1)
        scores = result.observation.double()[slice(*prepared.user)].numpy()
        facts = {"reasoning_mass": result.ratios[0], "remaining_mass": result.ratios[-1]}
        return {"flashtrace-package": Scores(scores, result.seconds, facts)}


def run_package(hf: HFModel, prepared: Prepared, hops: int) -> PackageResult:
    """The library's attribution with stored attentions; without reasoning only hop 0.

    Raises:
        MethodFailed: The library is not exact for this architecture.
    """
    from benchmarks.reference import capture

    if hf.model.config.model_type != _LLAMA:
        raise MethodFailed(f"the library is exact for Llama only, not {hf.model.config.model_type}")
    hf.check_attention_fits(len(prepared.token_ids))
    first, end = prepared.reasoning
    with torch.no_grad(), all_cores():
        began = time.perf_counter()
        captured = capture(hf.model, list(prepared.token_ids))
        # Without reasoning its span is only masked out, so the template's last token will do.
        empty = first == end
        span = (first - 1, first) if empty else prepared.reasoning
        result = captured.hops(prepared.target, span, 0 if empty else hops)
        seconds = time.perf_counter() - began
    return PackageResult(
        observation=result.observation["sum"],
        hops=tuple(hop.token_importance_total for hop in result.raw_attributions),
        ratios=(0.0,) if empty else tuple(float(ratio) for ratio in result.thinking_ratios),
        seconds=seconds,
    )
