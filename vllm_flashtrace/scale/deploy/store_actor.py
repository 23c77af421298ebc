"""The store of deferred attributions of all replicas: a Ray actor, and its client in a replica.

It is the store that API servers of one machine share, with its bounds and states, behind calls. It
outlives every replica, and its process may restart on its machine without losing an entry.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.scale.ray_cluster import import_ray
from vllm_flashtrace.server.deferred import STORE_ERRORS, StoreLimits
from vllm_flashtrace.server.sqlite_store import SqliteStore

NAMESPACE = "flashtrace"
# A replica renews its entries every second.
LEASE_SECONDS = 20.0
# Replicas call at every health check; where none has for so long, there are none.
IDLE_SECONDS = 600.0
_CALLS_AT_ONCE = 16
# Longer than the store waits for its own file.
_CALL_SECONDS = 40.0


class ActorStore:
    """An :class:`AttributionStore` that calls the actor; from any thread but that of an event loop.

    Trouble with the actor is a ``ConnectionError``.
    """

    def __init__(self, deployment: str, owner: str, limits: StoreLimits) -> None:
        """Starts the actor if there is none.

        Args:
            deployment: Name of the deployment.
            owner: Names this replica in the store.
            limits: Bounds, the same in every replica.
        """
        self._ray = import_ray()
        self._deployment = deployment
        self._owner = owner
        self._limits = limits
        self._host = find_or_start(self._ray, deployment)

    def reserve(self, attribution_id: str) -> str:
        """Adds a ``queued`` entry and returns its JSON."""
        answer = self._call("reserve", attribution_id)
        if not isinstance(answer, str):
            raise TraceError(*answer)
        return answer

    def start(self, attribution_id: str) -> bool:
        """Marks an entry ``running``; False when it was deleted meanwhile."""
        return bool(self._call("start", attribution_id))

    def finish(self, attribution_id: str, status: str, body: str) -> bool:
        """Stores an attribution's JSON and final status; False when its entry was deleted."""
        return bool(self._call("finish", attribution_id, status, body))

    def get(self, attribution_id: str) -> str | None:
        """The JSON of an entry's attribution object; None when unknown or over its time."""
        found: str | None = self._call("get", attribution_id)
        return found

    def delete(self, attribution_id: str) -> bool:
        """Drops an entry; False when unknown or over its time."""
        return bool(self._call("delete", attribution_id))

    def renew(self) -> set[str]:
        """Keeps this server's unfinished entries; returns the ids of all that are still there."""
        return set(self._call("renew"))

    def abandon(self) -> None:
        """Lets this server's unfinished entries fail with ``server_lost``: it stops."""
        self._call("abandon")

    def counts(self) -> dict[str, int]:
        """Number of entries by status, of all servers together."""
        return dict(self._call("counts"))

    def close(self) -> None:
        """Lets go of what the actor holds for this replica; a later call takes it up again."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> Any:
        errors = self._ray.exceptions
        try:
            try:
                return self._ask(method, arguments)
            except errors.ActorDiedError:
                # It left because no replica was there, or its machine is gone.
                self._host = find_or_start(self._ray, self._deployment)
                return self._ask(method, arguments)
        except errors.RayError as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ConnectionError(
                f"the store of deferred attributions cannot be used: {reason[0]}"
            ) from error

    def _ask(self, method: str, arguments: tuple[Any, ...]) -> Any:
        call = self._host.call.remote(self._owner, self._limits, method, *arguments)
        return self._ray.get(call, timeout=_CALL_SECONDS)


class StoreHost:
    """Answers the calls of :class:`vllm_flashtrace.scale.deploy.store_actor.ActorStore`."""

    def __init__(self, folder: str, idle_seconds: float = IDLE_SECONDS) -> None:
        """Nothing is opened yet.

        Args:
            folder: Name of the store's folder among the machine's temporary files.
            idle_seconds: After how long without a call nobody is taken to be left.
        """
        self._folder = Path(tempfile.gettempdir()) / folder
        self._idle_seconds = idle_seconds
        self._views: dict[tuple[str, StoreLimits], tuple[SqliteStore, float]] = {}
        self._lock = threading.Lock()
        self._called = time.monotonic()

    def call(self, owner: str, limits: StoreLimits, method: str, *arguments: Any) -> Any:
        """Calls a method of the owner's view of the store.

        Returns:
            What it returns; a pair of code and message where the store refuses.

        Raises:
            RuntimeError: The store cannot be used.
        """
        self._called = time.monotonic()
        try:
            return getattr(self._view(owner, limits), method)(*arguments)
        except TraceError as refusal:
            return refusal.code, refusal.message
        except STORE_ERRORS as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    def idle(self) -> bool:
        """Whether nobody has called for so long that nobody is left."""
        return time.monotonic() - self._called > self._idle_seconds

    def _view(self, owner: str, limits: StoreLimits) -> SqliteStore:
        now = time.monotonic()
        with self._lock:
            known = self._views.get((owner, limits))
            view = known[0] if known else SqliteStore(self._folder, owner, limits)
            self._views[owner, limits] = view, now
            for key, (other, used) in list(self._views.items()):
                if now - used > IDLE_SECONDS:
                    other.close()
                    del self._views[key]
        return view


class StoreActor(StoreHost):
    """The host as a Ray actor, which ends itself when nobody has called for long."""

    def __init__(self, folder: str, idle_seconds: float = IDLE_SECONDS) -> None:
        """As its parent, and begins to watch for the end.

        Args:
            folder: Name of the store's folder among the machine's temporary files.
            idle_seconds: After how long without a call nobody is taken to be left.
        """
        super().__init__(folder, idle_seconds)
        threading.Thread(target=self._watch, daemon=True).start()

    def pid(self) -> int:
        """Process id of the store."""
        return os.getpid()

    def leave(self) -> None:
        """Removes the store and ends the actor."""
        shutil.rmtree(self._folder, ignore_errors=True)
        import_ray().actor.exit_actor()

    def _watch(self) -> None:
        while not self.idle():
            time.sleep(min(self._idle_seconds / 4, 30))
        # An actor is ended from one of its own calls only.
        import_ray().get_runtime_context().current_actor.leave.remote()


def find_or_start(ray: Any, name: str) -> Any:
    """The handle of the deployment's store, which is started if there is none.

    Args:
        ray: The module.
        name: Of the deployment.
    """
    actor = ray.remote(StoreActor).options(
        name=actor_name(name),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=3,
        max_concurrency=_CALLS_AT_ONCE,
    )
    return actor.remote(f"flashtrace-{secrets.token_hex(16)}")


def actor_name(deployment: str) -> str:
    """Name of the actor in :data:`NAMESPACE`."""
    return f"attributions of {deployment}"
