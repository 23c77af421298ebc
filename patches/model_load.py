"""Places taps on a model as soon as it is loaded, before vLLM compiles it.

What it changes: after ``Worker.load_model``, which the CPU worker inherits, ``worker.taps`` places
hooks on the norms of the decoder layers. A model that cannot be traced is left as it is.

Why here: vLLM has no public hook between loading and compiling a model. Hooks placed later are not
part of the compiled code.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.worker.taps import place_taps


def check() -> None:
    """Raises PatchError unless ``load_model`` takes the expected parameters."""
    require_parameters(
        getattr(Worker, "load_model", None), "Worker.load_model", "self", "load_dummy_weights"
    )


def apply() -> None:
    """Wraps ``load_model``."""
    stock = Worker.load_model

    @functools.wraps(stock)
    def load_model(self: Worker, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        try:
            place_taps(self.model_runner.get_model(), self.vllm_config)
        except UnsupportedModelError as error:
            logger.info("FlashTrace: no taps are placed: %s", error.message)
        except Exception:
            logger.exception("FlashTrace: no taps are placed")
        return result

    Worker.load_model = load_model
