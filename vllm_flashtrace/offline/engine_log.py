"""An engine for one command: its log kept out of the command's output, stopped at the end.

Invariant: nothing is lost. What the engine and its processes write to standard error is in a file
that outlives a failure, and the failure names it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.base.errors import FlashTraceError, TraceError

if TYPE_CHECKING:
    from vllm_flashtrace.offline.flashtrace import FlashTrace

_LEVEL = "VLLM_LOGGING_LEVEL"
_STREAM = "VLLM_LOGGING_STREAM"
_STDERR = 2


@contextmanager
def command_engine(model: str, **engine_args: Any) -> Iterator[FlashTrace]:
    """A :class:`FlashTrace` that lives as long as the ``with`` block.

    Raises:
        FlashTraceError: The engine did not start, cannot trace this model, or refused what it was
            asked in the block; a note (``__notes__``) names the engine's log.
    """
    with engine_log():
        try:
            from vllm_flashtrace.offline.flashtrace import FlashTrace

            with FlashTrace(model, **engine_args) as engine:
                yield engine
        except FlashTraceError:
            raise
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise TraceError("engine_failed", f"the engine of {model} failed: {reason}") from error


@contextmanager
def engine_log() -> Iterator[None]:
    """Sends standard error, that of processes started meanwhile included, to a temporary file.

    File descriptor 2 is redirected rather than loggers quietened, because vLLM logs before it
    configures logging, in several processes, and libraries warn without logging at all. Does
    nothing where the user chose a level of logging (``VLLM_LOGGING_LEVEL``). Must be entered before
    vLLM is imported.

    On success the file is deleted. An exception gets a note (``__notes__``) with the file's path.
    """
    if os.environ.get(_LEVEL):
        yield
        return
    os.environ.setdefault(_STREAM, "ext://sys.stderr")
    descriptor, name = tempfile.mkstemp(prefix="vllm-flashtrace-", suffix=".log")
    sys.stderr.flush()
    saved = os.dup(_STDERR)
    os.dup2(descriptor, _STDERR)
    os.close(descriptor)
    try:
        yield
    except BaseException as error:
        error.add_note(f"engine log: {name}")
        raise
    else:
        Path(name).unlink(missing_ok=True)
    finally:
        sys.stderr.flush()
        os.dup2(saved, _STDERR)
        os.close(saved)
