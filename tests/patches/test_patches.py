"""Patches check what they rely on, are applied all or none, and can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.patches import signatures
from vllm_flashtrace.patches._check import PatchError

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs code in a process of its own, because patches are applied once per process."""

    def run(code: str, **env: str) -> tuple[int, str]:
        command = ["-c", f"import vllm_flashtrace.patches as p; assert not p.applied()\n{code}"]
        return run_forked(command, tmp_path / "log", 240, VLLM_TARGET_DEVICE="cpu", **env)

    return run


def test_applied_once(run: Run) -> None:
    status, output = run(
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm_flashtrace import patches, plugin\n"
        "from vllm.v1.core.kv_cache_manager import KVCacheManager as K\n"
        "first = K.get_computed_blocks; plugin.register()\n"
        "assert patches.applied() and K.get_computed_blocks is first\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B\n"
        "print(B.CPU_ATTN.get_path())"
    )
    assert status == 0, output
    assert "vllm_flashtrace.patches.attention_backends.RecordingCPUAttentionBackend" in output


def test_moved_interface_leaves_vllm_untouched(run: Run) -> None:
    status, output = run(
        "from vllm.v1.core.kv_cache_manager import KVCacheManager as K\n"
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as R\n"
        "K.get_computed_blocks = lambda self, other_name: None\n"
        "forward = R._model_forward\n"
        "from vllm_flashtrace import patches, plugin; plugin.register()\n"
        "assert not patches.applied() and R._model_forward is forward\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B\n"
        "assert 'flashtrace' not in B.CPU_ATTN.get_path()\n"
    )
    assert status == 0, output
    assert "FlashTrace is off" in output
    assert "KVCacheManager.get_computed_blocks takes" in output


def test_kill_switch(run: Run) -> None:
    status, output = run(
        "from vllm_flashtrace import patches, plugin; plugin.register()\n"
        "assert not patches.applied()",
        VLLM_FLASHTRACE_DISABLE="1",
    )
    assert status == 0, output


@pytest.mark.parametrize(
    "module",
    [
        "attention_backends",
        "data_parallel",
        "external_cache",
        "image_cache",
        "model_load",
        "model_runner_v1",
        "output_handler",
        "port_owner",
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
