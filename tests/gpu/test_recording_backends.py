"""The recording CUDA backends are the stock ones in every respect but what they show to a trace."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.gpu.standin import BACKENDS, backend_class, flashinfer_names
from vllm_flashtrace import patches
from vllm_flashtrace.patches import attention_backends
from vllm_flashtrace.patches._check import PatchError
from vllm_flashtrace.worker.observer import current, observing


@pytest.fixture(params=sorted(BACKENDS))
def backends(request: pytest.FixtureRequest) -> Any:
    """(name, recording backend, stock backend) of each registered member."""
    with contextlib.ExitStack() as stack:
        if request.param == "FLASHINFER":
            stack.enter_context(flashinfer_names())
        stock = resolve_obj_by_qualname(AttentionBackendEnum[request.param].value)
        yield request.param, backend_class(request.param), stock


class Observer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, torch.Tensor]] = []
        self.told: list[torch.Tensor | None] = []

    def on_attention(
        self,
        layer_name: str,
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        self.seen.append((layer_name, query))
        self.told.append(lse)

    def on_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        raise AssertionError("attention shows no residual stream")

    def on_residual(self, residual: torch.Tensor) -> None:
        raise AssertionError("attention shows no residual stream")


def test_everything_but_the_implementation_is_inherited(backends: Any) -> None:
    name, recording, stock = backends
    assert set(vars(recording)) - set(vars(type("Empty", (stock,), {}))) == {"get_impl_cls"}
    assert recording.get_name() == name == AttentionBackendEnum[recording.get_name()].name
    assert recording.get_builder_cls() is stock.get_builder_cls()
    assert recording.get_builder_cls()._cudagraph_support == (
        stock.get_builder_cls()._cudagraph_support
    )
    assert recording.forward_includes_kv_cache_update is False
    assert not recording.__abstractmethods__
    for capability in ("supports_sink", "supports_rswa", "supports_non_causal", "is_mla"):
        assert getattr(recording, capability).__func__ is getattr(stock, capability).__func__


def test_the_implementation_adds_only_the_mixin(backends: Any) -> None:
    _, recording, stock = backends
    impl, stock_impl = recording.get_impl_cls(), stock.get_impl_cls()
    assert issubclass(impl, stock_impl) and not impl.__abstractmethods__
    added = {"telling"} if impl.__name__ == "RecordingFlashAttentionImpl" else set()
    assert set(vars(impl)) - set(vars(type("Empty", (stock_impl,), {}))) <= {"__doc__", *added}
    differing = {
        attribute
        for attribute in dir(stock_impl)
        if not attribute.startswith("__")
        and getattr(impl, attribute, None) is not getattr(stock_impl, attribute)
        and getattr(impl, attribute) != getattr(stock_impl, attribute)
    }
    assert differing <= {"forward", "_abc_impl"}


def test_vllm_finds_the_class_by_its_names(backends: Any) -> None:
    """Platforms pass backends on as module and qualified name (``_backend_cls_path``)."""
    name, recording, _ = backends
    module, qualname = recording.full_cls_name()
    assert f"{module}.{qualname}" == BACKENDS[name]
    assert resolve_obj_by_qualname(BACKENDS[name]) is recording


def test_derived_backends_differ_from_the_registered_ones(backends: Any) -> None:
    """vLLM derives backends with other block tables; a trace must be able to tell."""
    from vllm.v1.attention.backend import subclass_attention_backend

    _, recording, _ = backends
    derived = subclass_attention_backend("Chunked", recording, recording.get_builder_cls())
    assert "get_impl_cls" in vars(recording) and "get_impl_cls" not in vars(derived)


def call(impl_class: type, metadata: Any, **kwargs: Any) -> tuple[tuple[Any, ...], torch.Tensor]:
    impl = object.__new__(impl_class)
    layer = SimpleNamespace(layer_name="model.layers.3.self_attn.attn")
    query, key, value, cache = (torch.zeros(1) for _ in range(4))
    arguments = (layer, query, key, value, cache, metadata)
    return arguments, impl.forward(*arguments, **kwargs)  # type: ignore[attr-defined]


def test_stock_forward_gets_the_same_arguments(
    backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recording, stock = backends
    calls: list[Any] = []
    observer = Observer()

    def forward(self: Any, *args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        assert not observer.seen, "the observer comes after the kernel"
        return "result"

    monkeypatch.setattr(stock.get_impl_cls(), "forward", forward)
    options = {"output": torch.zeros(2), "output_scale": None, "output_block_scale": None}
    with observing(observer):
        arguments, result = call(recording.get_impl_cls(), object(), **options)
    assert result == "result"
    [(args, kwargs)] = calls
    assert len(args) == len(arguments)
    assert all(mine is theirs for mine, theirs in zip(arguments, args, strict=True))
    assert kwargs.keys() == options.keys() and kwargs["output"] is options["output"]
    [(layer_name, query)] = observer.seen
    assert layer_name == "model.layers.3.self_attn.attn" and query is arguments[1]


def test_nothing_is_shown_without_observer_or_metadata(
    backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recording, stock = backends
    monkeypatch.setattr(stock.get_impl_cls(), "forward", lambda self, *args, **kwargs: args[5])
    metadata = object()
    assert call(recording.get_impl_cls(), metadata)[1] is metadata
    observer = Observer()
    with observing(observer):
        assert call(recording.get_impl_cls(), None)[1] is None
    assert not observer.seen and current() is None


def test_faults_of_the_stock_kernel_pass(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recording, stock = backends
    fault, observer = RuntimeError("kernel"), Observer()

    def forward(self: Any, *args: Any, **kwargs: Any) -> None:
        raise fault

    monkeypatch.setattr(stock.get_impl_cls(), "forward", forward)
    with observing(observer), pytest.raises(RuntimeError) as raised:
        call(recording.get_impl_cls(), object())
    assert raised.value is fault and not observer.seen and current() is None


def test_registered_over_the_stock_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    attention_backends.check(attention_backends.CUDA_BACKENDS)
    attention_backends.apply(attention_backends.CUDA_BACKENDS)
    found = {name: AttentionBackendEnum[name].get_path() for name in BACKENDS}
    assert found == BACKENDS


def test_another_plugins_backend_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = {AttentionBackendEnum.FLASH_ATTN: "theirs.Backend"}
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", theirs)
    attention_backends.apply(attention_backends.CUDA_BACKENDS)
    assert AttentionBackendEnum.FLASH_ATTN.get_path() == "theirs.Backend"
    assert AttentionBackendEnum.TRITON_ATTN.get_path() == BACKENDS["TRITON_ATTN"]
    assert "theirs.Backend" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Impl:\n    def forward(self, query, layer): ...", "takes"),
        ("class Impl: ...", "does not exist"),
        ("class Other: ...", "does not exist"),
        (None, "does not exist"),
    ],
)
def test_a_moved_kernel_interface_is_refused(
    source: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "moved_backend.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    moved = attention_backends.StockBackend("FLASH_ATTN", "moved_backend", "Backend", "Impl")
    with pytest.raises(PatchError, match=message):
        attention_backends.check([moved])
    assert "moved_backend" not in sys.modules


def test_a_kernel_that_cannot_tell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are read from the source, at its place in vLLM."""
    flash = [stock for stock in attention_backends.CUDA_BACKENDS if stock.member == "FLASH_ATTN"]
    attention_backends.check(flash)
    home = tmp_path / "interface.py"
    monkeypatch.setattr(attention_backends, "_KERNEL_HOME", home)
    with pytest.raises(PatchError, match="flash_attn_varlen_func does not exist"):
        attention_backends.check(flash)
    home.write_text("def flash_attn_varlen_func(q, k, v, max_seqlen_q, softcap): ...")
    with pytest.raises(PatchError, match=r"no parameters .*return_softmax_lse"):
        attention_backends.check(flash)


