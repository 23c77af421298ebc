"""The Serve application: gateways in front of engine replicas.

Invariant: replicas of one version are made from the same plan by the same code, so that deploying
again with another number of them restarts none of those that stay. On CPU that needs a given number
of cores, for an equal share depends on how many there are.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from vllm_flashtrace import __version__
from vllm_flashtrace.base.environment import is_cpu_build
from vllm_flashtrace.scale.deploy.gateway import Gateway
from vllm_flashtrace.scale.deploy.options import DeployOptions
from vllm_flashtrace.scale.deploy.served_replica import EngineReplica, ReplicaPlan
from vllm_flashtrace.scale.ray_cluster import import_ray

ENGINES = "engine"
_PASSED_ON = ("HF_", "VLLM_")
_GATEWAY_REQUESTS = 10_000
_HEALTH_SECONDS = 2.0
_HEALTH_TIMEOUT_SECONDS = 30.0
_DRAIN_LOOP_SECONDS = 0.5


class GatewayDeployment:
    """Serve's ingress class."""

    def __init__(self, engines: Any) -> None:
        """Keeps the handle of the engines' deployment."""
        self._engines = engines

    def __serve_build_asgi_app__(self) -> Gateway:
        """What Serve runs for every HTTP request."""
        return Gateway(self._engines)


def build_application(options: DeployOptions, workers: int, cluster_cpus: float) -> Any:
    """The application, ready for ``serve.run``.

    Args:
        options: Of the command.
        workers: Worker processes of one engine.
        cluster_cpus: Cores that Ray has.
    """
    serve = import_ray("ray.serve")
    on_cpu = is_cpu_build()
    cpus = cpus_per_replica(options, cluster_cpus) if on_cpu else None
    plan = ReplicaPlan(
        argv=options.argv,
        deployment=options.name,
        environment=passed_environment(),
        workers=workers,
        cpus=cpus,
        drain_seconds=options.drain_seconds,
    )
    common = {
        "graceful_shutdown_timeout_s": options.drain_seconds,
        "graceful_shutdown_wait_loop_s": _DRAIN_LOOP_SECONDS,
        "health_check_period_s": _HEALTH_SECONDS,
        "health_check_timeout_s": _HEALTH_TIMEOUT_SECONDS,
    }
    router = options.request_router
    engines = serve.deployment(
        EngineReplica,
        name=ENGINES,
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options={"num_cpus": cpus} if on_cpu else {"num_gpus": workers},
        **({"request_router_config": {"request_router_class": router}} if router else {}),
        **options.scaling,
        **common,
    )
    gateway = serve.ingress()(GatewayDeployment)
    # Serve would take every call to be a new version, and restart every replica.
    engines = engines.options(version=version_of(plan), _internal=True).bind(plan)
    return serve.deployment(
        gateway,
        name="gateway",
        num_replicas=options.gateways,
        max_ongoing_requests=_GATEWAY_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        **common,
    ).bind(engines)


def cpus_per_replica(options: DeployOptions, cluster_cpus: float) -> float:
    """Cores of a replica that computes on the CPU: whole ones while there are enough."""
    if options.cpus_per_replica is not None:
        return options.cpus_per_replica
    share = cluster_cpus / options.most_replicas
    return float(int(share)) if share >= 1 else share


def version_of(plan: ReplicaPlan) -> str:
    """Differs where replicas that were made from another plan have to be replaced."""
    return hashlib.sha256(repr((__version__, plan)).encode()).hexdigest()[:16]


def passed_environment() -> dict[str, str]:
    """Variables of this process that engines on any machine are to see."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PASSED_ON)}
