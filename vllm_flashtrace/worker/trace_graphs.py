"""A second set of piecewise CUDA graphs, for steps with target rows, whose taps write to buffers.

vLLM cuts compiled code at its attention operators and captures the pieces between them as CUDA
graphs. A tap inside a piece launches nothing when the piece is captured, so that a replay shows no
stream to anybody. Here every piece is captured once more while the taps copy what they see to
buffers that belong to no graph. In a step with target rows these graphs are replayed, and behind
each one, before the attention operator that follows runs as code, the observer is shown what its
taps have copied, in the order in which code would have shown it. Weights of rows, sums and traces
are in no graph.

A piece's taps have been read before the next piece is replayed, on the same stream, so all pieces
and all sizes share the buffers: two vectors of the stream per token for most models.

The graphs are entries of vLLM's own wrappers, under a key of their own. vLLM's set is not touched.
They are captured while vLLM captures its own, and not when a step first needs them: at that time
another thread may wait for the device, which CUDA does not allow while a stream is captured.

Whether a step replays this set or runs the same pieces as code is each rank's own
affair; neither changes the size of anything. What ranks must agree on is the padding, which follows
from the scheduler's output and from `rank_agreement.replays_pieces`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.compilation.cuda_graph import CUDAGraphEntry, CUDAGraphWrapper
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, ForwardContext, get_forward_context

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.worker.observer import ForwardObserver, observing
from vllm_flashtrace.worker.taps import has_taps

_PIECE = "_flashtrace_piece"
_PASS = "_flashtrace_pass"

_LIMIT_FLOAT32, _LIMIT_16_BIT = 1e-3, 0.05
_TINY = 1e-20

Run = Callable[[CUDAGraphMode], Any]
"""Runs the model on vLLM's dummy batch of one size; with `PIECEWISE` through its wrappers."""


class TraceBatchDescriptor(BatchDescriptor):
    """The key of a captured piece; equal to no descriptor of vLLM's with the same numbers."""

    @classmethod
    def of(cls, stock: BatchDescriptor) -> TraceBatchDescriptor:
        """The key beside vLLM's own."""
        return cls(**vars(stock))


def is_asked_for(config: VllmConfig, mode: CUDAGraphMode | None) -> bool:
    """Whether the set is to be captured, by the configuration alone, which ranks have in common.

    Args:
        config: The engine's.
        mode: Its CUDA graph mode.
    """
    if not FlashTraceConfig.from_additional_config(config.additional_config).trace_graphs:
        return False
    obstacles = {
        "this CUDA graph mode, which has no piecewise graphs": (
            mode is None or mode.mixed_mode() != CUDAGraphMode.PIECEWISE
        ),
        "breakable CUDA graphs": bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH),
        # Graphs that are recorded later take memory of earlier ones there.
        "use_inductor_graph_partition": config.compilation_config.use_inductor_graph_partition,
    }
    for obstacle, present in obstacles.items():
        if present:
            _say_once(f"FlashTrace: trace_graphs has no effect with {obstacle}")
            return False
    return True


@functools.cache
def _say_once(warning: str) -> None:
    logger.warning(warning)


def run_piece(
    wrapper: CUDAGraphWrapper,
    stock: Callable[..., Any],
    observer: ForwardObserver,
    args: Any,
    kwargs: Any,
) -> Any:
    """Runs a piece of a forward pass that is observed.

    Args:
        wrapper: vLLM's wrapper of the piece.
        stock: ``CUDAGraphWrapper.__call__``.
        observer: Who watches.
        args: Inputs of the piece.
        kwargs: The same, by name.
    """
    context = get_forward_context()
    if isinstance(observer, TapWriter):
        return observer.run_piece(context, wrapper, stock, args, kwargs)
    if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
        return stock(wrapper, *args, **kwargs)
    seen = vars(context).setdefault(_PASS, _Pass())
    piece = seen.next_piece(wrapper, context)
    if piece is None:
        return wrapper.runnable(*args, **kwargs)  # Its taps speak for themselves.
    with _own_key(context, piece.set.descriptor):
        output = stock(wrapper, *args, **kwargs)
    for name, views in piece.calls:
        getattr(observer, name)(*views)
    return output


@dataclass(eq=False)
class PieceSet:
    """The captured pieces of one size.

    Attributes:
        descriptor: Their key.
        complete: Whether they may be replayed.
        size: Number of pieces.
    """

    descriptor: TraceBatchDescriptor
    complete: bool = False
    size: int = 0

    def forget(self) -> None:
        """Gives the graphs back."""
        self.complete = False
        for wrapper in list(CUDAGraphWrapper._all_instances):
            entry = wrapper.concrete_cudagraph_entries.get(self.descriptor)
            piece = getattr(entry, _PIECE, None)
            if piece is None or piece.set is self:
                wrapper.concrete_cudagraph_entries.pop(self.descriptor, None)


@dataclass(eq=False)
class _Piece:
    """What a captured piece's taps write; it lives and dies with vLLM's entry."""

    set: PieceSet
    number: int
    calls: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)


