"""A replica's view of the store that a Ray actor keeps for all of them.

Invariant: to its callers it is the :class:`AttributionStore` of one machine; trouble with the actor
is a ``ConnectionError``.
"""

from __future__ import annotations

from typing import Any

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.scale.deploy.store_actor import find_or_start
from vllm_flashtrace.scale.ray_cluster import import_ray
from vllm_flashtrace.server.store import StoreLimits

# Longer than the store waits for its own file.
_CALL_SECONDS = 40.0


class ActorStore:
    """Calls the store of a deployment; from any thread but that of an event loop."""

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

    def finish(self, attribution_id: str, attribution: dict[str, Any]) -> bool:
        """Stores an attribution with its final status; False when its entry was deleted."""
        return bool(self._call("finish", attribution_id, attribution))

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
