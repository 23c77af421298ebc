"""The messages between API server and workers: a sealed spec and the report that answers it.

There are two kinds of specs: of a trace, and of tokens that are scored. A spec rides in
``SamplingParams.extra_args[EXTRA_ARGS_KEY]``. HTTP clients can reach the same dictionary through
``vllm_xargs``, but JSON has no byte strings and clients do not know the secret: a spec is accepted
only if it is of type ``bytes`` *and* its HMAC-SHA256 is right. Whatever a worker returns is plain
``bytes``, because nothing else comes through ``collective_rpc`` unchanged.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Coverage, TraceReport
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget, rows_of
from vllm_flashtrace.core.weights import TargetWeights

EXTRA_ARGS_KEY = "flashtrace"
SECRET_ENV = "FLASHTRACE_SECRET"
_MAC_BYTES = hashlib.sha256().digest_size


class TargetSpec(msgspec.Struct, frozen=True, array_like=True):
    """A target as it travels.

    Attributes:
        positions: int32 little-endian target positions, strictly ascending.
        weights: float32 little-endian weights, one per position.
        followed: int32 little-endian positions that further hops may explain, ascending.
        hops: Most hops that the worker is to run after the first, from the same prefill.
        threshold: See `FurtherHops`.
    """

    positions: bytes
    weights: bytes
    followed: bytes = b""
    hops: int = 0
    threshold: float = 0.0

    @classmethod
    def of(cls, target: TracedTarget) -> TargetSpec:
        """Takes over a target."""
        further = target.further
        return cls(
            positions=_position_bytes(target.weights.positions),
            weights=target.weights.weights.to(torch.float32).numpy().tobytes(),
            followed=b"" if further is None else _position_bytes(further.positions),
            hops=0 if further is None else further.hops,
            threshold=0.0 if further is None else further.threshold,
        )

    @property
    def first(self) -> int:
        """First position of any hop."""
        starts = [part[:4] for part in (self.positions, self.followed) if part]
        return min(int.from_bytes(start, "little", signed=True) for start in starts)

    @property
    def last(self) -> int:
        """Last target position."""
        return int.from_bytes(self.positions[-4:], "little", signed=True)

    def target(self, length: int) -> TracedTarget:
        """The target as tensors; raises ValueError when malformed or outside the trace."""
        positions = tensor_of(self.positions, torch.int32).to(torch.int64)
        weights = TargetWeights(positions=positions, weights=tensor_of(self.weights, torch.float32))
        if weights.last >= length:
            raise ValueError(f"target position {weights.last} lies beyond {length} tokens")
        return TracedTarget(weights, self._further())

    def _further(self) -> FurtherHops | None:
        if not self.hops:
            return None
        positions = tensor_of(self.followed, torch.int32).to(torch.int64)
        inside = bool(((positions >= 0) & (positions <= self.last)).all())
        if self.hops < 1 or not len(positions) or not inside or (positions.diff() <= 0).any():
            raise ValueError(f"{len(positions)} positions of {self.hops} further hops do not fit")
        return FurtherHops(positions, self.hops, self.threshold)


class TraceSpec(msgspec.Struct, frozen=True, array_like=True, tag="trace"):
    """What a worker must record for one trace request.

    Attributes:
        nonce: Key under which the report is kept for pick-up.
        length: Number of prompt tokens of the trace request.
        targets: What is explained, at least one.
        exact_fraction: Share of the proximity bound's mass that is evaluated exactly.
        layers: Whether per-layer scores are wanted; of one target without further hops.
        attention: Whether the column sums of its attention are wanted; likewise.
        heads: Whether scores are those of the worker's weights of heads, not of proximity.
    """

    nonce: str
    length: int
    targets: tuple[TargetSpec, ...]
    exact_fraction: float
    layers: bool
    attention: bool = False
    heads: bool = False

    @classmethod
    def create(
        cls,
        targets: Sequence[TracedTarget] | TargetWeights,
        length: int,
        *,
        exact_fraction: float,
        layers: bool = False,
        attention: bool = False,
        heads: bool = False,
    ) -> TraceSpec:
        """Builds a spec with a fresh nonce."""
        if isinstance(targets, TargetWeights):
            targets = [TracedTarget(targets)]
        return cls(
            nonce=secrets.token_hex(16),
            length=length,
            targets=tuple(TargetSpec.of(target) for target in targets),
            exact_fraction=exact_fraction,
            layers=layers,
            attention=attention,
            heads=heads,
        )

    @property
    def first_target(self) -> int:
        """First target position of any hop: no token from here on may come from the cache."""
        return min(target.first for target in self.targets)

    @property
    def first_row(self) -> int:
        """First position that has to be computed and may not come from the cache."""
        return self.first_target

    @property
    def last_target(self) -> int:
        """Last target position."""
        return max(target.last for target in self.targets)

    @property
    def keeps_rows(self) -> bool:
        """Whether the worker keeps the rows, since it is to weigh them several times."""
        return len(self.targets) > 1 or any(target.hops for target in self.targets)

    @property
    def kept_rows(self) -> int:
        """How many it keeps."""
        return len(rows_of(self.traced_targets())) if self.keeps_rows else 0

    def traced_targets(self) -> list[TracedTarget]:
        """The targets as tensors; raises ValueError when one is malformed or there is none."""
        if not self.targets:
            raise ValueError("the trace has no target")
        return [target.target(self.length) for target in self.targets]


class ScoreSpec(msgspec.Struct, frozen=True, array_like=True, tag="score"):
    """Asks for the log-probabilities of tokens of a prompt, each given all tokens before it.

    Attributes:
        nonce: Key under which the report is kept for pick-up.
        length: Number of prompt tokens of the request.
        positions: int32 little-endian positions of the tokens, strictly ascending from 1.
    """

    nonce: str
    length: int
    positions: bytes

    @classmethod
    def create(cls, positions: Sequence[int], length: int) -> ScoreSpec:
        """Builds a spec with a fresh nonce."""
        at = _position_bytes(torch.tensor(positions, dtype=torch.int32))
        return cls(nonce=secrets.token_hex(16), length=length, positions=at)

    @property
    def first_row(self) -> int:
        """First position that has to be computed: the one before the first token."""
        return int.from_bytes(self.positions[:4], "little", signed=True) - 1

    def scored_positions(self) -> torch.Tensor:
        """The positions, int64 ``[P]``; raises ValueError when malformed or outside the prompt."""
        positions = tensor_of(self.positions, torch.int32).to(torch.int64)
        inside = bool(((positions >= 1) & (positions < self.length)).all())
        if not len(positions) or not inside or (positions.diff() <= 0).any():
            raise ValueError(f"{len(positions)} positions do not fit {self.length} tokens")
        return positions


Spec: TypeAlias = TraceSpec | ScoreSpec


def ensure_secret() -> str:
    """Returns the HMAC secret, creating it in this process's environment when absent.

    The first process to load the plugin is the one that later spawns engine and workers, so they
    inherit the same secret.
    """
    return os.environ.get(SECRET_ENV) or os.environ.setdefault(SECRET_ENV, secrets.token_hex(32))


def secret_id() -> str:
    """Tells this process's secret from others without showing it."""
    return _mac(b"which secret").hex()[:16]


