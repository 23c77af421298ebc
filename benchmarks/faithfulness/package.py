"""The paper authors' own library (``flashtrace`` on the package index) as a method.

Invariant: what it returns is untouched; only its spans, which are inclusive, are translated.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.hf import HFModel, all_cores
from benchmarks.faithfulness.method import MethodFailed, Scores

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


class PackageFamily:
    """``flashtrace-package``: the library with one hop over the reasoning."""

    labels: Mapping[str, str] = {"flashtrace-package": "the authors' library, one hop"}

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `benchmarks.faithfulness.method.Family`."""
        if not names:
            return {}
        result = run_package(self._hf, prepared, hops=1)
        scores = result.observation.double()[slice(*prepared.user)].numpy()
        facts = {"reasoning_mass": result.ratios[0], "remaining_mass": result.ratios[-1]}
        return {"flashtrace-package": Scores(scores, result.seconds, facts)}

    def close(self) -> None:
        """Holds nothing of its own."""


def run_package(hf: HFModel, prepared: Prepared, hops: int) -> PackageResult:
    """The library's attribution with stored attentions; without reasoning only hop 0.

    Raises:
        MethodFailed: The library is not exact for this architecture.
    """
    from benchmarks.reference_process import capture

    if hf.model.config.model_type != _LLAMA:
        raise MethodFailed(f"the library is exact for Llama only, not {hf.model.config.model_type}")
    hf.check_attention_fits(len(prepared.token_ids))
    first, end = prepared.reasoning
    with torch.no_grad(), all_cores():
        began = time.perf_counter()
        captured = capture(hf.model, list(prepared.token_ids), recompute=False)
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
