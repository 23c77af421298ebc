"""What the user asked of a deployment.

Invariant: options that contradict each other are refused before Ray or an engine is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

_SCALING = ("min_replicas", "max_replicas")


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """A checked command line.

    Attributes:
        argv: Model and options for ``vllm serve``.
        host: Address that Serve's HTTP proxies listen on.
        port: Their port.
        name: Name of the Serve application.
        scaling: ``num_replicas``, or Serve's ``autoscaling_config``, as deployment options.
        max_ongoing_requests: Requests that one replica has at once; more wait in the gateway.
        drain_seconds: How long a replica that is to stop may finish what it has begun.
        cpus_per_replica: CPU cores of a replica; None for an equal share of the machine.
        gateways: Replicas of the gateway.
        request_router: Import path of a Serve request router, or None.
        blocking: Whether the command stays, and takes the deployment down when it ends.
    """

    argv: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "flashtrace"
    scaling: dict[str, Any] = field(default_factory=lambda: {"num_replicas": 1})
    max_ongoing_requests: int = 256
    drain_seconds: float = 60.0
    cpus_per_replica: float | None = None
    gateways: int = 1
    request_router: str | None = None
    blocking: bool = True

    @property
    def most_replicas(self) -> int:
        """How many engine replicas there may be at once."""
        autoscaling = self.scaling.get("autoscaling_config")
        return int(autoscaling["max_replicas"] if autoscaling else self.scaling["num_replicas"])


def parse_scaling(
    replicas: int | None,
    autoscaling: dict[str, Any],
    more: str | None,
) -> dict[str, Any]:
    """Serve's deployment options for the number of replicas.

    Args:
        replicas: A fixed number, or None.
        autoscaling: Options of Serve's ``AutoscalingConfig``; None where not given.
        more: Further ones as a JSON object.

    Raises:
        ValueError: The options contradict each other or the JSON is bad.
    """
    chosen = {name: value for name, value in autoscaling.items() if value is not None}
    chosen |= _json_object(more)
    if not chosen:
        return {"num_replicas": 1 if replicas is None else replicas}
    if replicas is not None:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(chosen))
        raise ValueError(f"--replicas is a fixed number and cannot be combined with {names}")
    if "max_replicas" not in chosen:
        raise ValueError("autoscaling needs --max-replicas")
    least, most = (int(chosen.get(name, 1)) for name in _SCALING)
    if least > most:
        raise ValueError(f"--min-replicas {least} is more than --max-replicas {most}")
    return {"autoscaling_config": {"min_replicas": least, **chosen}}


def check_engine_options(args: Any) -> None:
    """Refuses ``vllm serve`` options that have no meaning in a replica.

    Args:
        args: The parsed options.

    Raises:
        ValueError: With the option and what to use instead.
    """
    refusals = {
        "--data-parallel-size": args.data_parallel_size > 1,
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--headless": args.headless,
        "--uds": args.uds is not None,
        "--grpc": getattr(args, "grpc", False),
    }
    for option, given in refusals.items():
        if given:
            raise ValueError(f"{option} has no use in a deployment; use --replicas")


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--autoscaling: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--autoscaling must be a JSON object, got {text}")
    return value