def seal(spec: Spec) -> bytes:
    """HMAC-SHA256 followed by the msgpack form of ``spec``."""
    payload = msgspec.msgpack.encode(spec)
    return _mac(payload) + payload


def sealed_spec(extra_args: dict[str, Any] | None) -> bytes | None:
    """The sealed spec in a request's ``extra_args``, or None if it is not a trace request."""
    value = (extra_args or {}).get(EXTRA_ARGS_KEY)
    return value if type(value) is bytes else None


def unseal(sealed: bytes) -> Spec:
    """Verifies and decodes a sealed spec.

    Raises:
        TraceError: ``forged_spec`` when the HMAC or the content does not verify.
    """
    mac, payload = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(payload)):
        raise TraceError("forged_spec", "the trace spec was not made by this server")
    try:
        return msgspec.msgpack.decode(payload, type=Spec)
    except msgspec.MsgspecError as error:
        raise TraceError("forged_spec", f"the trace spec is malformed: {error}") from error


def verified_spec(extra_args: dict[str, Any] | None) -> Spec | None:
    """The spec in a request's ``extra_args``.

    Returns:
        None where there is none, or one that this server has not made: the worker refuses it and
        says so, and to everybody else it is an ordinary request.
    """
    sealed = sealed_spec(extra_args)
    if sealed is None:
        return None
    try:
        return unseal(sealed)
    except TraceError:
        return None


