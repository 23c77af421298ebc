"""Baselines that remove parts of the prompt, and those that look at no model.

Positions never shift: a removed token is a pad token, and the chat template stays.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.faithfulness.engine import EngineScorer
from benchmarks.faithfulness.example import Family, Prepared, Scores, Span, Values
from benchmarks.faithfulness.hf import HFModel, all_cores, target_logits

ABLATIONS = 32
MORE_ABLATIONS = 128
KEEP_PROBABILITY = 0.5
LASSO_ALPHA = 0.01
_CERTAIN = -1e-7
"""Log-probabilities above it are rounding: float32 does not tell them from 0."""

Masks = npt.NDArray[np.bool_]


class AblationFamily(Family):
    """Leave-one-out over tokens and sentences, and ContextCite.

    All of them watch the log-probability of the whole response, reasoning and output. Scores may be
    negative: without such a token the response is more likely.
    """

    labels: Mapping[str, str] = {
        "loo-token": "log-probability lost without the token",
        "loo-sentence": "log-probability lost without the sentence, spread over its tokens",
        "contextcite": f"sparse linear model of {ABLATIONS} random ablations of sentences",
        "contextcite-128": f"sparse linear model of {MORE_ABLATIONS} ablations of sentences",
    }

    def __init__(self, resources: Any) -> None:
        """Takes ``resources.engine`` and ``resources.seed``."""
        self._scorer: EngineScorer = resources.engine.scorer
        self._pad: int = resources.engine.pad_token_id
        self._seed = int(resources.seed)

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`; fact ``evaluations``, response scorings."""
        methods: dict[str, Callable[[Prepared], tuple[Values, int]]] = {
            "loo-token": self._loo_token,
            "loo-sentence": self._loo_sentence,
            "contextcite": lambda prepared: self._contextcite(prepared, ABLATIONS),
            "contextcite-128": lambda prepared: self._contextcite(prepared, MORE_ABLATIONS),
        }
        results = {}
        for name in names:
            self._scorer.forget()  # so that the seconds are its own
            began = time.perf_counter()
            values, evaluations = methods[name](prepared)
            seconds = time.perf_counter() - began
            results[name] = Scores(values, seconds, {"evaluations": float(evaluations)})
        return results

    def _loo_token(self, prepared: Prepared) -> tuple[Values, int]:
        tokens = [(position, position + 1) for position in range(*prepared.user)]
        return self._lost(prepared, tokens), 1 + len(tokens)

    def _loo_sentence(self, prepared: Prepared) -> tuple[Values, int]:
        lost = self._lost(prepared, prepared.sentences)
        return spread(lost, prepared.sentences, prepared.user), 1 + len(prepared.sentences)

    def _contextcite(self, prepared: Prepared, ablations: int) -> tuple[Values, int]:
        key = zlib.crc32(prepared.example.id.encode())
        source = np.random.default_rng([self._seed, key])
        kept = source.random((ablations, len(prepared.sentences))) < KEEP_PROBABILITY
        removed = [
            [span for span, keep in zip(prepared.sentences, row, strict=True) if not keep]
            for row in kept
        ]
        weights = surrogate(kept, self._logprobs(prepared, removed), prepared.response_length)
        return spread(weights, prepared.sentences, prepared.user), ablations

    def _lost(self, prepared: Prepared, spans: Sequence[Span]) -> Values:
        """What the response's log-probability loses without each span, ``[len(spans)]``."""
        whole, *without = self._logprobs(prepared, [[], *([span] for span in spans)])
        return whole - np.array(without, dtype=np.float64)

    def _logprobs(self, prepared: Prepared, removed: Sequence[Sequence[Span]]) -> list[float]:
        sequences = []
        for spans in removed:
            tokens = list(prepared.token_ids)
            for first, end in spans:
                tokens[first:end] = [self._pad] * (end - first)
            sequences.append(tokens)
        lengths = [prepared.response_length] * len(sequences)
        return self._scorer.response_logprobs(sequences, lengths)


def spread(weights: Values, spans: Sequence[Span], user: Span) -> Values:
    """Gives each token an equal part of its span's weight, ``[P]`` by offset from ``user[0]``."""
    scores = np.zeros(user[1] - user[0])
    for (first, end), weight in zip(spans, weights, strict=True):
        scores[first - user[0] : end - user[0]] = weight / (end - first)
    return scores


