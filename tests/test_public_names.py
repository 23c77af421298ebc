"""The names that users rely on. A name may be added here; one that goes is a breaking change."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "Attribution",
    "FlashTrace",
    "FlashTraceError",
    "InvalidRequestError",
    "TraceError",
    "UnsupportedModelError",
    "flashtrace_dataset",
}
ENTRY_POINTS = {
    "vllm.general_plugins": "flashtrace",
    "vllm.endpoint_plugins": "flashtrace",
}
COMMANDS = {
    "serve": set(),
    "trace": {
        "--model",
        "--prompt-file",
        "--completion-file",
        "--json",
        "--html",
        "--hops",
        "--target-text",
        "--top-k",
        "--max-tokens",
        "--system",
        "--chat",
        "--max-model-len",
        "--full",
    },
    "demo": {"--model-path", "--html", "--full"},
    "batch": {
        "--input",
        "--output",
        "--model",
        "--replicas",
        "--flashtrace",
        "--batch-size",
        "--max-tokens",
    },
    "deploy": {"--replicas", "--min-replicas", "--max-replicas"},
    "fit-heads": {
        "--model",
        "--data",
        "--out",
        "--ablations",
        "--ridge",
        "--limit",
        "--dtype",
        "--seed",
        "--work",
        "--json",
        "--max-tokens",
        "--max-model-len",
    },
}
FIELD_KEYS = {
    "target",
    "hops",
    "targets",
    "sources",
    "citations",
    "guard",
    "reasoning",
    "recurse_over",
    "rows",
    "heads",
    "weighting",
    "skip_tokens",
    "top_k",
    "scope",
    "include",
    "verify",
    "preset",
    "mode",
}
SERVER_OPTIONS = {
    "exact_fraction",
    "max_hops",
    "auto_threshold",
    "max_concurrent_traces",
    "max_waiting_traces",
    "max_waiting_seconds",
    "max_accumulator_mib",
    "max_layer_scores",
    "max_attention_sums",
    "max_verify",
    "max_verify_requests",
    "max_result_mib",
    "trace_graphs",
    "trace_token_share",
    "trace_timeout_seconds",
    "result_ttl_seconds",
    "max_stored_attributions",
    "max_stored_mib",
    "stored_ttl_seconds",
    "heads",
    "page",
}
ROUTES = {
    ("POST", "/v1/attributions"),
    ("GET", "/v1/attributions/status"),
    ("GET", "/v1/attributions/{attribution_id}"),
    ("GET", "/v1/attributions/{attribution_id}/attention"),
    ("DELETE", "/v1/attributions/{attribution_id}"),
    ("GET", "/flashtrace"),
}
METRICS = {
    "flashtrace_requests",
    "flashtrace_phase_seconds",
    "flashtrace_recomputed_tokens",
    "flashtrace_cached_tokens",
    "flashtrace_prefix_cache_queries",
    "flashtrace_prefix_cache_hits",
    "flashtrace_prefix_cache_misses",
    "flashtrace_guarded_arguments",
    "flashtrace_flagged_arguments",
    "flashtrace_traces_waiting",
    "flashtrace_traces_running",
    "flashtrace_accumulator_bytes",
    "flashtrace_accumulator_budget_bytes",
    "flashtrace_store_entries",
}
ERROR_CODES = {
    "aborted",
    "argument_not_found",
    "assistant_not_located",
    "bad_scores",
    "batch_failed",
    "damaged_part",
    "deploy_failed",
    "empty_completion",
    "empty_target",
    "engine_dead",
    "engine_failed",
    "forged_spec",
    "internal_error",
    "invalid_flashtrace",
    "mass_imbalance",
    "no_layer_scores",
    "nothing_generated",
    "output_folder",
    "overloaded",
    "ray_unavailable",
    "reasoning_not_found",
    "recording_failed",
    "recording_gap",
    "recording_incomplete",
    "regex_timeout",
    "result_missing",
    "result_too_large",
    "server_lost",
    "source_not_found",
    "sources_overlap",
    "span_out_of_range",
    "target_beyond_context",
    "target_not_found",
    "timeout",
    "too_many_attention_sums",
    "too_many_layer_scores",
    "too_many_targets",
    "tool_call_not_found",
    "unsupported_input",
    "unsupported_model",
    "weights_changed",
}


def test_names_of_the_package() -> None:
    import vllm_flashtrace

    assert set(vllm_flashtrace.__all__) == PUBLIC
    for name in PUBLIC - {"flashtrace_dataset"}:  # That one imports Ray.
        assert getattr(vllm_flashtrace, name).__name__ == name


def test_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["scripts"]) == {"vllm-flashtrace"}
    assert {group: name for group, (name,) in project["entry-points"].items()} == ENTRY_POINTS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_options(command: str) -> None:
    from vllm_flashtrace.commands.cli import app

    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    options = {name for param in commands[command].params for name in param.opts}
    assert options >= COMMANDS[command]


def test_keys_of_the_request_field() -> None:
    from vllm_flashtrace.api.request import FlashTraceRequest

    assert set(FlashTraceRequest.model_fields) >= FIELD_KEYS


def test_options_of_the_server() -> None:
    from vllm_flashtrace.trace.config import FlashTraceConfig

    assert set(FlashTraceConfig.model_fields) >= SERVER_OPTIONS


def test_the_default_fraction_is_the_maths_own() -> None:
    """The options repeat it as a literal, so that reading them needs no torch."""
    from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
    from vllm_flashtrace.trace.config import FlashTraceConfig

    assert FlashTraceConfig().exact_fraction == DEFAULT_EXACT_FRACTION


def test_routes() -> None:
    from vllm_flashtrace.server import attributions, status
    from vllm_flashtrace.server.page import page_router

    routers = (attributions.router, status.router, page_router())
    found = {
        (method, route.path)
        for router in routers
        for route in router.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    assert found >= ROUTES


def test_metrics() -> None:
    from prometheus_client import REGISTRY

    from vllm_flashtrace.trace.metrics import TraceMetrics

    TraceMetrics("names")
    assert {family.name for family in REGISTRY.collect()} >= METRICS


def test_error_codes() -> None:
    assert set(_codes()) == ERROR_CODES


def _codes() -> Iterator[str]:
    """Every code that the source gives to an error."""
    errors = ("TraceError", "FlashTraceError")
    for path in sorted((ROOT / "vllm_flashtrace").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                given = [k.value for k in node.keywords if k.arg == "code"]
                if name in errors or (name == "__init__" and len(node.args) == 2):
                    given += node.args[:1]
                yield from (
                    value.value
                    for value in given
                    if isinstance(value, ast.Constant) and isinstance(value.value, str)
                )
            elif isinstance(node, ast.arguments):
                for argument, default in zip(
                    reversed(node.args), reversed(node.defaults), strict=False
                ):
                    if argument.arg == "code" and isinstance(default, ast.Constant):
                        yield default.value