def target_range(extra_args: dict[str, Any] | None) -> range | None:
    """First to last target position of the trace that a request's ``extra_args`` ask for, if any.

    See `verified_spec`.
    """
    spec = verified_spec(extra_args)
    if not isinstance(spec, TraceSpec):
        return None
    return range(spec.first_target, spec.last_target + 1)


class ModelPart(msgspec.Struct, frozen=True, array_like=True):
    """The decoder layers of one pipeline stage, as one of its tensor-parallel ranks has them.

    Attributes:
        first_layer: Index of the first layer in the model.
        num_layers: Layers held.
        model_layers: Layers of the whole model.
        ranks: Workers that share each layer's heads.
        traced: Indices of the layers that are traced; empty if all are.
    """

    first_layer: int = 0
    num_layers: int = 0
    model_layers: int = 0
    ranks: int = 1
    traced: tuple[int, ...] = ()

    @property
    def traced_layers(self) -> Sequence[int]:
        """Indices of the layers that are traced."""
        return self.traced or range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def whole(self) -> bool:
        """Whether this worker has all heads of all layers."""
        return self.ranks == 1 and self.num_layers == self.model_layers


class WireReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """A finished or failed trace, or what became of a `ScoreSpec`, as a worker returns it.

    Attributes:
        status: ``completed``, ``pending`` (not on the host yet), ``failed`` or ``missing`` (unknown
            nonce, or expired).
        scores: float32 ``[sum(hops), length]``, of each hop of each target.
        hops: How many hops were run for each target.
        layer_scores: float32 ``[num_layers, length]``, empty when not asked for.
        attention: float16 ``[L, num_heads, columns]``, column sums of attention for the tokens up
            to the last target; empty when not asked for.
        first_head: Index among the model's query heads of the first on this worker.
        num_heads: How many it has; 0 without `attention`.
        log_probs: float32, one for each scored position; empty on workers without the logits.
        part: What of the model the numbers are of; ``L`` are the layers in it.
        weights: What tells the worker's weights from others, the same in all of the trace's steps.
        changes: float64 ``[sum(hops), 2]``: how much the traced layers, and all layers, change the
            weighted stream by mixing tokens, L1 norms summed over layers; empty where all are
            traced, or it is not known.
    """

    status: str
    code: str = ""
    message: str = ""
    scores: bytes = b""
    hops: tuple[int, ...] = (1,)
    layer_scores: bytes = b""
    log_probs: bytes = b""
    num_layers: int = 0
    attention: bytes = b""
    first_head: int = 0
    num_heads: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    restarts: int = 0
    seconds: dict[str, float] = {}
    part: ModelPart = ModelPart()
    weights: str = ""
    changes: bytes = b""

    def to_report(self) -> TraceReport:
        """The report of a completed trace.

        Raises:
            TraceError: ``result_missing``: it is not completed.
        """
        if self.status != "completed":
            raise TraceError("result_missing", f"the worker's result is {self.status}")
        layers = None
        if self.num_layers:
            scores = tensor_of(self.layer_scores, torch.float32).view(self.num_layers, -1)
            layers = self._of_all_layers(scores)
        attention = None
        if self.num_heads:
            sums = tensor_of(self.attention, torch.float16)
            count = len(self.part.traced_layers)
            attention = self._of_all_layers(sums.view(count, self.num_heads, -1))
        scores = tensor_of(self.scores, torch.float32).view(sum(self.hops), -1)
        (first, *later), *others = (tuple(hops) for hops in scores.split(self.hops))
        return TraceReport(
            scores=first,
            later_scores=tuple(later),
            other_targets=tuple(others),
            layer_scores=layers,
            attention=attention,
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self.cached_tokens,
            restarts=self.restarts,
            seconds=self.seconds,
            weights=self.weights,
            changes=self._first_changes(),
        )

    def _first_changes(self) -> torch.Tensor | None:
        """`changes` of the first hop of each target."""
        if not self.changes:
            return None
        first = torch.tensor((0, *self.hops[:-1])).cumsum(0)
        return tensor_of(self.changes, torch.float64).view(-1, 2)[first]

    def _of_all_layers(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of the traced layers with zeros for those that are not."""
        part = self.part
        if not part.traced:
            return numbers
        whole = numbers.new_zeros(part.num_layers, *numbers.shape[1:])
        whole[[index - part.first_layer for index in part.traced]] = numbers
        return whole

    def encode(self) -> bytes:
        """Msgpack form."""
        return msgspec.msgpack.encode(self)


def decode_wire(data: Any) -> WireReport:
    """A worker's answer to a pick-up.

    Raises:
        TraceError: The trace failed in the worker, or the worker no longer knows it.
    """
    if not isinstance(data, bytes):
        raise TraceError("result_missing", f"a worker answered {type(data).__name__}")
    wire = msgspec.msgpack.decode(data, type=WireReport)
    if wire.status == "missing":
        raise TraceError("result_missing", "the engine holds no result for this trace")
    if wire.status not in ("completed", "pending"):
        raise TraceError(wire.code or "trace_failed", wire.message or "the trace failed")
    return wire


def stages(parts: Sequence[ModelPart]) -> list[list[int]]:
    """Sorts workers into pipeline stages.

    A trace in which a layer or a rank is missing, or there twice, would be well-formed and wrong.

    Args:
        parts: What each worker holds, in any order.

    Returns:
        Indices into ``parts``, one list per stage in the order of layers.

    Raises:
        TraceError: ``result_missing``: they do not make one whole model.
    """
    by_layers: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        by_layers[part.first_layer, part.num_layers].append(index)
    ordered = [members for _, members in sorted(by_layers.items())]
    reached = 0
    for members in ordered:
        part = parts[members[0]]
        if part.first_layer > reached:
            raise misfit(f"layer {reached} is missing")
        if part.first_layer < reached:
            raise misfit(f"layer {part.first_layer} is there twice")
        if any(parts[other] != part for other in members) or len(members) != part.ranks:
            raise misfit(f"layer {reached} is there in {len(members)} of {part.ranks} parts")
        reached += part.num_layers
    totals = {part.model_layers for part in parts}
    if totals != {reached}:
        raise misfit(f"{reached} layers of a model of {', '.join(map(str, sorted(totals)))}")
    return ordered


def coverage(parts: Sequence[ModelPart]) -> Coverage | None:
    """Which layers are traced, of one rank of each stage; None if it is all of them."""
    if not any(part.traced for part in parts):
        return None
    traced = sorted(index for part in parts for index in part.traced_layers)
    return Coverage(tuple(traced), parts[0].model_layers)


def misfit(detail: str = "") -> TraceError:
    """The error of results that are not of one trace, or not of one whole model."""
    message = "the workers' results do not belong together"
    return TraceError("result_missing", f"{message}: {detail}" if detail else message)


def _position_bytes(positions: torch.Tensor) -> bytes:
    return positions.to(torch.int32).numpy().tobytes()


def tensor_bytes(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    """Little-endian bytes of ``tensor``."""
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous().numpy().tobytes()


def tensor_of(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in the result of `tensor_bytes`."""
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _mac(payload: bytes) -> bytes:
    return hmac.digest(ensure_secret().encode(), payload, "sha256")