def surrogate(kept: Masks, logprobs: Sequence[float], response_length: int) -> Values:
    """ContextCite's weight of each source, ``[sources]`` (Cohen-Wang et al., NeurIPS 2024).

    A LASSO fit of the response's logit ``log p - log(1 - p)``, per token of the response, to
    standardised indicators of which sources were kept; weights are given back in nats of the whole
    response per source. Setting of the paper: ``alpha`` 0.01, sources kept with probability 1/2.
    Unlike there, a source that is left out is pad tokens, not a shorter text.

    Args:
        kept: ``[ablations, sources]``.
        logprobs: Of the response after each ablation.
        response_length: Its tokens.
    """
    features = kept.astype(np.float64)
    scale = features.std(axis=0)
    varies = scale > 0
    scale[~varies] = 1.0
    standardised = (features - features.mean(axis=0)) / scale
    logits = [_logit(min(value, _CERTAIN)) for value in logprobs]
    targets = np.array(logits, dtype=np.float64) / response_length
    return lasso(standardised, targets, LASSO_ALPHA) / scale * response_length


def lasso(
    features: Values, targets: Values, alpha: float, *, tolerance: float = 1e-9, sweeps: int = 10000
) -> Values:
    """Minimises ``|y - X w|^2 / (2 n) + alpha |w|_1`` by cyclic coordinate descent.

    Args:
        features: ``X``, ``[n, d]``, with columns of mean 0.
        targets: ``y``, ``[n]``; its mean is the intercept, which is not penalised.
        alpha: Weight of the penalty.
        tolerance: Largest change of a coefficient in the last sweep.
        sweeps: Most passes over the coefficients.

    Returns:
        ``w``, ``[d]``; 0 for a column of zeros.

    Raises:
        ArithmeticError: Coefficients still change after so many sweeps.
    """
    count = len(targets)
    squares = (features**2).sum(axis=0) / count
    weights = np.zeros(features.shape[1])
    residual = targets - targets.mean()
    for _ in range(sweeps):
        largest = 0.0
        for j in np.flatnonzero(squares):
            pull = features[:, j] @ residual / count + squares[j] * weights[j]
            shrunk = math.copysign(max(abs(pull) - alpha, 0.0), pull) / squares[j]
            if shrunk != weights[j]:
                residual += features[:, j] * (weights[j] - shrunk)
                largest = max(largest, abs(shrunk - weights[j]))
                weights[j] = shrunk
        if largest <= tolerance:
            return weights
    raise ArithmeticError(f"coefficients still change by {largest:.1e} after {sweeps} sweeps")


def _logit(logprob: float) -> float:
    """``log p - log(1 - p)`` of a log-probability below 0."""
    return logprob - math.log(-math.expm1(logprob))


_BATCH_TOKENS = 1 << 14
"""Most tokens of one forward pass."""


