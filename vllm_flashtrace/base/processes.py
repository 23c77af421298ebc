"""Which processes of a server carry the patches.

Invariant: a process speaks for itself and for those that it descends from, never for others. What
descendants need is in the environment that they inherit.
"""

from __future__ import annotations

import json
import os
from typing import Any

_ENV = "FLASHTRACE_PROCESSES"
_watches_forks = False


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
    os.environ[_ENV] = json.dumps([*others, {"pid": os.getpid(), "patches": patches}])


def _noted() -> list[dict[str, Any]]:
    try:
        entries = json.loads(os.environ.get(_ENV, "[]"))
        return [{"pid": int(entry["pid"]), "patches": entry["patches"]} for entry in entries]
    except (ValueError, TypeError, KeyError):
        return []  # Not ours.


def _name(pid: int) -> str:
    import psutil  # type: ignore[import-untyped]

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "gone"
