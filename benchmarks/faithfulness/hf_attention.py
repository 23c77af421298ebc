"""Baselines that read attention matrices: IFR per token, rollouts, means and value norms.

Invariant: all of them use one recorded forward pass, and each is charged for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.hf import HFModel, one_core
from benchmarks.faithfulness.hf_flow import (
    compose,
    distributions,
    norm_scores,
    proximity_scores,
    recursion,
    token_rows,
)
from benchmarks.faithfulness.hf_record import RecordedForward
from benchmarks.faithfulness.method import Scores
from vllm_flashtrace.core import TargetWeights

# Scores of all tokens [N] and facts.
Outcome = tuple[Tensor, dict[str, float]]

RESIDUAL_SHARE = 0.5
"""Share of the residual connection in attention rollout (Abnar & Zuidema 2020)."""


class AttentionFamily:
    """Methods on the attention matrices and value vectors of one forward pass."""

    labels: Mapping[str, str] = {
        "ifr-per-token": "IFR of every target token alone, averaged",
        "token-rollout": "IFR of every response token, composed back to the prompt",
        "cage": "attribution of every sentence of the reasoning, composed back to the prompt",
        "attention-mean": "attention of the target, mean over layers and heads",
        "attention-rollout": "attention rollout with residual 0.5",
        "value-norm": "attention times norm of the projected value, one hop",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `benchmarks.faithfulness.method.Family`."""
        methods: dict[str, Callable[[RecordedForward, Prepared], Outcome]] = {
            "ifr-per-token": ifr_per_token,
            "token-rollout": token_rollout,
            "cage": cage,
            "attention-mean": attention_mean,
            "attention-rollout": attention_rollout,
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
