"""What a worker holds of a finished trace until its result is picked up.

Invariant: scores come from proximities that are all finite, or not at all. On a GPU the numbers may
still be under way when a :class:`FinishedTrace` is made; whoever reads them waits for them then,
and not the engine's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.scores import token_shares
from vllm_flashtrace.trace.model_part import ModelPart
from vllm_flashtrace.trace.wire import WireReport, tensor_bytes
from vllm_flashtrace.worker.trace import Trace


class TraceSums(NamedTuple):
    """Proximities of one trace on this worker, in host memory.

    Attributes:
        tokens: float32 ``[L, N]``, each token's proximity summed over this rank's heads.
        residual: float32 ``[L]``, the proximity of the residual, the same on every rank.
    """

    tokens: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What remains of a trace without its accumulators."""

    length: int
    layers: bool
    recomputed_tokens: int
    cached_tokens: int
    restarts: int
    clock: Any
    started: Any
    recordings: list[tuple[Any, Any]]
    part: ModelPart

    @classmethod
    def of(cls, trace: Trace, part: ModelPart) -> TraceFacts:
        """Takes over from a trace of ``part`` of the model."""
        return cls(
            trace.spec.length,
            trace.spec.layers,
            trace.recomputed_tokens,
            trace.cached_tokens,
            trace.restarts,
            trace.clock,
            trace.started,
            trace.recordings,
            part,
        )


@dataclass(frozen=True, slots=True)
class FinishedTrace:
    """A recorded trace, before its scores are made.

    Attributes:
        facts: What is to be told of the trace beside its scores.
        sums: Its proximities; to be read after ``wait``.
        wait: Returns once the device has written ``sums`` and passed all marks.
        recorded: Mark at the end of the last recording step.
        ended: Mark after the proximities.
    """

    facts: TraceFacts
    sums: TraceSums
    wait: Callable[[], None]
    recorded: Any
    ended: Any

    def totals(self) -> WireReport:
        """The proximity of all tokens and of the residual per layer, for ranks to add up."""
        self.wait()
        self._check()
        return WireReport(
            status="partial",
            part=self.facts.part,
            totals=tensor_bytes(self.sums.tokens.double().sum(1), torch.float64),
            residual=tensor_bytes(self.sums.residual, torch.float64),
        )

    def report(self, denominators: Tensor | None = None) -> WireReport:
        """The scores ``e_j`` of each token, summed over layers.

        ``e_j = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))`` (arXiv 2602.01914), where the
        denominator runs over the heads of all ranks and the numerator over those of this one.

        Args:
            denominators: float64, one per layer of the whole model; None where this rank has all
                the heads.

        Raises:
            TraceError: ``recording_failed`` when a proximity is not finite.
        """
        self.wait()
        self._check()
        tokens = self.sums.tokens.double()
        if denominators is None:
            denominators = tokens.sum(1) + self.sums.residual.double()
        else:
            denominators = self.facts.part.own(denominators)
        facts = self.facts
        behind = facts.length - tokens.shape[1]  # Nothing flows from behind the last target.
        shares = functional.pad(token_shares(tokens, denominators), (0, behind))
        return WireReport(
            status="completed",
            scores=tensor_bytes(shares.sum(0)),
            layer_scores=tensor_bytes(shares) if facts.layers else b"",
            num_layers=len(shares) if facts.layers else 0,
            recomputed_tokens=facts.recomputed_tokens,
            cached_tokens=facts.cached_tokens,
            restarts=facts.restarts,
            seconds=self._seconds(),
            part=facts.part,
        )

    def _check(self) -> None:
        finite = self.sums.tokens.sum(1).isfinite() & self.sums.residual.isfinite()
        if not bool(finite.all()):
            layer = self.facts.part.first_layer + int((~finite).nonzero()[0])
            raise TraceError("recording_failed", f"a proximity of layer {layer} is not finite")

    def _seconds(self) -> dict[str, float]:
        facts = self.facts
        recording = sum(facts.clock.seconds(*spent) for spent in facts.recordings)
        return {
            "prefill": max(0.0, facts.clock.seconds(facts.started, self.recorded) - recording),
            "recording": recording,
            "proximity": facts.clock.seconds(self.recorded, self.ended),
        }


def to_host(tokens: Tensor, residual: Tensor) -> tuple[TraceSums, Callable[[], None]]:
    """Proximities in host memory, and a function that returns once they are there."""
    if tokens.device.type != "cuda":
        return TraceSums(tokens, residual), _nothing
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (tokens, residual)]
    for copy, source in zip(copies, (tokens, residual), strict=True):
        copy.copy_(source, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return TraceSums(*copies), arrived.synchronize


def _nothing() -> None:
    pass
