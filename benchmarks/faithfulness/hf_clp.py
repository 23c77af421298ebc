"""Perturbation by conditional log-probabilities (CLP): how far the predicted distributions move.

Invariant: positions never shift; a removed sentence is as many pad tokens.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.hf import HFModel, all_cores
from benchmarks.faithfulness.method import Scores

_BATCH_TOKENS = 1 << 14
"""Most tokens of one forward pass."""


class ClpFamily:
    """``clp-sentence``: one batch of the prompt with each sentence removed in turn."""

    labels: Mapping[str, str] = {
        "clp-sentence": "divergence of the target's distributions without each sentence",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `benchmarks.faithfulness.method.Family`."""
        if not names:
            return {}
        with torch.no_grad(), all_cores(), self._hf.fused_attention():
            began = time.perf_counter()
            divergences = clp_divergences(self._hf, prepared)
            scores = torch.zeros(len(prepared.token_ids), dtype=torch.float64)
            for (first, end), divergence in zip(prepared.sentences, divergences, strict=True):
                scores[first:end] = divergence / (end - first)
            seconds = time.perf_counter() - began
        return {"clp-sentence": Scores(scores[slice(*prepared.user)].numpy(), seconds)}

    def close(self) -> None:
        """Holds nothing of its own."""


def clp_divergences(hf: HFModel, prepared: Prepared) -> Tensor:
    """What the target's predictions lose with each sentence of the user's text, ``[S]`` float64.

    ``sum_v p(v) [log p(v) - log q(v)]`` over the vocabulary, summed over target positions, with
    ``p`` the distribution after the whole prompt and ``q`` the one without the sentence.
    """
    whole = torch.tensor(prepared.token_ids)
    variants = whole.repeat(1 + len(prepared.sentences), 1)
    for row, (first, end) in enumerate(prepared.sentences, start=1):
        variants[row, first:end] = hf.pad_token_id
    original: Tensor | None = None
    divergences = []
    for batch in variants.split(max(2, _BATCH_TOKENS // len(whole))):
        logs = hf.target_logits(batch, prepared).float().log_softmax(-1)
        if original is None:
            original, logs = logs[0], logs[1:]
        change = (original.exp() * (original - logs)).sum(-1, dtype=torch.float64)
        divergences.append(change.sum(-1).clamp(min=0))
    return torch.cat(divergences)
