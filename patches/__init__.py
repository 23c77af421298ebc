"""Every change this package makes to a private vLLM interface, one module each.

Each module has ``check``, which compares the signatures it relies on with the installed vLLM, and
``apply``. All checks run before the first change: if one fails, nothing is patched, and vLLM serves
without attribution; but if that of a patch for one option fails, that option alone is refused. A
wrapper calls the stock function whatever happens in its own code; only ``engine_options`` raises,
to refuse bad options.

| module                  | platform | changes                                         |
| ----------------------- | -------- | ----------------------------------------------- |
| ``attention_backends``  | all      | attention backends, via vLLM's registry         |
| ``data_parallel``       | all      | notes which engine a request is sent to         |
| ``engine_options``      | all      | bad plugin options stop the start               |
| ``external_cache``      | all      | how far a trace request may load from elsewhere |
| ``graph_capture``       | CUDA     | a second set of CUDA graphs, for trace steps    |
| ``image_cache``         | all      | traces leave the engine's image cache alone     |
| ``kept_blocks``         | all      | a trace keeps blocks that layers have freed     |
| ``mla_attention``       | all      | latent attention shows queries and output       |
| ``model_load``          | all      | taps are placed on a model as it is loaded      |
| ``model_runner_v1``     | all      | four methods of the V1 model runner             |
| ``model_runner_v2``     | CUDA     | three methods and a function of the V2 runner   |
| ``output_handler``      | all      | a stopped server's requests in flight end       |
| ``port_owner``          | all      | a stopping server waits for its connections     |
| ``prefix_cache``        | all      | how far a trace request may hit the cache       |
| ``scheduler_share``     | all      | how much of a step trace prefills may take      |
| ``trace_results``       | all      | results of traces go to the API server          |
| ``worker_rpc``          | all      | methods added to the worker base class          |
| ``worker_start``        | all      | kernels are compiled, the model is proven       |
"""

from __future__ import annotations

from types import ModuleType

from vllm_flashtrace.patches._check import PatchError, refused_options

TESTED_VLLM_VERSIONS = ("0.32.0",)

_OPTIONAL = {"graph_capture": "trace_graphs"}
"""Patches that one option needs and nothing else."""

_in_force: list[ModuleType] = []


def apply_all() -> None:
    """Checks every patch against the installed vLLM, then applies them; once per process.

    A patch that one option needs is left out if it does not fit; `refused_options` then has why.

    Raises:
        PatchError: A private interface is not as expected. Nothing has been changed then.
    """
    if _in_force:
        return
    refused_options.clear()
    fitting = []
    for module in _modules():
        try:
            module.check()
        except PatchError as error:
            option = _OPTIONAL.get(_name(module))
            if option is None:
                raise
            refused_options[option] = str(error)
        else:
            fitting.append(module)
    for module in fitting:
        module.apply()
    _in_force.extend(fitting)


def applied_names() -> list[str]:
    """The patches in force in this process."""
    return [_name(module) for module in _in_force]


def applied() -> bool:
    """Whether the patches are in force in this process."""
    return bool(_in_force)


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _modules() -> list[ModuleType]:
    from vllm_flashtrace.patches import (
        data_parallel,
        engine_options,
        external_cache,
        image_cache,
        kept_blocks,
        model_load,
        model_runner_v1,
        output_handler,
        port_owner,
        prefix_cache,
        scheduler_share,
        trace_results,
        worker_rpc,
    )

    return [
        *_platform_modules(),
        data_parallel,
        engine_options,
        external_cache,
        image_cache,
        kept_blocks,
        model_load,
        model_runner_v1,
        output_handler,
        port_owner,
        prefix_cache,
        scheduler_share,
        trace_results,
        worker_rpc,
    ]


def _platform_modules() -> list[ModuleType]:
    """What only one platform needs; elsewhere traces are refused by the worker, by name."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return []
    from vllm_flashtrace.patches import attention_backends, mla_attention, worker_start

    modules = [attention_backends, mla_attention, worker_start]
    if current_platform.is_cuda():
        from vllm_flashtrace.patches import model_runner_v2

        modules.append(model_runner_v2)
        try:
            from vllm_flashtrace.patches import graph_capture
        except ImportError as error:  # It and `worker.trace_graphs` import what may be renamed.
            refused_options[_OPTIONAL["graph_capture"]] = str(error)
        else:
            modules.append(graph_capture)
    return modules
