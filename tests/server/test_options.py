"""A bad option of ours stops every kind of start with one clear line, before any engine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from tests.forked import run_forked
from tests.server.live_server import OURS, STOCK
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.heads_file import HeadsFile, ModelFacts

LINE = (
    "additional_config.flashtrace.hop_limit: Extra inputs are not permitted (got 3); allowed: "
    + ", ".join(FlashTraceConfig.model_fields)
)
BAD = {"flashtrace": {"hop_limit": 3}}


def start(program: list[str], model: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, model, "--additional-config", json.dumps(BAD), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("layout", [[], ["--api-server-count=2"]])
def test_our_command_ends_with_the_line_alone(model_path, layout):
    done = start(OURS, model_path, *layout)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"vllm-flashtrace serve: {LINE}"
    assert "Traceback" not in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


def test_vllms_own_command_stops_before_the_engine(model_path, tmp_path):
    command = [*STOCK, model_path, "--additional-config", json.dumps(BAD)]
    status, output = run_forked(command, tmp_path / "log", 120, VLLM_PLUGINS="flashtrace")
    assert status == 1
    assert output.rstrip().endswith(f"ValueError: {LINE}")
    assert "EngineCore" not in output


@pytest.mark.parametrize("kind", [EngineArgs, AsyncEngineArgs])
@pytest.mark.parametrize("options", [{}, {"headless": True}])
def test_every_layout_makes_its_configuration_through_the_check(plugins, model_path, kind, options):
    arguments = kind(model=model_path, additional_config=BAD)
    with pytest.raises(ValueError, match=r"flashtrace\.hop_limit"):
        arguments.create_engine_config(**options)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"flashtrace": 5}, "must be an object, got 5"),
        ({"flashtrace": {"max_hops": "3"}}, "flashtrace.max_hops"),
        ({"flashtrace": {"max_waiting_seconds": float("inf")}}, "flashtrace.max_waiting_seconds"),
        ({"flashtrace": {"trace_token_share": 0}}, "flashtrace.trace_token_share"),
        *(({"flashtrace": {"page": bad}}, "flashtrace.page") for bad in (1, "yes", None)),
    ],
)
def test_a_bad_value_is_named(plugins, model_path, value, words):
    with pytest.raises(ValueError, match="additional_config") as error:
        EngineArgs(model=model_path, additional_config=value).create_engine_config()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (None, "cannot be read"),
        (ModelFacts("LlamaForCausalLM", 30, 8, 576), "heads 8, not 9"),
        (ModelFacts("Qwen3ForCausalLM", 30, 9, 576), "architecture Qwen3ForCausalLM, not Llama"),
    ],
)
def test_a_file_of_heads_of_another_model_stops_the_start(
    plugins, model_path, tmp_path, facts, reason
):
    path = tmp_path / "heads.safetensors"
    if facts is not None:
        weights = torch.ones(facts.layers, facts.heads)
        HeadsFile(weights, facts, examples=1, ablations=8).write(path)
    arguments = EngineArgs(model=model_path, additional_config={"flashtrace": {"heads": str(path)}})
    with pytest.raises(ValueError, match=r"^additional_config\.flashtrace\.heads: ") as error:
        arguments.create_engine_config()
    assert reason in str(error.value) and str(path) in str(error.value)
