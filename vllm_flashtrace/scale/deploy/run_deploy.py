"""``vllm-flashtrace deploy``: its options, the Serve application, and what the command does.

Options that are bad or contradict each other are refused before Ray or an engine is started.
Whatever ends the command, what the replicas have begun is finished first, within the time for it,
and a Ray that was started here ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from vllm_flashtrace.base import __version__
from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.base.process import is_cpu_build, prepare_environment
from vllm_flashtrace.scale.deploy.gateway import Gateway
from vllm_flashtrace.scale.deploy.served_replica import EngineReplica, ReplicaPlan
from vllm_flashtrace.scale.deploy.store_actor import NAMESPACE, actor_name
from vllm_flashtrace.scale.ray_cluster import (
    Interrupted,
    Stopping,
    connect,
    import_ray,
    stop_on_signals,
)

ENGINES = "engine"
_SCALING = ("min_replicas", "max_replicas")
_PASSED_ON = ("HF_", "VLLM_")
_GATEWAY_REQUESTS = 10_000
_HEALTH_SECONDS = 2.0
_HEALTH_TIMEOUT_SECONDS = 30.0
_DRAIN_LOOP_SECONDS = 0.5
_OBJECT_STORE_BYTES = 256 << 20
_POLL_SECONDS = 0.5
# Beyond the time for draining: for the engine's own end.
_STOP_SECONDS = 30.0


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


class DeployError(FlashTraceError):
    """The deployment did not come up."""

    def __init__(self, message: str) -> None:
        super().__init__("deploy_failed", message)


def run_deploy(options: DeployOptions) -> int:
    """Deploys, and stays until a signal if asked to.

    Returns:
        Exit code: 0, or 130 or 143 when a signal ended it.

    Raises:
        ValueError: An option is bad.
        RayUnavailableError: Ray is not installed, did not start, or cannot be joined.
        DeployError: The engine does not start.
    """
    import_ray("ray.serve")
    own = not os.environ.get("RAY_ADDRESS")
    if own:
        if not options.blocking:
            raise ValueError("--no-blocking needs a Ray cluster to stay in: set RAY_ADDRESS")
        _check_port(options)
    facts = _check_engine(options)
    local = {
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "log_to_driver": True,
    }
    code = 0
    with connect(**local) as ray:
        serve = import_ray("ray.serve")
        if options.blocking and options.name in serve.status().applications:
            raise ValueError(
                f"an application {options.name} runs already: choose another --name, or update it "
                "with --no-blocking"
            )
        try:
            with stop_on_signals() as stopping:  # Ray has just put handlers of its own in place.
                _start(ray, serve, options, facts, own)
                if options.blocking:
                    _stay(serve, options, stopping)
        except Interrupted as stopped:
            _say(f"stopping; requests have {options.drain_seconds:g} s to finish")
            code = stopped.code
        finally:
            if options.blocking:
                take_down(ray, serve, options, own)
    return code


def take_down(ray: Any, serve: Any, options: DeployOptions, own: bool) -> None:
    """Drains and deletes the application; ``own``: also ends Serve."""
    serve.delete(options.name, _blocking=False)
    deadline = time.monotonic() + options.drain_seconds + _STOP_SECONDS
    while options.name in serve.status().applications:
        if time.monotonic() > deadline:
            _say("the replicas did not end in time")
            break
        time.sleep(_POLL_SECONDS)
    try:
        store = ray.get_actor(actor_name(options.name), NAMESPACE)
        ray.get(store.leave.remote(), timeout=_STOP_SECONDS)
    except (ValueError, ray.exceptions.RayError):
        pass  # There was none, or it has left.
    if own:
        serve.shutdown()


def _start(ray: Any, serve: Any, options: DeployOptions, facts: EngineFacts, own: bool) -> None:
    logging = {"enable_access_log": facts.access_log}
    http = {"host": options.host, "port": options.port, **facts.tls}
    serve.start(http_options=http, logging_config=logging)
    application = build_application(options, facts.workers, ray.cluster_resources().get("CPU", 1))
    try:
        serve.run(application, name=options.name, route_prefix="/", logging_config=logging)
    except (RuntimeError, import_ray("ray.serve.exceptions").RayServeException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DeployError(f"the deployment failed: {lines[-1] if lines else error}") from None
    scheme = "https" if facts.tls else "http"
    address = f"{scheme}://{options.host}:{options.port}"
    if own or facts.tls or _answers(address, options.name):
        _say(f"{options.name} is ready at {address}")
    else:
        _say(f"{options.name} is ready where this cluster's Serve listens, not at {address}")


def _answers(address: str, name: str) -> bool:
    """Whether Serve's proxy with our application listens there; in a cluster it may elsewhere."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/-/routes", timeout=5) as response:
            return name in json.load(response).values()
    except (OSError, ValueError, AttributeError):
        return False


def _stay(serve: Any, options: DeployOptions, stopping: Stopping) -> None:
    """Waits for a signal, or for somebody to delete the application."""
    while options.name in serve.status().applications:
        stopping.check()
        time.sleep(_POLL_SECONDS)
    _say("the application was deleted")


def _check_engine(options: DeployOptions) -> EngineFacts:
    """Reads the engine's options."""
    prepare_environment()
    from vllm_flashtrace.server.engine_app import engine_workers, parse_engine_options

    args, _ = parse_engine_options(options.argv)
    check_engine_options(args)
    names = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")
    tls = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return EngineFacts(engine_workers(args), tls, not args.disable_uvicorn_access_log)


def _check_port(options: DeployOptions) -> None:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((options.host, options.port))
        except OSError as error:
            raise ValueError(f"port {options.port} of {options.host}: {error.strerror}") from None


def _say(text: str) -> None:
    print(f"vllm-flashtrace: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the options of ``vllm serve`` say to Serve.

    Attributes:
        workers: Worker processes of an engine.
        tls: Serve's options for TLS.
        access_log: Whether requests are logged.
    """

    workers: int
    tls: dict[str, str]
    access_log: bool


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

    Replicas of one version are made from the same plan by the same code, so that deploying again
    with another number of them restarts none of those that stay. On CPU that needs
    ``cpus_per_replica``, because an equal share depends on how many there are.

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
