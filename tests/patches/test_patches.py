"""Patches check what they rely on, are applied all or none, and can be switched off."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.patches import signatures
from vllm_flashtrace.patches._check import PatchError


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, because patches are applied once per process."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_applied_once() -> None:
    done = run(
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm_flashtrace import patches, plugin\n"
        "from vllm.v1.core.kv_cache_manager import KVCacheManager as K\n"
        "first = K.get_computed_blocks; plugin.register()\n"
        "assert patches.applied() and K.get_computed_blocks is first\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B\n"
        "print(B.CPU_ATTN.get_path())"
    )
    assert done.returncode == 0, done.stderr
    assert "vllm_flashtrace.patches.attention_backends.RecordingCPUAttentionBackend" in done.stdout


def test_moved_interface_leaves_vllm_untouched() -> None:
    done = run(
        "from vllm.v1.core.kv_cache_manager import KVCacheManager as K\n"
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as R\n"
        "K.get_computed_blocks = lambda self, other_name: None\n"
        "forward = R._model_forward\n"
        "from vllm_flashtrace import patches, plugin; plugin.register()\n"
        "assert not patches.applied() and R._model_forward is forward\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B\n"
        "assert 'flashtrace' not in B.CPU_ATTN.get_path()\n"
    )
    assert done.returncode == 0, done.stderr
    assert "FlashTrace is off" in done.stderr
    assert "KVCacheManager.get_computed_blocks takes" in done.stderr


def test_kill_switch() -> None:
    done = run(
        "from vllm_flashtrace import patches, plugin; plugin.register()\n"
        "assert not patches.applied()",
        VLLM_FLASHTRACE_DISABLE="1",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "attention_backends",
        "data_parallel",
        "model_load",
        "model_runner_v1",
        "output_handler",
        "prefix_cache",
        "scheduler_share",
        "worker_rpc",
    ],
)
def test_every_patch_explains_itself(module: str) -> None:
    import importlib

    text = importlib.import_module(f"vllm_flashtrace.patches.{module}").__doc__ or ""
    for heading in ("What it changes:", "Why here:", "Tested on: vLLM 0.32.0"):
        assert heading in text


def test_another_version_is_checked_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def moved() -> None:
        raise PatchError("Worker.execute_model does not exist in this vLLM")

    assert signatures.run(iter([("patches.a", moved), ("b", lambda: None)])) == 1
    assert capsys.readouterr().out.splitlines() == [
        "patches.a: PatchError: Worker.execute_model does not exist in this vLLM",
        "2 patches and modules checked, 1 do not fit",
    ]
    found = dict(signatures.checks())
    assert {"patches.model_runner_v2", "vllm_flashtrace.server.openai"} <= found.keys()
    found["patches.prefix_cache"]()
