"""Registers attention backends that let a trace see each layer's queries.

What it changes: vLLM's registry entries for ``CPU_ATTN``, or on CUDA for ``FLASH_ATTN``,
``TRITON_ATTN`` and ``FLASHINFER``, name subclasses of the stock backends. A subclass differs in its
implementation class only, and that class adds nothing but the mixin ``RecordingAttention``, which
calls the current observer after the stock ``forward``. There is an observer only during a step that
computes target rows of a trace. An entry that another plugin has overridden is left alone; traces
are then refused where that backend is used.

Why here: ``register_backend`` is vLLM's public extension point, and overriding a member keeps
vLLM's own backend selection, but the signature of ``forward`` is private. Entries are paths, and
the classes are made when a path is looked up, so FlashAttention and FlashInfer are imported only
where vLLM itself imports them. For the same reason signatures are read from the source.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.patches._check import PatchError
from vllm_flashtrace.worker.observer import RecordingAttention

FORWARD_PARAMETERS = (
    "self",
    "layer",
    "query",
    "key",
    "value",
    "kv_cache",
    "attn_metadata",
    "output",
)
"""How the ``forward`` of a stock implementation must begin."""


class StockBackend(NamedTuple):
    """A backend of vLLM: its registry member, module, backend class and implementation class."""

    member: str
    module: str
    backend: str
    implementation: str

    @property
    def recording(self) -> str:
        """Name, in this module, of the recording backend."""
        return f"Recording{self.backend}"


_ATTENTION = "vllm.v1.attention.backends"
CPU_BACKENDS = (
    StockBackend(
        "CPU_ATTN", f"{_ATTENTION}.cpu_attn", "CPUAttentionBackend", "CPUAttentionBackendImpl"
    ),
)
CUDA_BACKENDS = (
    StockBackend(
        "FLASH_ATTN", f"{_ATTENTION}.flash_attn", "FlashAttentionBackend", "FlashAttentionImpl"
    ),
    StockBackend(
        "TRITON_ATTN", f"{_ATTENTION}.triton_attn", "TritonAttentionBackend", "TritonAttentionImpl"
    ),
    StockBackend("FLASHINFER", f"{_ATTENTION}.flashinfer", "FlashInferBackend", "FlashInferImpl"),
)


def __getattr__(name: str) -> Any:
    """Makes a recording backend when vLLM first looks it up, and keeps it under its name."""
    for stock in (*CPU_BACKENDS, *CUDA_BACKENDS):
        if name == stock.recording:
            backend = globals()[name] = _recording_backend(stock)
            return backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check(backends: Sequence[StockBackend] | None = None) -> None:
    """Raises PatchError unless every stock ``forward`` has the expected parameters.

    Args:
        backends: Which to check; None means those of this platform.
    """
    for stock in _of_platform() if backends is None else backends:
        if stock.member not in AttentionBackendEnum.__members__:
            raise PatchError(f"AttentionBackendEnum.{stock.member} does not exist in this vLLM")
        found = method_parameters(stock.module, stock.implementation, "forward")
        if tuple(found[: len(FORWARD_PARAMETERS)]) != FORWARD_PARAMETERS:
            raise PatchError(
                f"{stock.implementation}.forward takes {found}, expected it to begin with "
                f"{list(FORWARD_PARAMETERS)}"
            )


def apply(backends: Sequence[StockBackend] | None = None) -> None:
    """Registers the recording backends over the stock ones; argument as for :func:`check`."""
    for stock in _of_platform() if backends is None else backends:
        member = AttentionBackendEnum[stock.member]
        if member.is_overridden():
            logger.warning(
                "FlashTrace: %s is %s already; left alone", stock.member, member.get_path()
            )
        else:
            register_backend(member, f"{__name__}.{stock.recording}")


def method_parameters(module: str, class_name: str, method: str) -> list[str]:
    """The parameter names of a method, read from source: nothing is imported but the packages.

    Raises:
        PatchError: There is no such module, class or method.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise PatchError(f"{module} does not exist in this vLLM, or not as source")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name == method:
                    arguments = member.args
                    return [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    raise PatchError(f"{module}.{class_name}.{method} does not exist in this vLLM")


def _of_platform() -> tuple[StockBackend, ...]:
    from vllm.platforms import current_platform

    return CPU_BACKENDS if current_platform.is_cpu() else CUDA_BACKENDS


def _recording_backend(stock: StockBackend) -> type:
    module = importlib.import_module(stock.module)
    stock_impl = getattr(module, stock.implementation)
    home = {"__module__": __name__}
    impl = type(f"Recording{stock.implementation}", (RecordingAttention, stock_impl), home)

    def get_impl_cls() -> type:
        return impl

    members = {**home, "get_impl_cls": staticmethod(get_impl_cls)}
    return type(stock.recording, (getattr(module, stock.backend),), members)
