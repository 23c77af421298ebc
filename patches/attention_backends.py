"""Registers attention backends that let a trace see each layer's queries.

What it changes: vLLM's registry entries for ``CPU_ATTN``, or on CUDA for ``FLASH_ATTN``,
``TRITON_ATTN`` and ``FLASHINFER``, name subclasses of the stock backends. A subclass differs in its
implementation class only, and that class adds nothing but the mixin ``RecordingAttention``, which
calls the current observer after the stock ``forward``. There is an observer only during a step that
computes target rows of a trace. An entry that another plugin has overridden is left alone; traces
are then refused where that backend is used.

FlashAttention computes the log-sum-exp of every query, and the stock call drops it. While the
``forward`` of an observed layer runs, its module's ``flash_attn_varlen_func`` is replaced by one
that asks for the log-sum-exp too, and the mixin shows it. `told` says of which calls it is the
number that traces need.

Why here: ``register_backend`` is vLLM's public extension point, and overriding a member keeps
vLLM's own backend selection, but the signature of ``forward`` is private. Entries are paths, and
the classes are made when a path is looked up, so FlashAttention and FlashInfer are imported only
where vLLM itself imports them. For the same reason signatures are read from the source. No backend
hands out the log-sum-exp of its ``forward``.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.patches._check import PatchError
from vllm_flashtrace.worker.observer import (
    TELLING_VERSIONS,
    RecordingAttention,
    current,
    note_lse,
)

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


_KERNEL = "flash_attn_varlen_func"
_KERNEL_HOME = Path("vllm_flash_attn", "flash_attn_interface.py")
_KERNEL_PARAMETERS = (
    "k",
    "max_seqlen_q",
    "softcap",
    "alibi_slopes",
    "block_table",
    "return_softmax_lse",
    "fa_version",
)
"""What `told` reads of a call, and what is added to it."""


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
        if stock.member == "FLASH_ATTN":
            _check_kernel()
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
    spec = None
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise PatchError(f"{module} does not exist in this vLLM, or not as source")
    for node in _nodes(Path(spec.origin)):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            found = _parameters(node, method)
            if found is not None:
                return found
    raise PatchError(f"{module}.{class_name}.{method} does not exist in this vLLM")


def told(call: Mapping[str, Any]) -> bool:
    """Whether FlashAttention's log-sum-exp in a call is that of the logits as `AttentionForm` says.

    It is ``[H, tokens]``, to base e, and with a sink it includes the sink, however keys are split.
    Not so:

    - with one query for each request, FlashAttention 2 may lay it out in another order of heads;
    - with ALiBi it is shifted by a number for each row, which does not change the weights;
    - soft caps are made with an approximate tanh, which is off by up to 2 ** -11;
    - products of eight-bit floats are added up with fewer bits than the kernels of traces have;
    - FlashAttention 4 would compile a kernel of its own for it when the first trace comes.

    Args:
        call: Keyword arguments of ``flash_attn_varlen_func``.
    """
    return (
        call.get("fa_version") in TELLING_VERSIONS
        and call.get("block_table") is not None
        and call.get("max_seqlen_q", 1) > 1
        and call.get("alibi_slopes") is None
        and not call.get("softcap")
        and call["k"].itemsize > 1
        and "return_softmax_lse" not in call
    )


@contextlib.contextmanager
def _telling(module: Any) -> Iterator[None]:
    """While it lasts the kernel that FlashAttention's backend calls tells the log-sum-exp."""
    kernel = getattr(module, _KERNEL, None)
    if kernel is None:
        yield
        return
    setattr(module, _KERNEL, telling_lse(kernel))
    try:
        yield
    finally:
        setattr(module, _KERNEL, kernel)


@functools.cache
def telling_lse(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A ``flash_attn_varlen_func`` that notes the log-sum-exp while there is an observer."""

    @functools.wraps(kernel)
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        if current() is None or args or not told(kwargs):
            return kernel(*args, **kwargs)
        output, lse = kernel(**kwargs, return_softmax_lse=True)
        note_lse(lse)
        return output

    return flash_attn_varlen_func


def _check_kernel() -> None:
    # Asking for the module's own place would import its package, which loads FlashAttention.
    home = Path(vllm.__path__[0]) / _KERNEL_HOME
    for node in _nodes(home) if home.exists() else ():
        found = _parameters(node, _KERNEL)
        if found is not None:
            missing = [name for name in _KERNEL_PARAMETERS if name not in found]
            if missing:
                raise PatchError(f"{_KERNEL} has no parameters {missing} in this vLLM")
            return
    raise PatchError(f"{_KERNEL} does not exist in this vLLM")


def _nodes(source: Path) -> list[ast.stmt]:
    return ast.parse(source.read_text(encoding="utf-8")).body


def _parameters(node: ast.AST, name: str) -> list[str] | None:
    """Those of a function that is, or is a member of, a node."""
    for member in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else (node,):
        if isinstance(member, ast.FunctionDef) and member.name == name:
            given = member.args
            return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return None


def _of_platform() -> tuple[StockBackend, ...]:
    from vllm.platforms import current_platform

    return CPU_BACKENDS if current_platform.is_cpu() else CUDA_BACKENDS


def _recording_backend(stock: StockBackend) -> type:
    module = importlib.import_module(stock.module)
    stock_impl = getattr(module, stock.implementation)
    home: dict[str, Any] = {"__module__": __name__}
    own = dict(home)
    if stock.member == "FLASH_ATTN":
        own["telling"] = staticmethod(functools.partial(_telling, module))
    impl = type(f"Recording{stock.implementation}", (RecordingAttention, stock_impl), own)

    def get_impl_cls() -> type:
        return impl

    members = {**home, "get_impl_cls": staticmethod(get_impl_cls)}
    return type(stock.recording, (getattr(module, stock.backend),), members)
