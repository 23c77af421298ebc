"""One simulated replica: its queues, and what stands in its next step.

Invariant: between `begin_step` and `end_step` nothing but `accept` happens, so a step never changes
after it began; each token of a prompt, a completion and a trace is computed exactly once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf, nan

from benchmarks.capacity_constants import Constants
from benchmarks.capacity_lengths import Lengths
from benchmarks.capacity_model import (
    Hop,
    hop_end_work,
    hops_of,
    prefill_work,
    recording_work,
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Replicas and their limits; the names are those of vLLM's and the plugin's options.

    Attributes:
        replicas: How many; a request goes to the one with the fewest in flight.
        max_num_seqs: Sequences of a step, traces included.
        max_num_batched_tokens: Tokens of a step.
        max_concurrent_traces: Attributions in the engine at once.
        trace_token_share: Part of a step's tokens that traces may take beside completions.
        hops: Recursive hops of an attribution.
    """

    replicas: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_concurrent_traces: int = 8
    trace_token_share: float = 0.25
    hops: int = 1

    def __post_init__(self) -> None:
        if min(self.replicas, self.max_num_seqs, self.max_concurrent_traces) < 1:
            raise ValueError(f"a limit below 1: {self}")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError("max_num_batched_tokens leaves no room beside max_num_seqs")


@dataclass(slots=True, eq=False)
class Job:
    """A request; moments are NaN until they have come."""

    lengths: Lengths
    traced: bool
    arrived: float = nan
    finished: float = nan
    attributed: float = nan
    prefilled: int = 0
    generated: int = 0


@dataclass(slots=True, eq=False)
class _Trace:
    """An attribution under way.

    Attributes:
        job: Of which request.
        hops: Those left, the first under way.
        at: Tokens of it that are done.
        fetching: It has ended and its scores are fetched, which waits for the next step's end.
    """

    job: Job
    hops: list[Hop]
    at: int = 0
    fetching: bool = False

    @property
    def left(self) -> int:
        return self.hops[0].end - self.at