class _Pass:
    """How far a forward pass has come in a set.

    A piece reads what the one in front of it has left at the addresses of the capture. So a pass
    that runs one as code, or that finds another than it expects, runs all later ones as code.
    """

    def __init__(self) -> None:
        self._set: PieceSet | None = None
        self._number = 0
        self._code = False

    def next_piece(self, wrapper: CUDAGraphWrapper, context: ForwardContext) -> _Piece | None:
        """The piece to be replayed, or None if it runs as code."""
        piece = None if self._code else _captured(wrapper, context)
        if piece is not None and self._number == 0:
            self._set = piece.set
        if piece is None or piece.set is not self._set or piece.number != self._number:
            self._code = True
            return None
        self._number += 1
        return piece


def _captured(wrapper: CUDAGraphWrapper, context: ForwardContext) -> _Piece | None:
    if context.batch_descriptor is None:
        return None
    key = TraceBatchDescriptor.of(context.batch_descriptor)
    entry: CUDAGraphEntry | None = wrapper.concrete_cudagraph_entries.get(key)
    if entry is None or entry.cudagraph is None:
        return None
    piece: _Piece | None = getattr(entry, _PIECE, None)
    return piece if piece is not None and piece.set.complete else None


@contextmanager
def _own_key(context: ForwardContext, key: TraceBatchDescriptor) -> Iterator[None]:
    """Lets wrappers look for their entry under the key of trace steps."""
    stock = context.batch_descriptor
    context.batch_descriptor = key
    try:
        yield
    finally:
        context.batch_descriptor = stock


