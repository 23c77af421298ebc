"""Servers to measure: stock vLLM and vLLM with the plugin, as child processes of a benchmark.

Invariant: the two differ in the plugin alone. Both get the same options, the same other vLLM
plugins and listen on 127.0.0.1; the stock one's processes are checked for being stock.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.server.live_server import OURS, STOCK, Server, serve
from vllm_flashtrace.base.process import prepare_environment
from vllm_flashtrace.trace.config import SECTION

_PLUGIN = "flashtrace"
_ROLES = {"engine": "VLLM::EngineCore", "worker": "VLLM::Worker"}


def end_servers_on_signals() -> None:
    """Turns SIGTERM into SystemExit, so that servers are stopped on the way out."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def stock_server(model: Path, log: Path, options: list[str]) -> Iterator[Server]:
    """Runs vLLM's own server, with every plugin it would load by itself except ours.

    Raises:
        RuntimeError: Something of ours is in it.
    """
    prepare_environment()
    env = {"VLLM_PLUGINS": ",".join(_other_plugins()) or "none", "VLLM_FLASHTRACE_DISABLE": "1"}
    with serve(STOCK, str(model), log, *options, **env) as server:
        _check_stock(server)
        yield server


@contextmanager
def plugin_server(
    model: Path,
    log: Path,
    options: list[str],
    config: dict[str, Any] | None = None,
    **env: str,
) -> Iterator[Server]:
    """Runs the server of ``vllm-flashtrace serve``.

    Args:
        model: Folder of the model.
        log: File for the server's output.
        options: Further ``vllm serve`` options.
        config: The plugin's own options.
        **env: Further environment variables.
    """
    prepare_environment()
    extra = [f"--additional-config={json.dumps({SECTION: config})}"] if config else []
    with serve(OURS, str(model), log, *options, *extra, **env) as server:
        yield server


def processes(server: Server) -> dict[str, psutil.Process]:
    """The server's processes by role: ``server``, ``engine`` and ``worker``.

    Raises:
        RuntimeError: There is not exactly one of a kind.
    """
    root = psutil.Process(server.pid)
    found = {"server": root}
    children = root.children(recursive=True)
    for role, title in _ROLES.items():
        matching = [p for p in children if " ".join(p.cmdline()).startswith(title)]
        if len(matching) != 1:
            titles = [" ".join(p.cmdline())[:60] for p in children]
            raise RuntimeError(f"expected one {title} process among {titles}")
        found[role] = matching[0]
    return found


def cpu_seconds(server: Server) -> float:
    """CPU time that all processes of the server have taken so far."""
    root = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def _other_plugins() -> list[str]:
    groups = ("general", "io_processor", "platform", "stat_logger")
    entries = (e for group in groups for e in metadata.entry_points(group=f"vllm.{group}_plugins"))
    return sorted({entry.name for entry in entries} - {_PLUGIN})


def _check_stock(server: Server) -> None:
    """Makes sure that the plugin is not loaded and that no route of ours exists.

    The engine and the worker inherit the environment looked at here; the title they give themselves
    overwrites what the system shows of theirs.
    """
    if _PLUGIN in psutil.Process(server.pid).environ()["VLLM_PLUGINS"].split(","):
        raise RuntimeError("the stock server loads the plugin")
    status = httpx.post(f"{server.url}/v1/attributions", json={}, timeout=30).status_code
    if status != 404:
        raise RuntimeError(f"the stock server answers /v1/attributions with {status}")
    loaded = re.search(rf"Load\w+ .*plugin {_PLUGIN}", server.log.read_text(errors="replace"))
    if loaded is not None:
        raise RuntimeError(f"the stock server's log says {loaded.group()!r}")
