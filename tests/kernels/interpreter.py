"""Triton kernels on the CPU, interpreted, for the time of a ``with`` block and no longer.

Invariant: after the block every Triton function of the process is the one it was before, and no
environment variable was touched, so engines in other tests and their child processes see nothing.
``TRITON_INTERPRET=1`` would have to be set before Triton's own functions are imported, which in a
test run that also starts engines is too early and too wide.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction

import vllm_flashtrace.kernels

PACKAGE = vllm_flashtrace.kernels


@contextmanager
def interpreted(*others: ModuleType) -> Iterator[None]:
    """Interprets the kernels of `vllm_flashtrace.kernels` and what of Triton's library they call.

    Args:
        *others: Further modules whose Triton functions are interpreted, such as a test's own.
    """
    functions: dict[int, InterpretedFunction] = {}  # a hash of the function itself parses it
    replaced: list[tuple[object, str, Any]] = []

    def replace(place: object, name: str, replacement: object) -> None:
        replaced.append((place, name, vars(place).get(name)))
        setattr(place, name, replacement)

    # Kernels compute with infinities and NaN on purpose; a GPU does not warn either.
    with triton.knobs.runtime.scope(), np.errstate(all="ignore"):
        triton.knobs.runtime.interpret = True
        for place in (*_library(), *kernel_modules(), *others):
            for name, member in list(vars(place).items()):
                if isinstance(member, JITFunction):
                    functions.setdefault(id(member), InterpretedFunction(member.fn))
                    replace(place, name, functions[id(member)])
        replace(type(interpreter_builder), "create_dot", _dot)
        before = [(place, dict(vars(place))) for place in _patched_by_triton()]
        try:
            yield
        finally:
            for place, members in before:
                _restore(place, members)
            for place, name, member in replaced:
                setattr(place, name, member)


def kernel_modules() -> list[ModuleType]:
    """Every module of the kernel package that holds Triton code."""
    found = pkgutil.iter_modules(PACKAGE.__path__)
    names = [module.name for module in found if module.name.startswith("triton_")]
    return [importlib.import_module(f"{PACKAGE.__name__}.{name}") for name in sorted(names)]


_STOCK_DOT = type(interpreter_builder).create_dot


def _dot(builder: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    """The interpreter keeps bfloat16 as integers and would multiply those."""
    return _STOCK_DOT(builder, _widened(a), _widened(b), *rest)


def _widened(factor: TensorHandle) -> TensorHandle:
    if factor.dtype.scalar != tl.bfloat16:
        return factor
    bits = factor.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _patched_by_triton() -> list[object]:
    """What Triton's interpreter changes; of nested calls it leaves changes behind."""
    modules = [m for name, m in sys.modules.items() if name.startswith("triton.language")]
    classes = [tl.tensor, tl.dtype, tl.core.condition, tl.core.tensor_descriptor_base]
    return [*modules, *classes]


def _restore(place: object, members: dict[str, object]) -> None:
    # Names that are new stay: functions that were interpreted once refer to them.
    for name, value in members.items():
        if vars(place).get(name) is not value:
            setattr(place, name, value)


def _library() -> list[object]:
    modules = [m for name, m in sys.modules.items() if name.startswith("triton.language")]
    return [*modules, tl.tensor]
