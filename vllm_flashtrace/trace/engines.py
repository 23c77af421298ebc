"""The engines behind vLLM's engine client: which of them serves a request, and calls to each.

With data parallelism there are several engines, each with its own workers and prefix cache, and the
client spreads requests over them. A trace must run on the engine that holds its completion's cache,
and only that engine's workers have its result.

An engine's rank is its index among the client's engines, which is what ``data_parallel_rank`` of
``EngineClient.generate`` means. It is the same in every API server and for as long as the server
runs; `check_data_parallel` refuses layouts where it is not. Behind an external or hybrid load
balancer a server's client has the engines of that server alone, so a trace is where its completion
was, and has no rank where that is one engine.

Written against vLLM 0.32.0: ``AsyncLLM.engine_core`` is a ``DPLBAsyncMPClient`` then, which picks
an engine for each request in ``get_core_engine_for_request``, in the task that asked for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm_flashtrace.base.errors import FlashTraceError, TraceError, UnsupportedModelError

HANDING_OVER = frozenset({"NixlConnector", "NixlPullConnector"})
"""KV connectors of vLLM through which one engine decodes what another has prefilled.

They move the blocks of requests that ask for it, and a trace does not.
"""

_noted: ContextVar[list[int] | None] = ContextVar("flashtrace_noted_ranks", default=None)


@contextmanager
def noting_ranks(ranks: list[int]) -> Iterator[None]:
    """Within the block, appends the rank of the engine that each added request is sent to.

    A request for several choices is sent as one request per choice, in their order. Without data
    parallelism nothing is appended.
    """
    token = _noted.set(ranks)
    try:
        yield
    finally:
        _noted.reset(token)


def note_rank(rank: int) -> None:
    """Tells the block of :func:`noting_ranks` around the running task, if there is one."""
    ranks = _noted.get()
    if ranks is not None:
        ranks.append(rank)


def check_data_parallel(parallel: Any) -> None:
    """Refuses layouts in which a trace cannot be kept with its completion.

    Args:
        parallel: vLLM's ``ParallelConfig``, of an API server or of a worker.

    Raises:
        UnsupportedModelError: Naming the layout.
    """
    size = parallel.data_parallel_size
    several = size > 1
    refusals = {
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "data parallelism through Ray": several and parallel.data_parallel_backend != "mp",
        # Engines that another server starts do not know the secret that seals a trace.
        "data parallelism over several machines behind one API server": several
        and not parallel.local_engines_only
        and parallel.data_parallel_size_local not in (None, size),
    }
    for layout, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {layout}")


class Engines:
    """The engines of one API server."""

    def __init__(self, client: Any) -> None:
        """Finds the engines.

        Args:
            client: vLLM's ``EngineClient``.
        """
        self.client = client
        core = getattr(client, "engine_core", None)
        identities = getattr(core, "core_engines", None) or []
        self._core = core if len(identities) > 1 else None

    @property
    def several(self) -> bool:
        """Whether there is more than one engine."""
        return self._core is not None

    @property
    def errored(self) -> bool:
        """Whether the engines have stopped; none goes on without the others."""
        return bool(self.client.errored)

    def refusal(self) -> str | None:
        """Why traces cannot be kept with their completions, or None."""
        parallel = self.client.vllm_config.parallel_config
        try:
            check_data_parallel(parallel)
        except FlashTraceError as error:
            return error.message
        own = parallel.data_parallel_size
        if parallel.local_engines_only:
            own = parallel.data_parallel_size_local
        if own > 1 and not self.several:
            return "traces are not supported with data parallelism through this engine client"
        return None

    async def call(self, rank: int | None, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Calls a method of all workers of one engine.

        Args:
            rank: The engine; None if there is only one.
            method: The worker's method.
            args: Its arguments.

        Raises:
            TraceError: ``result_missing``: there are several engines, and none was named.
        """
        if self._core is None:
            replies: list[Any] = await self.client.collective_rpc(method, args=args)
            return replies
        if rank is None:
            raise TraceError("result_missing", "it is not known which engine ran the trace")
        identity = self._core.core_engines[rank]
        return await self._rpc(identity, method, args)

    async def call_all(self, method: str) -> list[Any]:
        """Calls a method of all workers of all engines; answers in the order of ranks."""
        if self._core is None:
            return await self.call(None, method)
        calls = (self._rpc(identity, method, ()) for identity in self._core.core_engines)
        return [reply for replies in await asyncio.gather(*calls) for reply in replies]

    async def _rpc(self, identity: Any, method: str, args: tuple[Any, ...]) -> list[Any]:
        replies: list[Any] = await self._core._call_utility_async(  # type: ignore[union-attr]
            "collective_rpc", method, None, args, None, engine=identity
        )
        return replies
