"""What ``vllm-flashtrace trace`` does with its options, and the engine of a command.

Everything the user can get wrong is checked before an engine starts, where that is possible.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.base.errors import FlashTraceError, TraceError
from vllm_flashtrace.base.process import end_engine_with_this_process
from vllm_flashtrace.offline.engine import engine_log, root_cause

if TYPE_CHECKING:
    from vllm_flashtrace.api.attribution import Attribution
    from vllm_flashtrace.offline.flashtrace import FlashTrace

Messages = list[dict[str, Any]]

_STDERR = 2


def run_trace(
    model: str,
    prompt: str | Messages,
    completion: str | None,
    field: dict[str, Any],
    *,
    max_tokens: int,
    max_model_len: int | None,
    enforce_eager: bool,
) -> Attribution:
    """Starts an engine, completes the prompt greedily unless there is a completion, and explains.

    Raises:
        FlashTraceError: The engine did not start or refuses the prompt, or it cannot trace this
            model; a note names the engine's log.
    """
    engine_args: dict[str, Any] = {"disable_log_stats": True, "enforce_eager": enforce_eager}
    if max_model_len is not None:
        engine_args["max_model_len"] = max_model_len
    with command_engine(model, **engine_args) as engine:
        if completion is not None:
            return engine.attribute(prompt, completion, flashtrace=field)
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        [attribution] = engine.generate(prompt, params, flashtrace=field)
        return attribution


@contextmanager
def command_engine(model: str, **engine_args: Any) -> Iterator[FlashTrace]:
    """A :class:`FlashTrace` that lives as long as the ``with`` block and this process.

    Raises:
        FlashTraceError: The engine did not start, cannot trace this model, or refused what it was
            asked in the block; the message is the cause in one line, and a note (``__notes__``)
            names the engine's log, which has the traceback.
    """
    end_engine_with_this_process()
    with engine_log() as log:
        try:
            from vllm_flashtrace.offline.flashtrace import FlashTrace

            with FlashTrace(model, **engine_args) as engine:
                yield engine
        except FlashTraceError:
            raise
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
                raise
            with os.fdopen(os.dup(_STDERR), "w") as stream:
                traceback.print_exc(file=stream)
            reason = root_cause(error, log)
            raise TraceError("engine_failed", f"the engine of {model} failed: {reason}") from None


def show(attribution: Attribution, *, full: bool, rows: int) -> None:
    """Prints the heat-map, the completion and the table of top tokens, or the completion alone."""
    from rich.console import Console
    from rich.text import Text

    from vllm_flashtrace.api.terminal import render_terminal

    console = Console(highlight=False)
    if attribution.status == "completed":
        console.print(render_terminal(attribution, full=full, rows=rows))
    else:
        answer = (attribution.text or "").strip() or "(empty)"
        console.print(Text.assemble(("Completion  ", "bold"), answer))


def why_none(attribution: Attribution) -> str:
    """The sentence on an attribution without scores."""
    error = attribution.error or {}
    return f"the attribution {attribution.status}: {error.get('message')} ({error.get('code')})"


def read_text(path: Path, option: str) -> str:
    """Reads the UTF-8 file given for ``option``; ``-`` is standard input.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty or not UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {name} is not UTF-8 text: {error.reason}") from None
    if not text.strip():
        raise ValueError(f"{option} {name} is empty")
    return text


def read_prompt(path: Path, *, system: str | None, chat: bool) -> str | Messages:
    """Reads a prompt: a text, or a JSON list of chat messages.

    Args:
        path: The file; a text that is no JSON list of objects is taken as it is.
        system: Content of a system message to put first.
        chat: Whether a text becomes a user message even without a system message.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty, a message is malformed, or there are two system messages.
    """
    text = read_text(path, "--prompt-file")
    prompt: str | Messages = _messages(path, text) or text
    if isinstance(prompt, str) and (chat or system is not None):
        prompt = [{"role": "user", "content": prompt}]
    if system is not None and isinstance(prompt, list):
        if prompt[0]["role"] == "system":
            raise ValueError(f"{path} already begins with a system message; leave out --system")
        prompt = [{"role": "system", "content": system}, *prompt]
    return prompt


def _messages(path: Path, text: str) -> Messages | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return None
    for number, message in enumerate(value):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{path}: message {number} has no role")
    return value or None


def flashtrace_field(hops: str, target_text: str | None) -> dict[str, Any]:
    """The ``flashtrace`` field for the command's options, every score included.

    Raises:
        ValueError: ``hops`` is neither a number nor ``auto``.
        InvalidRequestError: The field is refused.
    """
    from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field

    if hops != "auto" and not (hops.isascii() and hops.isdigit()):
        raise ValueError(f"--hops must be a number of at least 0 or auto, got {hops!r}")
    field = {
        "top_k": None,
        "include": ["tokens", "generated", "segments"],
        "hops": hops if hops == "auto" else int(hops),
        "target": "output" if target_text is None else {"text": target_text},
    }
    parse_flashtrace_field(field, RequestLimits())
    return field


def check_model(model: str) -> None:
    """Fails early where ``model`` is the path of a folder that is not there.

    Raises:
        OSError: There is no such folder.
    """
    if model.startswith(("/", "./", "../")) and not Path(model).exists():
        raise FileNotFoundError(f"--model {model} does not exist")


def check_writable(paths: Iterable[Path]) -> None:
    """Fails early where a result could not be written.

    Raises:
        OSError: A path's folder does not exist, or the path may not be written.
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder {path.parent} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f"{path} may not be written")
