"""Options of the plugin, read from ``--additional-config '{"flashtrace": {...}}'``.

Invariant: every key is declared here with its default, and an unknown or ill-typed key stops the
server at start instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_flashtrace.api.request import RequestLimits

SECTION = "flashtrace"


class FlashTraceConfig(BaseModel):
    """Server-side options.

    Attributes:
        exact_fraction: Share of the proximity bound's mass evaluated exactly; 1.0 is exact.
        max_hops: Largest ``hops`` a request may ask for, and where ``"auto"`` stops at the latest.
        auto_threshold: ``"auto"`` stops when less than this share of the mass is on reasoning.
        max_concurrent_traces: Attributions in the engine at once, per API server.
        max_waiting_traces: Attributions that may wait for a place; above it they are ``skipped``.
        max_waiting_seconds: Longest wait for a place; after it they are ``skipped``.
        max_accumulator_mib: Memory that the accumulators of all traces may take together; None for
            a sixteenth of the machine's memory.
        trace_token_share: Part of a step's token budget that trace prefills may take while other
            requests are there.
        trace_timeout_seconds: Longest time one attribution may take before it fails.
        result_ttl_seconds: How long a worker keeps a result that nobody picks up.
        max_stored_attributions: Deferred attributions kept at once, finished or not, by all API
            servers together; above it the oldest finished ones go, and if none is finished the
            new one is ``skipped``.
        max_stored_mib: Size of all finished deferred attributions; above it the oldest go.
        stored_ttl_seconds: How long a finished deferred attribution can be fetched.
        page: Whether ``/flashtrace`` serves the HTML page.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    exact_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    max_hops: int = Field(default=8, ge=0, le=64)
    auto_threshold: float = Field(default=0.05, gt=0.0, lt=1.0)
    max_concurrent_traces: int = Field(default=8, ge=1)
    max_waiting_traces: int = Field(default=256, ge=0)
    max_waiting_seconds: float = Field(default=60.0, gt=0.0)
    max_accumulator_mib: int | None = Field(default=None, gt=0)
    trace_token_share: float = Field(default=0.25, gt=0.0, le=1.0)
    trace_timeout_seconds: float = Field(default=300.0, gt=0.0)
    result_ttl_seconds: float = Field(default=60.0, gt=0.0)
    max_stored_attributions: int = Field(default=1000, ge=1)
    max_stored_mib: int = Field(default=256, ge=1)
    stored_ttl_seconds: float = Field(default=3600.0, gt=0.0)
    page: bool = False

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> FlashTraceConfig:
        """Reads our section of vLLM's ``additional_config``.

        Raises:
            ValueError: The section has an unknown key or a bad value; the message names it.
        """
        section = (
            additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
        )
        if not isinstance(section, Mapping):
            raise ValueError(f"additional_config.{SECTION} must be an object, got {section!r}")
        try:
            return cls.model_validate(dict(section))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join([SECTION, *(str(part) for part in first["loc"])])
            raise ValueError(
                f"additional_config.{name}: {first['msg']} (got {first['input']!r})"
            ) from error

    @property
    def limits(self) -> RequestLimits:
        """What a request's ``flashtrace`` field may ask for."""
        return RequestLimits(max_hops=self.max_hops)
