"""Starts a local Ray, or joins the cluster that ``RAY_ADDRESS`` names.

Invariant: what was started here listens on 127.0.0.1 only, reports no usage and ends with this
process; a cluster that was joined goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from vllm_flashtrace.errors import FlashTraceError

_LOCALHOST = "127.0.0.1"
_ADDRESS = "RAY_ADDRESS"
_EXTRA = "vllm-flashtrace[scale]"


class RayUnavailableError(FlashTraceError):
    """Ray is not installed, did not start, or cannot be joined."""

    def __init__(self, message: str) -> None:
        super().__init__("ray_unavailable", message)


def import_ray(module: str = "ray") -> Any:
    """Imports Ray or a part of it, such as ``ray.data``, with usage reports off.

    Raises:
        RayUnavailableError: It is not installed; the message names the extra that brings it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get(_ADDRESS):
        # Ray listens on the loopback interface alone where it takes itself to be no cluster, which
        # it reads from this variable when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        return import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise RayUnavailableError(f"{missing} is not installed; install {_EXTRA}") from None


@contextmanager
def connect(**options: Any) -> Iterator[Any]:
    """Ray, for as long as the ``with`` block lasts.

    Joins the cluster in ``RAY_ADDRESS``; without it a Ray of its own is started on this machine,
    without dashboard. Where this process is connected already, that connection is used and stays.

    Args:
        **options: Passed to ``ray.init``, e.g. ``num_cpus``; without effect on a connection that
            exists. Resources (``num_*``) are those of the cluster where one is joined.

    Yields:
        The ``ray`` module.

    Raises:
        RayUnavailableError: Ray is not installed, did not start, or cannot be joined.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get(_ADDRESS)
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        **options,
    }
    if address:
        settings = {k: v for k, v in settings.items() if not k.startswith("num_")}
    else:
        settings |= {
            "address": "local",
            "include_dashboard": False,
            "_node_ip_address": _LOCALHOST,
        }
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises many kinds, all of them meaning no Ray.
        reason = " ".join(str(error).split())
        what = f"joining Ray at {address}" if address else "starting Ray"
        raise RayUnavailableError(f"{what} failed: {reason}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
