"""``VLLM_FLASHTRACE_DISABLE=1``: what vLLM shows without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked

OFF = {"VLLM_PLUGINS": "flashtrace", "VLLM_FLASHTRACE_DISABLE": "1"}
ROOT = Path(__file__).parents[2]


def start(arguments: list[str], **env: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_FLASHTRACE_DISABLE"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**inherited, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shown(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), out + err


@pytest.fixture(scope="module")
def surfaces(
    model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], str]]:
    script = ["-m", "tests.server.surface", model_path]
    running = {
        "stock": start(script, VLLM_PLUGINS="none"),
        "off": start(script, **OFF),
    }
    done = {name: shown(process) for name, process in running.items()}
    log = tmp_path_factory.mktemp("surface") / "on"
    on = forked(script, log, {**os.environ, "VLLM_PLUGINS": "flashtrace"})
    assert on.wait(timeout=240) == 0, log.read_text()
    return {**done, "on": (json.loads(log.read_text().splitlines()[-1]), "")}


@pytest.mark.parametrize("part", ["answers", "metrics", "routes", "handlers"])
def test_switched_off_nothing_differs_from_vllm(surfaces, part):
    assert surfaces["off"][0][part] == surfaces["stock"][0][part]


@pytest.mark.parametrize("part", ["answers", "metrics", "routes", "handlers"])
def test_switched_on_the_same_comparison_sees_a_difference(surfaces, part):
    assert surfaces["on"][0][part] != surfaces["stock"][0][part]


def test_vllm_does_not_warn_of_the_switch(surfaces):
    assert "Unknown vLLM environment variable" not in surfaces["off"][1]


def test_the_switch_passes_vllms_own_check_of_variables(model_path):
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={model_path!r}, fail_on_environ_validation=True).create_engine_config()"
    )
    allowed = start(["-c", code], **OFF)
    _, error = allowed.communicate(timeout=120)
    assert allowed.returncode == 0, error
