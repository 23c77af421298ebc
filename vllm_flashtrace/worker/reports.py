"""What is kept of a request that is finished, and the report that is made of it at the pick-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.trace.wire import ModelPart, WireReport, tensor_bytes
from vllm_flashtrace.worker.clock import Clock
from vllm_flashtrace.worker.host_buffers import HostCopy
from vllm_flashtrace.worker.recorded_trace import Trace

MOST_IMBALANCE = 1e-3
"""How far column sums may be from what they must add up to, as a part of the rows' weights.

They must where a log-sum-exp is that of the kernels' own logits. The engine's attention multiplies
the same sixteen-bit numbers and only adds in another order, which makes about 1e-6 of a logit, and
logits are at most some hundreds.
"""


@dataclass(frozen=True, slots=True, eq=False)
class FinishedTrace:
    """A trace whose scores are on the host, or under way to it.

    Attributes:
        facts: What is to be told of the trace beside its scores.
        copied: In this order, those in brackets where `TraceFacts` says so: float32
            ``[hops, length]``, the scores; float64 ``[hops, L]``, the proximities of all tokens and
            the residual over this rank's heads; (float64 ``[hops, L]``, over all ranks' heads);
            (float32 ``[hops, L, H, 3]``, `Measured.mass`); (float64 ``[hops, 2]``,
            `Measured.changes`); int64 ``[2]``, see `WeightsSeen`; the scores per layer, float32
            ``[L, context]``, if the trace asked for them; (`Trace.attention`).
        recorded: Mark at the end of the last recording step.
        ended: Mark after the scores.
        hops: How many hops each target has.
    """

    facts: TraceFacts
    copied: HostCopy
    recorded: Any
    ended: Any
    hops: tuple[int, ...] = (1,)

    def report(self) -> WireReport:
        """The trace's report, once `copied` has arrived.

        Raises:
            TraceError: ``weights_changed`` when not all steps had the same weights,
                ``recording_failed`` when a proximity is not finite or column sums do not add up,
                ``result_missing`` when a proximity of another rank is not finite.
        """
        facts = self.facts
        scores, own, *asked = self.copied.tensors
        of_all_ranks = asked.pop(0) if facts.shared else own
        mass = asked.pop(0) if facts.mass else None
        changes = asked.pop(0) if facts.changes else None
        weights = asked.pop(0)
        attention = asked.pop() if facts.attention else None
        _check_weights(weights)
        self._check(own, "recording_failed", "a proximity of layer {} is not finite")
        self._check(of_all_ranks, "result_missing", "another rank has no totals of layer {}")
        if mass is not None:
            self._check_mass(mass)
        per_layer = asked[0] if asked else None
        return WireReport(
            status="completed",
            scores=tensor_bytes(scores),
            hops=self.hops,
            layer_scores=b"" if per_layer is None else self._padded(per_layer),
            num_layers=0 if per_layer is None else len(per_layer),
            attention=b"" if attention is None else _bytes_of(attention),
            first_head=0 if attention is None else facts.first_head,
            num_heads=0 if attention is None else attention.shape[1],
            recomputed_tokens=facts.recomputed_tokens,
            cached_tokens=facts.cached_tokens,
            restarts=facts.restarts,
            seconds=self._seconds(),
            part=facts.part,
            weights=_weights_text(weights),
            changes=b"" if changes is None else tensor_bytes(changes, torch.float64),
        )

    def _padded(self, layers: Tensor) -> bytes:
        """The bytes of ``[L, length]``; a view of the host's copy, to be encoded at once."""
        if behind := self.facts.length - layers.shape[1]:
            layers = torch.nn.functional.pad(layers, (0, behind))
        return _bytes_of(layers)

    def _check(self, sums: Tensor, code: str, message: str) -> None:
        finite = sums.isfinite()
        if not bool(finite.all()):
            layer = self.facts.part.traced_layers[int((~finite).nonzero()[0, 1])]
            raise TraceError(code, message.format(layer))

    def _check_mass(self, mass: Tensor) -> None:
        expected, weights, added = mass.unbind(-1)
        imbalance = ((added - expected).abs() / weights).amax(dim=(0, 2))
        worst, layer = imbalance.max(dim=0)
        if not float(worst) <= MOST_IMBALANCE:
            number = self.facts.part.traced_layers[int(layer)]
            raise TraceError(
                "recording_failed",
                f"attention weights of layer {number} do not add up: off by {float(worst):.2g}",
            )

    def _seconds(self) -> dict[str, float]:
        facts = self.facts
        recording = facts.recording_seconds()
        return {
            "prefill": max(0.0, facts.clock.seconds(facts.started, self.recorded) - recording),
            "recording": recording,
            "proximity": facts.clock.seconds(self.recorded, self.ended),
        }


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What is kept of a trace beside its numbers; see `Trace` and `TracedModel`.

    Attributes:
        attention: Whether the sums of attention are among its numbers.
        shared: Whether those of all ranks are, because others share the heads.
        changes: Whether `Measured.changes` are.
        mass: Whether `Measured.mass` is.
    """

    length: int
    recomputed_tokens: int
    cached_tokens: int
    restarts: int
    clock: Clock
    started: Any
    recording_seconds: Callable[[], float]
    part: ModelPart
    first_head: int
    attention: bool
    shared: bool
    changes: bool
    mass: bool

    @classmethod
    def of(
        cls,
        trace: Trace,
        part: ModelPart,
        first_head: int = 0,
        *,
        shared: bool = False,
        changes: bool = False,
    ) -> TraceFacts:
        """Takes over from a trace of ``part`` of the model."""
        return cls(
            trace.spec.length,
            trace.recomputed_tokens,
            trace.cached_tokens,
            trace.restarts,
            trace.clock,
            trace.started,
            trace.recording.seconds,
            part,
            first_head,
            trace.attention is not None,
            shared,
            changes,
            trace.mass is not None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class FinishedLogProbs:
    """What became of a `ScoreSpec`, on the host or under way to it.

    Attributes:
        part: What of the model the worker holds.
        copied: int64 ``[2]``, see `WeightsSeen`; and, where the logits are, float32 ``[P]``, the
            log-probabilities.
        recomputed_tokens: Tokens prefilled.
        cached_tokens: Tokens that came from the prefix cache.
    """

    part: ModelPart
    copied: HostCopy
    recomputed_tokens: int
    cached_tokens: int

    def report(self) -> WireReport:
        """Its report, once `copied` has arrived.

        Raises:
            TraceError: ``weights_changed`` when not all steps had the same weights,
                ``recording_failed`` when a log-probability is not finite.
        """
        weights, *log_probs = self.copied.tensors
        _check_weights(weights)
        if log_probs and not bool(log_probs[0].isfinite().all()):
            raise TraceError("recording_failed", "a log-probability is not finite")
        return WireReport(
            status="completed",
            log_probs=tensor_bytes(log_probs[0]) if log_probs else b"",
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self.cached_tokens,
            part=self.part,
            weights=_weights_text(weights),
        )


def _check_weights(weights: Tensor) -> None:
    if int(weights[1]):
        raise TraceError(
            "weights_changed", "the model's weights changed while the trace was recorded"
        )


def _weights_text(weights: Tensor) -> str:
    return f"{int(weights[0]) % (1 << 64):016x}"


def _bytes_of(tensor: Tensor) -> bytes:
    """A view of a contiguous tensor's bytes, to be encoded at once."""
    return cast(bytes, tensor.view(torch.uint8).numpy().data.cast("B"))