def test_flash_attention_is_wrapped_while_a_layer_is_observed_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.attention.backends import flash_attn

    def stock(**call: Any) -> Any:
        return "out"

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", stock, raising=False)
    monkeypatch.delitem(vars(attention_backends), "RecordingFlashAttentionBackend", raising=False)
    backend_class("FLASH_ATTN")
    kernel: Any = flash_attn.flash_attn_varlen_func
    assert kernel is stock
    backend: Any = vars(attention_backends)["RecordingFlashAttentionBackend"]
    with contextlib.suppress(ZeroDivisionError), backend.get_impl_cls().telling():
        wrapped: Any = flash_attn.flash_attn_varlen_func
        assert wrapped.__wrapped__ is stock and wrapped(fa_version=3) == "out"
        _ = 1 / 0
    assert flash_attn.flash_attn_varlen_func is stock
    vars(attention_backends).pop("RecordingFlashAttentionBackend")


ATTENTION = ("attention_backends", "mla_attention")


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("cpu", {*ATTENTION, "worker_start"}),
        ("cuda", {*ATTENTION, "worker_start", "model_runner_v2", "graph_capture"}),
        ("rocm", set()),
    ],
)
def test_each_platform_has_its_patches(
    platform: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What they import asks the real platform.
    for name in ("worker_start", "model_runner_v1", "model_runner_v2", "graph_capture"):
        importlib.import_module(f"{patches.__name__}.{name}")
    stand_in = SimpleNamespace(is_cpu=lambda: platform == "cpu", is_cuda=lambda: platform == "cuda")
    monkeypatch.setattr("vllm.platforms._current_platform", stand_in)
    found = {module.__name__.rpartition(".")[2] for module in patches._platform_modules()}
    assert found == expected
    everywhere = {"model_load", "model_runner_v1", "prefix_cache", "worker_rpc"}
    names = {module.__name__.rpartition(".")[2] for module in patches._modules()}
    assert names >= everywhere | expected


# What the process of a CUDA worker does, on a platform that says it is CUDA.
_AS_CUDA = (
    "import vllm.v1.worker.gpu_worker, vllm.v1.worker.gpu_model_runner\n"
    "import vllm.v1.worker.gpu.model_runner as v2\n"
    "from vllm.platforms import current_platform\n"
    "type(current_platform).is_cuda = lambda self: True\n"
    "type(current_platform).is_cpu = lambda self: False\n"
    "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B\n"
    "execute, dispatch = v2.GPUModelRunner.execute_model, v2.dispatch_cg_and_sync_dp\n"
)


def run_as_cuda(code: str) -> subprocess.CompletedProcess[str]:
    """What a process of its own prints, in which vLLM takes its platform for CUDA."""
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    command = [sys.executable, "-c", _AS_CUDA + code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_all_patches_for_cuda_fit_or_leave_everything_untouched() -> None:
    """In a process of its own: first where a method of the V2 runner has moved."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from vllm_flashtrace import patches, plugin\n"
        "stock = v2.GPUModelRunner.prepare_attn\n"
        "v2.GPUModelRunner.prepare_attn = lambda self, other: None\n"
        "plugin.register()\n"
        "assert not patches.applied()\n"
        "assert v2.GPUModelRunner.execute_model is execute\n"
        "assert v2.dispatch_cg_and_sync_dp is dispatch\n"
        "assert 'flashtrace' not in B.FLASH_ATTN.get_path()\n"
        "v2.GPUModelRunner.prepare_attn = stock\n"
        "plugin.register()\n"
        "assert patches.applied()\n"
        "assert v2.GPUModelRunner.execute_model is not execute\n"
        "assert v2.dispatch_cg_and_sync_dp is not dispatch\n"
        "new = set(sys.modules) - before\n"
        "assert not [m for m in new if 'flash_attn' in m or 'flashinfer' in m], new\n"
        "print(B.FLASH_ATTN.get_path(), B.TRITON_ATTN.get_path(), B.FLASHINFER.get_path())\n"
        "assert 'flashtrace' not in B.CPU_ATTN.get_path()\n"
    )
    done = run_as_cuda(code)
    assert done.stdout.count("vllm_flashtrace.patches.attention_backends.Recording") == 3
    assert done.stderr.count("FlashTrace is off") == 1
    assert "GPUModelRunner.prepare_attn (V2) takes" in done.stderr


@pytest.mark.parametrize(
    ("renamed", "reason"),
    [
        ("del W._all_instances", "CUDAGraphWrapper has no _all_instances"),
        ("del v2.GPUModelRunner.capture_model", "GPUModelRunner.capture_model does not exist"),
        ("del G.CUDAGraphEntry", "cannot import name 'CUDAGraphEntry'"),
    ],
)
def test_what_an_option_alone_needs_refuses_the_option_alone(renamed: str, reason: str) -> None:
    """All others are applied, and only who asks for the option hears of it."""
    code = (
        "from vllm.compilation import cuda_graph as G\n"
        "from vllm.compilation.cuda_graph import CUDAGraphWrapper as W\n"
        "from vllm.engine.arg_utils import EngineArgs as E\n"
        f"E.create_engine_config = lambda self: None\n{renamed}\n"
        "from vllm_flashtrace import patches, plugin\n"
        "plugin.register()\n"
        "names = patches.applied_names()\n"
        "assert 'model_runner_v2' in names and 'graph_capture' not in names, names\n"
        "assert v2.GPUModelRunner.execute_model is not execute\n"
        "assert 'flashtrace' in B.FLASH_ATTN.get_path()\n"
        "E(model='m').create_engine_config()\n"
        "print('asked', file=__import__('sys').stderr)\n"
        "options = {'flashtrace': {'trace_graphs': True}}\n"
        "E(model='m', additional_config=options).create_engine_config()\n"
    )
    done = run_as_cuda(code)
    before, after = done.stderr.split("asked")
    assert "FlashTrace" not in before
    assert after.count("the option trace_graphs is refused and has no effect") == 1
    assert reason in after


@pytest.mark.parametrize("module", ["attention_backends", "worker_start", "model_runner_v2"])
def test_every_patch_explains_itself(module: str) -> None:
    text = importlib.import_module(f"vllm_flashtrace.patches.{module}").__doc__ or ""
    for heading in ("What it changes:", "Why here:", "Tested on: vLLM 0.32.0"):
        assert heading in text
