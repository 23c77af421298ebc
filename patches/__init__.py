"""Every change this package makes to a private vLLM interface, one module each.

Invariant: all patches are applied or none. Each module checks the signatures it relies on; if one
does not fit the installed vLLM, nothing is patched and the server runs without attribution.

| module                  | changes                                        |
| ----------------------- | ---------------------------------------------- |
| ``cpu_attention``       | the CPU attention backend, via vLLM's registry |
| ``model_load``          | taps are placed on a model as it is loaded     |
| ``model_runner_v1``     | two methods of the V1 model runner             |
| ``prefix_cache``        | how far a trace request may hit the cache      |
| ``scheduler_share``     | how much of a step trace prefills may take     |
| ``weight_updates``      | forgets derived weights when weights change    |
| ``worker_rpc``          | two methods added to the worker base class     |
"""

from __future__ import annotations

from types import ModuleType

TESTED_VLLM_VERSIONS = ("0.32.0",)

_applied = False


def apply_all() -> None:
    """Checks every patch against the installed vLLM, then applies them; once per process.

    Raises:
        PatchError: A private interface is not as expected. Nothing has been changed then.
    """
    global _applied
    if _applied:
        return
    modules = _modules()
    for module in modules:
        module.check()
    for module in modules:
        module.apply()
    _applied = True


def applied() -> bool:
    """Whether the patches are in force in this process."""
    return _applied


def _modules() -> list[ModuleType]:
    from vllm_flashtrace.patches import (
        cpu_attention,
        model_load,
        model_runner_v1,
        prefix_cache,
        scheduler_share,
        weight_updates,
        worker_rpc,
    )

    return [
        cpu_attention,
        model_load,
        model_runner_v1,
        prefix_cache,
        scheduler_share,
        weight_updates,
        worker_rpc,
    ]
