"""One replica of a batch: an engine in a Ray actor, asked row by row.

Every row of a batch comes back once, in order, and a row that fails fails alone. A replica whose
engine died ends its process, so that Ray starts another one and sends the batch there.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.offline.engine import root_cause
from vllm_flashtrace.scale.batch.results import Outcome
from vllm_flashtrace.scale.ray_cluster import prepare_actor
from vllm_flashtrace.trace.config import SECTION

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm_flashtrace.server.engine_app import InProcessServer

T = TypeVar("T")
# A batch has no client that waits, so nothing is skipped for the sake of others.
_PATIENCE: dict[str, Any] = {
    "max_waiting_traces": 1_000_000,
    "max_waiting_seconds": 1e6,
    "trace_timeout_seconds": 3600.0,
    "trace_token_share": 1.0,
}
_SERVER_ERROR = 500
_ENGINE_DEAD = 70  # The process's exit code.


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How a replica starts its engine.

    Attributes:
        model: Model name or folder.
        argv: Options of ``vllm serve``.
        cores: Cores of one replica; 0 off the CPU.
        workers: Worker processes of one engine.
        replicas: Replicas that may share a machine's memory.
        group: Name that the replicas of this run share.
    """

    model: str
    argv: tuple[str, ...]
    cores: int
    workers: int
    replicas: int
    group: str


class ReplicaError(RuntimeError):
    """A replica cannot start; the message is one line."""


class Replica:
    """The callable class that ``map_batches`` makes actors of."""

    def __init__(self, settings: ReplicaSettings) -> None:
        """Starts the engine.

        Raises:
            ReplicaError: It does not start, or cannot trace the model.
        """
        self._settings = settings
        self._slot = Slot(settings.group)
        os.environ.pop("VLLM_API_KEY", None)
        prepare_actor(self._slot.number, settings.cores, settings.workers)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="replica", daemon=True).start()
        try:
            self._server = self._run(self._start())
        except Exception as error:
            logger.exception("the engine did not start")
            log = Path("/proc/self/fd/2")  # Ray keeps it in a file.
            reason = root_cause(error, log if log.is_file() else None)
            raise ReplicaError(f"the engine did not start: {reason}") from None
        if (refusal := self._server.refusal) is not None:
            raise ReplicaError(f"{settings.model} cannot be traced: {refusal}")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answers rows.

        Args:
            batch: Columns of :mod:`vllm_flashtrace.scale.batch.source`.

        Returns:
            Their columns ``row`` and ``outcome`` (:meth:`Outcome.to_json`), in the same order.
        """
        import pyarrow as pa

        outcomes = self._run(self._answer_all(batch.to_pylist()))
        if self._server.is_dead:
            # Rows that it answered before are answered again; none is lost.
            print("the engine died; this replica ends", file=sys.stderr, flush=True)
            os._exit(_ENGINE_DEAD)
        texts = pa.array([outcome.to_json() for outcome in outcomes], pa.large_string())
        return pa.table({"row": batch.column("row"), "outcome": texts})

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> InProcessServer:
        from vllm_flashtrace.server.engine_app import in_process_server

        self._stack = AsyncExitStack()
        settings = self._settings
        argv = [*settings.argv, "--model", settings.model]
        server = in_process_server(argv, self._adjust, neighbours=settings.replicas - 1)
        return await self._stack.enter_async_context(server)

    def _adjust(self, args: Namespace) -> None:
        config = dict(args.additional_config or {})
        args.additional_config = {**config, SECTION: {**_PATIENCE, **config.get(SECTION, {})}}
        args.disable_log_stats = True

    async def _answer_all(self, rows: list[dict[str, Any]]) -> list[Outcome]:
        return list(await asyncio.gather(*map(self._answer, rows)))

    async def _answer(self, row: dict[str, Any]) -> Outcome:
        place = row["custom_id"], row["source"], row["line"]
        if row["error"] is not None:
            return Outcome(*place, error=json.loads(row["error"]))
        try:
            body = json.loads(row["body"])
            self._refuse_unknown(row["url"], body)
            body["model"] = body.get("model") or self._server.model
            status, answer = await self._server.post(row["url"], body)
            if status >= _SERVER_ERROR and not self._server.is_dead:
                status, answer = await self._server.post(row["url"], body)
        except ValueError as error:
            return Outcome(*place, error={"code": "invalid_row", "message": str(error)})
        except Exception as error:
            logger.exception("a row failed")
            message = f"{type(error).__name__}: {error}"
            return Outcome(*place, error={"code": "internal_error", "message": message})
        return Outcome.answered(*place, status, answer)

    def _refuse_unknown(self, url: str, body: dict[str, Any]) -> None:
        from vllm_flashtrace.server.engine_app import known_fields

        known = known_fields(url)
        for name in sorted(body):
            if known is not None and name != SECTION and name not in known:
                raise ValueError(f"{name} is no field that {url} knows")


class Slot:
    """The lowest number that no other replica of this user holds on this machine.

    It tells the replicas of a machine apart, so that each can take CPU cores of its own. A number
    is free again when its process ends, however it ends.
    """

    def __init__(self, group: str) -> None:
        """Takes a slot.

        Args:
            group: Replicas of one group share the numbers.
        """
        from filelock import FileLock, Timeout

        folder = Path(tempfile.gettempdir()) / f"vllm-flashtrace-{os.getuid()}" / group
        folder.mkdir(parents=True, exist_ok=True)
        self.number = 0
        while True:
            self._lock = FileLock(folder / f"slot-{self.number}")
            try:
                self._lock.acquire(blocking=False)
                return
            except Timeout:
                self.number += 1
