"""``VLLM_FLASHTRACE_DISABLE=1``: what vLLM shows without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_forked, without_workers

OFF = {"VLLM_PLUGINS": "flashtrace", "VLLM_FLASHTRACE_DISABLE": "1"}
ROOT = Path(__file__).parents[3]


def start(arguments: list[str], **env: str) -> subprocess.Popen[str]:
    inherited = without_workers(os.environ)
    inherited.pop("VLLM_FLASHTRACE_DISABLE", None)
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
    off = start(script, **OFF)  # Imports everything itself, as a server does.
    done = {}
    for name, plugins in (("stock", "none"), ("on", "flashtrace")):
        log = tmp_path_factory.mktemp("surface") / name
        status, output = run_forked(script, log, 240, VLLM_PLUGINS=plugins)
        assert status == 0, output
        done[name] = json.loads(output.splitlines()[-1]), output
    return {**done, "off": shown(off)}


@pytest.mark.parametrize("part", ["answers", "metrics", "routes", "handlers"])
def test_switched_off_nothing_differs_from_vllm(surfaces, part):
    assert surfaces["off"][0][part] == surfaces["stock"][0][part]


@pytest.mark.parametrize("part", ["answers", "metrics", "routes", "handlers"])
def test_switched_on_the_same_comparison_sees_a_difference(surfaces, part):
    assert surfaces["on"][0][part] != surfaces["stock"][0][part]


def test_vllm_does_not_warn_of_the_switch(surfaces):
    assert "Unknown vLLM environment variable" not in surfaces["off"][1]


def test_the_switch_passes_vllms_own_check_of_variables(surfaces):
    """All of these applications were made with the option that refuses a variable of no meaning."""
    assert surfaces["off"][0]["answers"]
