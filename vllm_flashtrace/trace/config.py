"""Options of the plugin, read from ``--additional-config '{"flashtrace": {...}}'``.

Each option is a field of `FlashTraceConfig` with its default, range and description; the table in
the documentation is made of them. An unknown key or a value of the wrong type stops the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_flashtrace.api.request import RequestLimits

SECTION = "flashtrace"

_PART_OF_SEQUENCES, _FEWEST_TRACES, _MOST_TRACES = 4, 8, 64


class FlashTraceConfig(BaseModel):
    """Server-side options; ``FlashTraceConfig.model_fields[name].description`` says what each does.

    Offline (`FlashTrace`) the options about waiting, storing and the page have no effect.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    exact_fraction: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the proximity bounds' mass that is evaluated exactly; below 1.0 the "
        "remaining (token, head) pairs count with a value between their proximity and its bound.",
    )
    max_hops: int = Field(
        default=8,
        ge=0,
        le=64,
        description='Largest `hops` a request may ask for, and where `"auto"` stops at the latest.',
    )
    auto_threshold: float = Field(
        default=0.05,
        gt=0.0,
        lt=1.0,
        description='`"auto"` stops when less than this share of the mass is left on reasoning.',
    )
    max_concurrent_traces: int | None = Field(
        default=None,
        ge=1,
        description="Attributions that one API server has in the engine at once, as far as their "
        "accumulators have room; `null` is a quarter of the engine's `--max-num-seqs`, at least 8 "
        "and at most 64.",
    )
    max_waiting_traces: int = Field(
        default=256,
        ge=0,
        description="Attributions that may wait for a place in the engine, per API server; further "
        "ones are `skipped` with code `overloaded`.",
    )
    max_waiting_seconds: float = Field(
        default=60.0,
        gt=0.0,
        description="Seconds that an attribution waits for a place in the engine before it is "
        "`skipped` with code `overloaded`.",
    )
    max_accumulator_mib: int | None = Field(
        default=None,
        gt=0,
        description="MiB per worker that the accumulators of all traces may take together; `null` "
        "is a sixteenth of the machine's memory on the CPU. On a GPU it is half of the memory that "
        "vLLM leaves free, which is also the most it can be.",
    )
    max_layer_scores: int = Field(
        default=2_000_000,
        ge=1,
        description='Most numbers that `include: ["layers"]` may ask a server for, layers times '
        "prompt tokens; each takes about 22 bytes of the response.",
    )
    max_attention_sums: int = Field(
        default=16_000_000,
        ge=1,
        description='Most numbers that `include: ["attention"]` may ask a server for, layers times '
        "query heads times tokens; each takes about 2.7 bytes of the response.",
    )
    max_verify: int = Field(
        default=8,
        ge=0,
        le=64,
        description="Largest `verify` a request may ask for; 0 turns verification off.",
    )
    max_verify_requests: int = Field(
        default=128,
        ge=2,
        description="Engine requests that one attribution's verification may take; what needs "
        "more has a `reason` in place of numbers.",
    )
    max_result_mib: int = Field(
        default=512,
        ge=1,
        description="MiB that large results (scores per layer or hop, sums of attention, "
        "`top_k: null` over a long prompt) may take of one API server together, from before the "
        "trace until the last byte is sent or stored; above it further ones wait like those for a "
        "place in the engine. Images of prompts may take as much again.",
    )
    trace_token_share: float = Field(
        default=0.25,
        gt=0.0,
        le=1.0,
        description="Share of a step's token budget that trace prefills may take together while "
        "other requests are in the scheduler.",
    )
    trace_graphs: bool = Field(
        default=False,
        description="On a GPU: whether piecewise CUDA graphs are captured a second time at the "
        "start, for steps that record traces; without them such steps run as compiled code. Not "
        "yet run on a GPU.",
    )
    trace_timeout_seconds: float = Field(
        default=300.0,
        gt=0.0,
        description="Seconds that one attribution may take, waiting included, before it is "
        "`failed` with code `timeout`.",
    )
    result_ttl_seconds: float = Field(
        default=60.0,
        gt=0.0,
        description="Seconds that a worker keeps a finished trace that the API server has not "
        "picked up.",
    )
    max_stored_attributions: int = Field(
        default=1000,
        ge=1,
        description="Deferred attributions, finished or not, that all API servers keep together; "
        "above it the oldest finished ones are dropped, and if none is finished the new one is "
        "`skipped`.",
    )
    max_stored_mib: int = Field(
        default=256,
        ge=1,
        description="MiB that all finished deferred attributions may take; above it the oldest are "
        "dropped.",
    )
    stored_ttl_seconds: float = Field(
        default=3600.0,
        gt=0.0,
        description="Seconds that a finished deferred attribution can be fetched.",
    )
    probe: bool = Field(
        default=True,
        description="Whether each worker proves at the start, on a probe of up to 64 tokens, that "
        "the model is traced exactly; if not, only architectures that tests compare with an oracle "
        "are traced.",
    )
    probe_limit: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Largest relative error of the probe with which a model is traced; `null` goes "
        "by the model's type: 1e-4 in float32 (0.01 on a GPU), 0.005 in float16, 0.03 in bfloat16, "
        "0.1 with an fp8 KV cache or where output projections round their inputs to eight bits.",
    )
    partial_coverage: bool = Field(
        default=False,
        description="Whether a model some of whose layers cannot be traced (linear attention, "
        "state space, or attention of another kind) is traced through its other layers alone. "
        "Every result then says which these are, as `coverage`; without the option such a model is "
        "not traced.",
    )
    heads: str | None = Field(
        default=None,
        min_length=1,
        description="Path of a file of weights of attention heads that `vllm-flashtrace fit-heads` "
        "has written for the served model, on every machine with workers; requests may then have "
        "`heads`. The server does not start with one that is malformed or of another model.",
    )
    page: bool = Field(default=False, description="Whether `/flashtrace` serves the HTML page.")

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
            message = f"additional_config.{name}: {first['msg']} (got {first['input']!r})"
            if first["type"] == "extra_forbidden":
                message += f"; allowed: {', '.join(cls.model_fields)}"
            raise ValueError(message) from error

    def concurrent_traces(self, vllm_config: Any) -> int:
        """`max_concurrent_traces`, or the default for an engine with this ``VllmConfig``."""
        if self.max_concurrent_traces is not None:
            return self.max_concurrent_traces
        sequences: int = vllm_config.scheduler_config.max_num_seqs
        return max(_FEWEST_TRACES, min(sequences // _PART_OF_SEQUENCES, _MOST_TRACES))

    @property
    def limits(self) -> RequestLimits:
        """What a request's ``flashtrace`` field may ask for."""
        return RequestLimits(
            max_hops=self.max_hops,
            max_verify=self.max_verify,
            max_verify_requests=self.max_verify_requests,
            heads=self.heads is not None,
        )
