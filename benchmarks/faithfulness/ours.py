"""FlashTrace and its variants, hop by hop through the engine.

A variant's scores are those the product gives for the same options. Hops are nested, so that one
run of the recursion serves every number of hops, and each hop is run once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.faithfulness.example import Family, MethodFailed, Prepared, Scores, Values
from vllm_flashtrace.api.request import parse_flashtrace_field
from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.base.records import Completion, TraceUsage
from vllm_flashtrace.core.hops import HopMass, HopRecursion
from vllm_flashtrace.offline.jobs import pick_up_now, score_texts
from vllm_flashtrace.text.plan import TracePlan, plan_trace, surprise_text, weigh_by_surprise
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.hop import EngineContext, Visit, take_report

_AUTO = "auto"
_SINK_TOKENS = 4
_CONVERGED = 1e-6


@dataclass(frozen=True)
class Variant:
    """How one method differs from plain FlashTrace.

    Attributes:
        hops: ``K``, or ``"auto"``.
        closure: Whether hops after ``K`` are added in closed form, see `closed`.
        predicting: Whether hop 0 explains the rows that predict the target tokens, one to the left
            of each, in the place of the rows of the target tokens themselves.
        skip: The ``skip_tokens`` option.
        exact_fraction: Share of the proximity bound's mass that is evaluated exactly; None for the
            product's default.
        drop_sink: Whether the first four of the user's tokens score 0: what attention rests on
            when it looks for nothing, and that gathers at the beginning.
        surprise: Whether each token of the target is weighted by how little the model expected it,
            ``-log p`` (nats).
        through: Whether hops go through the prompt behind the last sentence that is ranked, too:
            the question and the template.
    """

    hops: int | str
    closure: bool = False
    predicting: bool = False
    skip: str = "none"
    exact_fraction: float | None = None
    drop_sink: bool = False
    surprise: bool = False
    through: bool = False


VARIANTS: Mapping[str, tuple[Variant, str]] = {
    "flashtrace-k0": (Variant(0), "no hop: what the output attends to"),
    "flashtrace-k1": (Variant(1), "one hop over the reasoning"),
    "flashtrace-k2": (Variant(2), "two hops"),
    "flashtrace-k3": (Variant(3), "three hops"),
    "flashtrace-auto": (
        Variant(_AUTO),
        "hops until less than 5 % of the mass is on reasoning",
    ),
    "flashtrace-k1-closure": (
        Variant(1, closure=True),
        "one hop, and all later ones as a geometric series",
    ),
    "flashtrace-k2-closure": (
        Variant(2, closure=True),
        "two hops, and all later ones as a geometric series",
    ),
    "flashtrace-k1-predicting": (
        Variant(1, predicting=True),
        "one hop, from the rows that predict the output's tokens",
    ),
    "flashtrace-k1-skip": (
        Variant(1, skip="punctuation"),
        "one hop, punctuation neither explained nor credited",
    ),
    "flashtrace-k0-skip": (
        Variant(0, skip="punctuation"),
        "no hop, punctuation neither explained nor credited",
    ),
    "flashtrace-auto-skip": (
        Variant(_AUTO, skip="punctuation"),
        "hops as auto, punctuation neither explained nor credited",
    ),
    "flashtrace-auto-predicting-skip": (
        Variant(_AUTO, predicting=True, skip="punctuation"),
        'preset "sources": hops as auto from the rows that predict the output, no punctuation',
    ),
    "flashtrace-k1-drop-sink": (
        Variant(1, drop_sink=True),
        "one hop, first four tokens of the user's text set to 0",
    ),
    "flashtrace-k1-prune50": (
        Variant(1, exact_fraction=0.5),
        "one hop, bounds for half of the proximity bound's mass",
    ),
    "flashtrace-k1-exact": (Variant(1, exact_fraction=1.0), "one hop, every proximity evaluated"),
}
"""Methods and what they are."""


@dataclass(frozen=True)
class Recursion:
    """What nested hops gave, from hop 0 on.

    Attributes:
        scores: ``[P]`` float64 of each hop, its scores on the user's tokens where the whole hop
            sums to 1.
        masses: Where the mass of each hop went.
        seconds: What each hop took.
    """

    scores: list[Values] = field(default_factory=list)
    masses: list[HopMass] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def remaining(self, hops: int) -> float:
        """Mass still on reasoning after hops ``0..hops``."""
        return self.masses[hops].weight * self.masses[hops].reasoning_mass

    def total(self, hops: int) -> Values:
        """``sum_{k <= hops} (prod_{j < k} rho_j) w^(k)`` (arXiv 2602.01914), ``[P]``."""
        parts = zip(self.masses[: hops + 1], self.scores, strict=False)
        return np.sum([mass.weight * scores for mass, scores in parts], axis=0)

    def closed(self, hops: int) -> Values:
        """`total` and the hops after it as if each were like the last: a geometric series.

        Adds ``(prod_{j <= K} rho_j) / (1 - rho_K) w^(K)``.

        Raises:
            MethodFailed: The last hop left all of its mass on reasoning, so the series diverges.
        """
        rho = self.masses[hops].reasoning_mass
        if rho >= 1 - _CONVERGED:
            raise MethodFailed(f"hop {hops} leaves {rho:.8f} of its mass on reasoning")
        return self.total(hops) + self.remaining(hops) / (1 - rho) * self.scores[hops]

    def hops_of(self, wanted: int | str, config: FlashTraceConfig) -> int | None:
        """Index of the last hop that ``wanted`` hops need; None if it has not been run."""
        if wanted != _AUTO:
            return int(wanted) if len(self.masses) > int(wanted) else None
        for hop in range(len(self.masses)):
            if self.remaining(hop) < config.auto_threshold or hop == config.max_hops:
                return hop
        return None


class OursFamily(Family):
    """All ``flashtrace-*`` methods.

    ``seconds`` of a method are a prefill of the sequence, which a server has done already when it
    generated the response, and its hops. Facts: ``reasoning_mass`` (rho of hop 0),
    ``remaining_mass``, ``hops`` (after hop 0), ``prefill_seconds``, ``reasoning_tokens``, and
    ``rho_0``, ``rho_1``, ... of all hops.
    """

    variants: ClassVar[Mapping[str, tuple[Variant, str]]] = VARIANTS
    labels = {name: label for name, (_, label) in VARIANTS.items()}  # noqa: RUF012

    def __init__(self, resources: Any) -> None:
        """Takes the engine from ``resources.engine``."""
        self._ft = resources.engine.ft
        self._calls = itertools.count()

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`.

        A method that fails where others do not is left out.
        """
        variants = {name: self.variants[name][0] for name in names}
        if not variants:
            return {}
        salt = f"faithfulness-{next(self._calls)}"  # so that nothing is cached but by the prefill
        prefill = self._prefill(prepared, salt)
        shared: dict[tuple[Any, ...], list[str]] = {}
        for name, variant in variants.items():
            shared.setdefault(self._run_key(variant), []).append(name)
        results: dict[str, Scores] = {}
        error: MethodFailed | None = None
        for members in shared.values():
            try:
                run = self.run_hops(prepared, [variants[name] for name in members], salt)
            except FlashTraceError as failure:
                error = MethodFailed(f"{prepared.example.id}: {failure}")
                continue
            for name in members:
                try:
                    results[name] = self._scores(prepared, run, variants[name], prefill)
                except MethodFailed as failure:
                    error = failure
        if error is not None and not results:
            raise error
        return results

    def _run_key(self, variant: Variant) -> tuple[Any, ...]:
        exact = self._config(variant).exact_fraction
        return variant.predicting, variant.surprise, variant.through, variant.skip, exact

    def _config(self, variant: Variant) -> FlashTraceConfig:
        config: FlashTraceConfig = self._ft.config
        if variant.exact_fraction is None:
            return config
        return config.model_copy(update={"exact_fraction": variant.exact_fraction})

    def _prefill(self, prepared: Prepared, salt: str) -> float:
        from vllm import SamplingParams, TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(prepared.token_ids), cache_salt=salt)
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        began = time.perf_counter()
        self._ft.llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - began

    def run_hops(self, prepared: Prepared, variants: list[Variant], salt: str) -> Recursion:
        """The hops that these variants need; they must differ in nothing but what follows them."""
        config = self._config(variants[0])
        began = time.perf_counter()
        plan = self._plan(prepared, variants[0], config, salt)
        user = slice(*prepared.user)
        run = Recursion()
        while any(run.hops_of(variant.hops, config) is None for variant in variants):
            call = Visit((plan,)).next_call(config, EngineContext(cache_salt=salt))
            if call is None:
                break  # Nothing is left to follow.
            [output] = self._ft.llm.generate([call.prompt], call.params, use_tqdm=False)
            report = pick_up_now(self._ft.llm, call.spec.nonce, output)
            take_report(call, TraceUsage(), report, time.perf_counter() - began)
            result = plan.recursion.result()
            run.masses.append(result.hops[-1])
            run.scores.append((result.per_hop_scores[-1] * plan.input_mask)[user].numpy())
            now = time.perf_counter()
            run.seconds.append(now - began)
            began = now
        return run

    def _plan(
        self, prepared: Prepared, variant: Variant, config: FlashTraceConfig, salt: str
    ) -> TracePlan:
        """The product's own plan for these options."""
        boundary = prepared.prompt_length
        target = [position - boundary for position in prepared.target]
        reasoning = [position - boundary for position in prepared.reasoning]
        options = {
            "target": {"tokens": [target]},
            "reasoning": {"tokens": [reasoning]} if reasoning[0] < reasoning[1] else "none",
            "rows": "predicting" if variant.predicting else "target",
            "hops": config.max_hops,
            "skip_tokens": variant.skip,
            "top_k": None,
        }
        request = parse_flashtrace_field(options, config.limits)
        if request is None:
            raise MethodFailed("the product takes these options for no request")
        tokens = list(prepared.token_ids)
        tokenizer = self._ft.llm.get_tokenizer()
        completion = Completion(
            prompt_token_ids=tokens[:boundary],
            generated_token_ids=tokens[boundary:],
            text=tokenizer.decode(tokens[boundary:], skip_special_tokens=True),
        )
        plan = plan_trace(request, completion, tokenizer, max_hops=config.max_hops)
        if variant.through:
            plan = _through(plan, prepared)
        if variant.surprise:
            self._weigh(plan, salt)
        return plan

    def _weigh(self, plan: TracePlan, salt: str) -> None:
        """Weights the target's tokens by how little the model expected them."""
        text = surprise_text([plan])
        [report] = score_texts(self._ft.llm, [text], [EngineContext(cache_salt=salt)], 1)
        if isinstance(report, FlashTraceError):
            raise report
        weigh_by_surprise([plan], text, report.log_probs)

    def _scores(
        self, prepared: Prepared, run: Recursion, variant: Variant, prefill: float
    ) -> Scores:
        last = run.hops_of(variant.hops, self._config(variant))
        if last is None:
            last = len(run.masses) - 1  # Later hops had nothing to follow.
        values = run.closed(last) if variant.closure else run.total(last)
        if variant.drop_sink:
            values[:_SINK_TOKENS] = 0.0
        facts = {
            "reasoning_mass": run.masses[0].reasoning_mass,
            "remaining_mass": 0.0 if variant.closure else run.remaining(last),
            "hops": float(last),
            "prefill_seconds": prefill,
            "reasoning_tokens": float(prepared.reasoning[1] - prepared.reasoning[0]),
        }
        facts |= {f"rho_{mass.hop}": mass.reasoning_mass for mass in run.masses[: last + 1]}
        return Scores(values, prefill + sum(run.seconds[: last + 1]), facts)


def _through(plan: TracePlan, prepared: Prepared) -> TracePlan:
    """The plan with hops through what stands behind the last sentence, too."""
    first = prepared.sentences[-1][1]
    positions = torch.arange(len(plan.token_ids))
    start, end = prepared.reasoning
    rest = (positions >= first) & (positions < prepared.prompt_length)
    recursion = HopRecursion(
        plan.target,
        plan.prompt_length,
        len(plan.token_ids),
        rest | ((positions >= start) & (positions < end)),
        hops=plan.request.hops,
        auto_threshold=plan.auto_threshold,
        predicting=plan.request.rows == "predicting",
    )
    return replace(plan, recursion=recursion, input_mask=plan.input_mask & ~rest)
