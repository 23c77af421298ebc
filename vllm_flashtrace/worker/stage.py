"""Which layers of the model are on this worker: all, or those of its pipeline stage.

Invariant: a stage is what vLLM's own model says it runs, never guessed from what was found.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.trace.model_part import ModelPart


def stage_layers(model: nn.Module, config: VllmConfig) -> range:
    """The layers that this worker runs, as indices in the whole model.

    Raises:
        UnsupportedModelError: The model does not tell.
    """
    if config.parallel_config.pipeline_parallel_size == 1:
        return range(config.model_config.get_total_num_hidden_layers())
    inner: Any = getattr(model, "model", None)
    try:
        return range(inner.start_layer, inner.end_layer)
    except AttributeError:
        raise UnsupportedModelError(
            "traces are not supported with pipeline parallelism of a model that does not tell its "
            "stage's layers"
        ) from None


def is_last_stage(config: VllmConfig) -> bool:
    """Whether the model's last layer is on this worker."""
    return config.parallel_config.pipeline_parallel_size == 1 or get_pp_group().is_last_rank


def model_part(model: nn.Module, config: VllmConfig) -> ModelPart:
    """What of the model is on this worker."""
    layers = stage_layers(model, config)
    return ModelPart(
        first_layer=layers.start,
        num_layers=len(layers),
        model_layers=config.model_config.get_total_num_hidden_layers(),
        ranks=config.parallel_config.tensor_parallel_size,
    )
