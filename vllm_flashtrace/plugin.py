"""Entry point of the engine side: vLLM calls :func:`register` in every one of its processes.

Invariant: loading never breaks serving. If a patch does not fit, one line says so and the server
runs without attribution.
"""

from __future__ import annotations

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.base.process import (
    DISABLE_ENV,
    enabled,
    end_with_parent_if_asked,
    note_process,
)
from vllm_flashtrace.server.sqlite_store import ensure_store_folder
from vllm_flashtrace.trace.wire import ensure_secret


def register() -> None:
    """Applies the patches in this process."""
    from vllm_flashtrace.patches.kill_switch import declare

    declare(DISABLE_ENV)
    end_with_parent_if_asked()
    if not enabled():
        return
    ensure_secret()
    ensure_store_folder()
    from vllm_flashtrace import patches
    from vllm_flashtrace.patches._check import PatchError

    try:
        patches.apply_all()
    except (PatchError, ImportError) as error:
        logger.error("FlashTrace is off: it does not fit this vLLM: %s", error)
    note_process(patches.applied_names())
