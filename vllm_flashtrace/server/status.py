"""``GET /v1/attributions/status``: can this server attribute, and if not, why.

The report comes within :data:`ENGINE_SECONDS` also where the engine does not answer, and says so
then instead of showing old figures. It holds nothing of any request.
"""

from __future__ import annotations

import dataclasses
import time
from importlib import metadata
from typing import Any

import torch
import vllm
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from vllm.platforms import current_platform

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.base.process import lineage
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.tracer import AsyncTracer, served_name

ENGINE_SECONDS = 5.0

router = APIRouter()


class StatusReport:
    """Makes the report of one API server."""

    def __init__(self, tracer: AsyncTracer, unsupported: str | None, model_config: Any) -> None:
        """Starts the clock of ``uptime_seconds``.

        Args:
            tracer: Runs the traces.
            unsupported: Why the served model cannot be traced, None when it can.
            model_config: vLLM's configuration of the model.
        """
        self._tracer = tracer
        self._unsupported = unsupported
        self._model = {
            "name": served_name(model_config),
            "architectures": list(getattr(model_config, "architectures", None) or []),
            "supported": unsupported is None,
            "reason": unsupported,
        }
        self._began = time.monotonic()

    async def make(self) -> dict[str, Any]:
        """The report; ``status`` is ``ready``, ``unsupported_model`` or ``engine_unavailable``."""
        engine, reachable = await self._engine()
        ready = "ready" if self._unsupported is None else "unsupported_model"
        return {
            "object": "flashtrace.status",
            "status": ready if reachable else "engine_unavailable",
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "versions": _versions(),
            "model": self._model,
            "engine": engine,
            "processes": lineage(),
            "limits": limits_in_force(self._tracer.config),
            "load": self._tracer.load,
            "prefix_cache": self._tracer.observer.cache_use.to_status(),
        }

    async def _engine(self) -> tuple[dict[str, Any], bool]:
        engine: dict[str, Any] = {"platform": current_platform.device_type, "workers": []}
        try:
            replies = await self._tracer.worker_reports(ENGINE_SECONDS)
        except TimeoutError:
            engine["error"] = f"no answer within {ENGINE_SECONDS:g} s"
            return engine, False
        except FlashTraceError as error:
            engine["error"] = error.message
            return engine, False
        except Exception as error:
            log_unexpected("the status report", error)
            engine["error"] = type(error).__name__
            return engine, False
        engine["workers"] = [{**reply.pop("worker", {}), **reply} for reply in replies]
        return engine, True


def limits_in_force(config: FlashTraceConfig) -> dict[str, Any]:
    """The server's options and what a request may ask for at most."""
    return {**config.model_dump(), **dataclasses.asdict(config.limits)}


@router.get("/v1/attributions/status")
async def attributions_status(raw_request: Request) -> JSONResponse:
    """Whether this server can attribute: versions, patches, engine, limits and load.

    HTTP 503 when the engine does not answer. A model that cannot be traced is no failure of the
    server, which serves it as ever: HTTP 200 with ``status`` ``unsupported_model``.
    """
    report = await raw_request.app.state.flashtrace_status.make()
    available = report["status"] != "engine_unavailable"
    return JSONResponse(report, status_code=200 if available else 503)


def _versions() -> dict[str, str]:
    return {
        "vllm_flashtrace": metadata.version("vllm-flashtrace"),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }
