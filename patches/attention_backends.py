"""Registers CUDA attention backends that let a trace see each layer's queries.

What it changes: vLLM's registry entries for ``FLASH_ATTN``, ``TRITON_ATTN`` and ``FLASHINFER`` name
subclasses of the stock backends, with the implementation of :mod:`.recording_attention`. An entry
that another plugin has overridden already is left alone; traces are then refused where that
backend is used.

Why here: ``register_backend`` is vLLM's public extension point and overriding a member keeps vLLM's
own backend selection. The method signature of ``forward`` is private. Entries are paths, so that
FlashAttention and FlashInfer are imported only where vLLM itself does so; for the same reason the
signatures are checked in the source and not on the classes.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
from pathlib import Path

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm_flashtrace.patches._check import PatchError
from vllm_flashtrace.patches.recording_attention import FORWARD_PARAMETERS

logger = logging.getLogger("vllm.flashtrace")

_PACKAGE = __name__.rpartition(".")[0]

# Member, the module of the stock backend, its implementation class, and the recording backend.
_BACKENDS = (
    (
        "FLASH_ATTN",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl",
        f"{_PACKAGE}.recording_flash_attn.RecordingFlashAttentionBackend",
    ),
    (
        "TRITON_ATTN",
        "vllm.v1.attention.backends.triton_attn",
        "TritonAttentionImpl",
        f"{_PACKAGE}.recording_triton_attn.RecordingTritonAttentionBackend",
    ),
    (
        "FLASHINFER",
        "vllm.v1.attention.backends.flashinfer",
        "FlashInferImpl",
        f"{_PACKAGE}.recording_flashinfer.RecordingFlashInferBackend",
    ),
)


def check() -> None:
    """Raises PatchError unless every stock ``forward`` has the expected parameters."""
    for member, module, implementation, _ in _BACKENDS:
        if member not in AttentionBackendEnum.__members__:
            raise PatchError(f"AttentionBackendEnum.{member} does not exist in this vLLM")
        found = method_parameters(module, implementation, "forward")
        if tuple(found[: len(FORWARD_PARAMETERS)]) != FORWARD_PARAMETERS:
            raise PatchError(
                f"{implementation}.forward takes {found}, expected it to begin with "
                f"{list(FORWARD_PARAMETERS)}"
            )


def apply() -> None:
    """Registers the recording backends over the stock ones."""
    for name, _, _, path in _BACKENDS:
        member = AttentionBackendEnum[name]
        if member.is_overridden():
            logger.warning("FlashTrace: %s is %s already; left alone", name, member.get_path())
        else:
            register_backend(member, path)


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