@dataclass(slots=True)
class Replica:
    """A replica; see `Cluster` for its limits."""

    constants: Constants
    cluster: Cluster
    waiting: deque[Job] = field(default_factory=deque)
    prefilling: list[Job] = field(default_factory=list)
    decoding: list[Job] = field(default_factory=list)
    waiting_traces: deque[Job] = field(default_factory=deque)
    traces: list[_Trace] = field(default_factory=list)
    stepping: bool = False
    in_flight: int = 0
    _tokens: int = 0
    _decoded: int = 0

    @property
    def sequences(self) -> int:
        """In the engine, traces included."""
        return len(self.prefilling) + len(self.decoding) + len(self.traces)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.in_flight > 0

    def accept(self, job: Job) -> None:
        """A request arrives."""
        self.waiting.append(job)
        self.in_flight += 1

    def begin_step(self, now: float, horizon: float) -> float:
        """Plans a step, or several that only decode and end at the first boundary past a moment.

        Args:
            now: When it begins.
            horizon: When something outside may happen next.

        Returns:
            Its seconds.
        """
        self._admit()
        self.stepping = True
        if self.prefilling or not all(trace.fetching for trace in self.traces):
            seconds, self._decoded = self._mixed_step(), 1
        else:
            most = min(job.lengths.generated - job.generated for job in self.decoding)
            most = 1 if self.traces else most
            keys = self._keys()
            self._decoded = self._steps_until(horizon - now, most, keys)
            seconds = self._decode_seconds(self._decoded, keys)
        return seconds

    def end_step(self, now: float) -> int:
        """Books what the step did; returns how many requests are over, traces included."""
        self.stepping = False
        over = 0
        for job in self.decoding:
            job.generated += self._decoded
        for job in self.prefilling:
            if job.prefilled == job.lengths.prompt:
                job.generated = 1  # The first token comes with the last chunk of the prompt.
                self.decoding.append(job)
        self.prefilling = [job for job in self.prefilling if not job.generated]
        for job in self.decoding:
            if job.generated == job.lengths.generated:
                job.finished = now
                if job.traced:
                    self.waiting_traces.append(job)
                else:
                    over += self._release(job)
        self.decoding = [job for job in self.decoding if job.generated < job.lengths.generated]
        return over + self._end_hops(now)

    def _end_hops(self, now: float) -> int:
        """Ends the hops whose scores are there; beside no running work they are there at once."""
        busy = self.decoding or self.prefilling or any(trace.left for trace in self.traces)
        over = 0
        for trace in self.traces:
            if trace.left or (busy and not trace.fetching):
                trace.fetching = not trace.left
                continue
            trace.hops.pop(0)
            trace.fetching = False
            if trace.hops:
                trace.at = trace.hops[0].cached
            else:
                trace.job.attributed = now
                over += self._release(trace.job)
        self.traces = [trace for trace in self.traces if trace.hops]
        return over

    def _release(self, job: Job) -> int:
        """A traced request keeps its room until it is attributed: its trace reads that cache."""
        self.in_flight -= 1
        self._tokens -= job.lengths.context
        return 1

    def _admit(self) -> None:
        """Takes in traces, then requests whose whole context has room beside the others."""
        while self.waiting_traces and len(self.traces) < self.cluster.max_concurrent_traces:
            job = self.waiting_traces.popleft()
            hops = hops_of(job.lengths, self.constants.block_size, self.cluster.hops)
            self.traces.append(_Trace(job, hops, hops[0].cached))
        room = inf if self.constants.kv_tokens is None else self.constants.kv_tokens
        while self.waiting:
            tokens = self._tokens + self.waiting[0].lengths.context
            if self.sequences >= self.cluster.max_num_seqs or tokens > room:
                break
            self._tokens = tokens
            self.prefilling.append(self.waiting.popleft())

    def _mixed_step(self) -> float:
        """One step with prefills or traces in it; advances them and returns its seconds."""
        constants, left = self.constants, self.cluster.max_num_batched_tokens - len(self.decoding)
        seconds = constants.step_seconds
        seconds += len(self.decoding) * constants.decode_token_seconds
        seconds += self._keys() * constants.context_seconds
        allowed = left
        if self.decoding or self.prefilling or self.waiting:
            share = self.cluster.trace_token_share * self.cluster.max_num_batched_tokens
            allowed = min(left, max(1, int(share)))
        for trace in self.traces:
            hop, chunk = trace.hops[0], min(allowed, trace.left)
            if trace.fetching:
                continue
            end = trace.at + chunk
            seconds += prefill_work(constants, trace.at, end)
            seconds += recording_work(constants, hop, trace.at, end)
            if end == hop.end:
                seconds += hop_end_work(constants, hop)
            trace.at, allowed, left = end, allowed - chunk, left - chunk
        for job in self.prefilling:
            chunk = min(left, job.lengths.prompt - job.prefilled)
            seconds += prefill_work(constants, job.prefilled, job.prefilled + chunk)
            job.prefilled, left = job.prefilled + chunk, left - chunk
        return seconds

    def _keys(self) -> int:
        """Keys that the decoding sequences see in the next step."""
        return sum(job.lengths.prompt + job.generated for job in self.decoding)

    def _decode_seconds(self, steps: int, keys: int) -> float:
        """Of so many steps that only decode; each adds a key to every sequence."""
        constants, count = self.constants, len(self.decoding)
        step = constants.decode_step_seconds + count * constants.decode_token_seconds
        seen = steps * keys + count * steps * (steps - 1) / 2
        return steps * step + seen * constants.context_seconds

    def _steps_until(self, seconds: float, most: int, keys: int) -> int:
        """The first step that ends at or after a moment, or the last of ``most``."""
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            if self._decode_seconds(middle, keys) >= seconds:
                high = middle
            else:
                low = middle + 1
        return low