class _TapObserver:
    """Notes what taps show, whichever it is."""

    def on_attention(
        self, layer_name: str, query: Tensor, output: Tensor, lse: Tensor | None = None
    ) -> None:
        """Attention is not of interest."""

    def on_update(self, update: Tensor, residual: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        self._note("on_update", update, residual)

    def on_residual(self, residual: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        self._note("on_residual", residual)

    def on_block(self, output: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        self._note("on_block", output)

    def on_other_update(self, update: Tensor, residual: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        self._note("on_other_update", update, residual)

    def on_other_residual(self, residual: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        self._note("on_other_residual", residual)

    def on_block_input(self, hidden_states: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        self._note("on_block_input", hidden_states)

    def _note(self, name: str, *streams: Tensor) -> None:
        raise NotImplementedError


class TapWriter(_TapObserver):
    """The observer while pieces are captured: copies what taps see to buffers.

    A run as code measures the buffers, since what is allocated during a capture belongs to its
    graph. The largest size must come first.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._calls: list[tuple[str, tuple[Tensor, ...]]] | None = None
        self._slots = 0
        self._copies = False
        self._context: ForwardContext | None = None
        self._set: PieceSet | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def poison(self) -> None:
        """Fills the buffers with NaN."""
        for buffer in self._buffers.values():
            buffer.fill_(torch.nan)

    def begin(self) -> None:
        """Begins a forward pass."""
        self._context = self._set = self._calls = None

    def finish(self) -> PieceSet:
        """Ends the forward pass that has captured pieces.

        Raises:
            RuntimeError: No piece was captured.
        """
        captured, self._set = self._set, None
        if captured is None:
            raise RuntimeError("no piece of compiled code was captured")
        captured.complete = True
        return captured

    def abandon(self) -> None:
        """Gives back what the forward pass has captured before it failed."""
        if self._set is not None:
            self._set.forget()
        self._context = self._set = self._calls = None

    def run_piece(
        self,
        context: ForwardContext,
        wrapper: CUDAGraphWrapper,
        stock: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Captures a piece, or measures what its taps need."""
        self._context = self._context or context
        if context is not self._context:  # A draft model's, behind the model.
            return stock(wrapper, *args, **kwargs)
        self._calls, self._slots = [], 0
        self._copies = context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        try:
            if not self._copies:
                return stock(wrapper, *args, **kwargs)
            if self._set is None:
                assert context.batch_descriptor is not None
                self._set = PieceSet(TraceBatchDescriptor.of(context.batch_descriptor))
            key = self._set.descriptor
            with _own_key(context, key):
                wrapper.concrete_cudagraph_entries.pop(key, None)
                output = stock(wrapper, *args, **kwargs)
            piece = _Piece(self._set, self._set.size, self._calls)
            setattr(wrapper.concrete_cudagraph_entries[key], _PIECE, piece)
            self._set.size += 1
            return output
        finally:
            self._calls = None

    def on_attention(
        self, layer_name: str, query: Tensor, output: Tensor, lse: Tensor | None = None
    ) -> None:
        """Attention must stay outside the graphs, or no query would be seen."""
        if self._calls is not None:
            raise RuntimeError(f"the attention of {layer_name} lies inside of a captured piece")

    def _note(self, name: str, *streams: Tensor) -> None:
        if self._calls is None:
            return
        views = tuple(self._room(stream) for stream in streams)
        if self._copies:
            for view, stream in zip(views, streams, strict=True):
                view.copy_(stream)
            self._calls.append((name, views))

    def _room(self, stream: Tensor) -> Tensor:
        key = (self._slots, stream.shape[1:], stream.dtype)
        self._slots += 1
        buffer, rows = self._buffers.get(key), len(stream)
        if buffer is None or len(buffer) < rows:
            if self._copies:
                raise RuntimeError("a tap was not seen when the buffers were measured")
            with torch.inference_mode(False):  # They are written to with and without.
                buffer = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
            self._buffers[key] = buffer
        return buffer[:rows]


class GraphSets:
    """Captures and tries out the sets of all sizes, while vLLM captures its own."""

    def __init__(self, alone: bool) -> None:
        """Starts without a set.

        Args:
            alone: Whether no other rank takes part. Else a failure ends the start, as one of vLLM's
                own captures does: ranks that go on would wait for this one.
        """
        self.writer = TapWriter()
        self.sets: list[PieceSet] = []
        self._alone = alone
        self._failed = False

    def capture(self, run: Run, mode: CUDAGraphMode) -> None:
        """Runs a size as code to measure the buffers, or, with `PIECEWISE`, captures it.

        A failure is said once, and no further size is captured: those steps run as code.
        """
        if self._failed:
            return
        self.writer.begin()
        try:
            with observing(self.writer):
                run(mode)
            if mode == CUDAGraphMode.PIECEWISE:
                self.sets.append(self.writer.finish())
        except Exception as error:
            self.writer.abandon()
            self._fail("capturing a size", error)

    def try_out(self, number: int, run: Run) -> None:
        """Compares what the observer sees of a size as code and through its graphs.

        A set that shows anything else is given back: such steps run as code.

        Args:
            number: Which of the sizes, in the order of their capture.
            run: As for `capture`.
        """
        if number >= len(self.sets):
            return
        pieces, code, replayed = self.sets[number], _Sketches(), _Sketches()
        try:
            with observing(code):
                run(CUDAGraphMode.NONE)
            self.writer.poison()
            with observing(replayed):
                run(CUDAGraphMode.PIECEWISE)
            error = code.distance(replayed)
        except Exception as failure:
            pieces.forget()
            self._fail("replaying a size", failure)
            return
        if not error <= code.limit:
            pieces.forget()
            logger.warning(
                "FlashTrace: CUDA graphs of trace steps of %d tokens show another stream than code "
                "(%.2g); such steps run as code",
                pieces.descriptor.num_tokens,
                error,
            )

    def report(self) -> None:
        """Says what there is."""
        ready = [pieces for pieces in self.sets if pieces.complete]
        logger.info(
            "FlashTrace: CUDA graphs of trace steps: %d sizes, %.1f MiB of buffers",
            len(ready),
            self.writer.nbytes / (1 << 20),
        )

    def _fail(self, doing: str, error: Exception) -> None:
        if not self._alone:
            raise FlashTraceError(
                "recording_failed",
                f"trace_graphs: {doing} failed: {error!r}; start without this option",
            ) from error
        if not self._failed:
            logger.warning(
                "FlashTrace: %s for trace steps failed, further ones run as code: %r", doing, error
            )
        self._failed = True


class _Sketches(_TapObserver):
    """An observer that keeps one vector of each tensor that taps show.

    Attributes:
        limit: Largest distance of two runs of the same size.
    """

    def __init__(self) -> None:
        self.limit = _LIMIT_FLOAT32
        self._seen: list[tuple[str, list[Tensor]]] = []

    def _note(self, name: str, *streams: Tensor) -> None:
        self._seen.append((name, [self._sketch(stream) for stream in streams]))

    def distance(self, other: _Sketches) -> float:
        """Largest relative L1 distance of two tensors; infinite if other taps were seen."""
        if not self._seen or [name for name, _ in self._seen] != [n for n, _ in other._seen]:
            return float("inf")
        pairs = [
            # The dummy batch reads a cache of zeros, so that what blocks add may be zeros.
            (mine - theirs).abs().sum() / mine.abs().sum().clamp_min(_TINY)
            for (_, all_mine), (_, all_theirs) in zip(self._seen, other._seen, strict=True)
            for mine, theirs in zip(all_mine, all_theirs, strict=True)
        ]
        return float(torch.stack(pairs).nan_to_num(nan=float("inf")).max())

    def _sketch(self, stream: Tensor) -> Tensor:
        if stream.dtype != torch.float32:
            self.limit = _LIMIT_16_BIT
        ramp = torch.linspace(1, 2, len(stream), device=stream.device)
        return ramp @ stream.float() / len(stream)


def can_capture(runner: Any) -> bool:
    """Whether this rank's model shows anything to capture for.

    Args:
        runner: A V1 or V2 model runner.
    """
    return has_taps(runner.get_model())


def is_alone(config: VllmConfig) -> bool:
    """Whether the engine has one rank only."""
    parallel = config.parallel_config
    return int(parallel.world_size * parallel.data_parallel_size) == 1
