"""Refuses bad plugin options before anything starts.

What it changes: ``EngineArgs.create_engine_config`` first reads the ``flashtrace`` section of
``additional_config`` and raises ValueError if it is bad, or if its file of weights of heads is not
one of the model's. It says in one line which options have no effect, because what they need does
not fit this vLLM. vLLM calls it before it starts an engine in every layout: several API servers,
data parallel, headless, offline.

Why here: vLLM passes ``additional_config`` on unread, and a plugin sees it only when the engine is
up. A misspelt key would cost a model load.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.patches._check import PatchError, refused_options, require_parameters
from vllm_flashtrace.trace.config import SECTION, FlashTraceConfig
from vllm_flashtrace.trace.heads_file import HeadsFileError, served_heads


def check() -> None:
    """Raises PatchError unless the method fits and asynchronous engines inherit it."""
    method = getattr(EngineArgs, "create_engine_config", None)
    require_parameters(method, "EngineArgs.create_engine_config", "self")
    if "additional_config" not in EngineArgs.__dataclass_fields__:
        raise PatchError("EngineArgs has no additional_config")
    if AsyncEngineArgs.create_engine_config is not method:
        raise PatchError("AsyncEngineArgs.create_engine_config is not EngineArgs'")


def apply() -> None:
    """Wraps the method."""
    stock = EngineArgs.create_engine_config

    @functools.wraps(stock)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        options = FlashTraceConfig.from_additional_config(self.additional_config)
        for option, reason in refused_options.items():
            if getattr(options, option):
                logger.error(
                    "FlashTrace: the option %s is refused and has no effect: it does not fit this "
                    "vLLM: %s",
                    option,
                    reason,
                )
        config = stock(self, *args, **kwargs)
        try:
            served_heads(options.heads, config)
        except HeadsFileError as error:
            raise ValueError(f"additional_config.{SECTION}.heads: {error}") from error
        return config

    EngineArgs.create_engine_config = create_engine_config