class ClpFamily(Family):
    """``clp-sentence``: one batch of the prompt with each sentence removed in turn."""

    labels: Mapping[str, str] = {
        "clp-sentence": "divergence of the target's distributions without each sentence",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
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
        logs = target_logits(hf.model, batch, prepared).float().log_softmax(-1)
        if original is None:
            original, logs = logs[0], logs[1:]
        change = (original.exp() * (original - logs)).sum(-1, dtype=torch.float64)
        divergences.append(change.sum(-1).clamp(min=0))
    return torch.cat(divergences)


REPLACEMENTS = 64
"""Prompts with some tokens replaced, of ReAGent."""
REPLACED_SHARE = 0.3
"""Share of the user's tokens that are replaced in each; the paper's."""
_REAGENT_BATCH_TOKENS = 1 << 11
"""Fewer in a pass than of CLP: logits of all outputs of a pass are held."""


class ReagentFamily(Family):
    """``reagent``: tokens replaced by other likely ones, some at a time."""

    labels: Mapping[str, str] = {
        "reagent": f"ReAGent: {REPLACEMENTS} prompts with {REPLACED_SHARE:.0%} of tokens replaced",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``, and ``resources.seed``."""
        self._hf: HFModel = resources.hf
        self._seed = int(resources.seed)

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`; fact ``evaluations``, prompts beside the original one."""
        if not names:
            return {}
        source = torch.Generator().manual_seed(
            zlib.crc32(f"{self._seed}/{prepared.example.id}".encode())
        )
        with torch.no_grad(), all_cores(), self._hf.fused_attention():
            began = time.perf_counter()
            scores = reagent(self._hf, prepared, REPLACEMENTS, source)
            seconds = time.perf_counter() - began
        return {"reagent": Scores(scores.numpy(), seconds, {"evaluations": float(REPLACEMENTS)})}


def reagent(hf: HFModel, prepared: Prepared, count: int, source: torch.Generator) -> Tensor:
    """Importance of the user's tokens, ``[P]`` float64 (Zhao & Shan, "ReAGent", 2024).

    Each of ``count`` prompts has random tokens replaced. With ``delta`` the probability that a
    token of the output loses by it, averaged over the output, ``logit((1 + delta) / 2)`` counts for
    every replaced token and against every other one; scores are the means over the prompts. Unlike
    there

    - the tokens that replace others are drawn from what the explained model itself expects there
      after the unchanged text before, without the token that stands there, and not from a masked
      language model;
    - all tokens of the output share the replacements, and these are ``count``, whatever they show;
    - scores start at 0 and not at random, and the softmax that turns the paper's scores into a
      distribution is left out: it does not change the order of tokens.
    """
    first, end = prepared.user
    size = end - first
    whole = torch.tensor(prepared.token_ids)
    states = hf.model.model(input_ids=whole[None], use_cache=False).last_hidden_state[0]
    chances = hf.model.lm_head(states[torch.arange(first - 1, end - 1).clamp(min=0)]).float()
    chances[torch.arange(size), whole[first:end]] = -torch.inf
    others = torch.multinomial(chances.softmax(-1), count, True, generator=source)
    # As many in each prompt: those with the smallest of random numbers.
    order = torch.rand(count, size, generator=source).argsort(-1).argsort(-1)
    replaced = order < max(1, round(REPLACED_SHARE * size))
    variants = whole.repeat(1 + count, 1)
    variants[1:, first:end] = torch.where(replaced, others.T, whole[first:end])
    answer = whole[slice(*prepared.target)]
    found = []
    for batch in variants.split(max(1, _REAGENT_BATCH_TOKENS // len(whole))):
        logits = target_logits(hf.model, batch, prepared).float()
        own = logits[:, torch.arange(len(answer)), answer]
        found.append((own - logits.logsumexp(-1)).double().exp())
    probabilities = torch.cat(found)
    lost = (probabilities[0] - probabilities[1:]).mean(-1)
    updates = torch.logit((1 + lost) / 2, eps=1e-6)
    return (updates[:, None] * torch.where(replaced, 1.0, -1.0)).mean(0)


class SimpleFamily(Family):
    """Random, recency and token overlap."""

    labels: Mapping[str, str] = {
        "random": "uniform random scores",
        "recency": "later tokens score higher",
        "overlap": "tokens that stand in the output score 1, in the reasoning 0.5",
    }

    def __init__(self, resources: Any) -> None:
        """Takes ``resources.seed``."""
        self._seed = int(resources.seed)

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        methods: dict[str, Callable[[Prepared], Values]] = {
            "random": self._random,
            "recency": _recency,
            "overlap": _overlap,
        }
        results = {}
        for name in names:
            began = time.perf_counter()
            values = methods[name](prepared)
            results[name] = Scores(values, time.perf_counter() - began)
        return results

    def _random(self, prepared: Prepared) -> Values:
        key = zlib.crc32(prepared.example.id.encode())
        return np.random.default_rng([self._seed, key]).random(prepared.num_user_tokens)


def _recency(prepared: Prepared) -> Values:
    size = prepared.num_user_tokens
    return np.arange(1, size + 1, dtype=np.float64) / size


def _overlap(prepared: Prepared) -> Values:
    """By token text without blanks; ties, which are many, go to the later token."""

    def texts(start: int, end: int) -> set[str]:
        return {prepared.texts[i].strip().lower() for i in range(start, end)} - {""}

    output, reasoning = texts(*prepared.target), texts(*prepared.reasoning)
    words = [prepared.texts[i].strip().lower() for i in range(*prepared.user)]
    scores = [1.0 if word in output else 0.5 if word in reasoning else 0.0 for word in words]
    return np.array(scores, dtype=np.float64) + 1e-6 * _recency(prepared)
