"""What ``vllm-flashtrace deploy`` does.

Invariant: a mistake in the options is said before anything starts; whatever ends the command, what
the replicas have begun is finished first, within the time for it, and a Ray started here ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.base.environment import prepare_environment
from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.scale.deploy.application import build_application
from vllm_flashtrace.scale.deploy.options import DeployOptions, check_engine_options
from vllm_flashtrace.scale.deploy.store_actor import NAMESPACE, actor_name
from vllm_flashtrace.scale.interruption import Interrupted, Stopping, stop_on_signals
from vllm_flashtrace.scale.ray_cluster import connect, import_ray

_OBJECT_STORE_BYTES = 256 << 20
_POLL_SECONDS = 0.5
# Beyond the time for draining: for the engine's own end.
_STOP_SECONDS = 30.0


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
