"""Weights that change by whatever way, on a backend that computes with them as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.harness import relative_l1
from tests.gpu.v2_engine import LIMIT, V2Engine, assert_exact, traced
from vllm_flashtrace.base.errors import TraceError

OUT = "model.layers.1.self_attn.o_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.2.post_attention_layernorm.weight"


def parameter_of(model: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter]:
    module = model.get_submodule(name.removesuffix(".weight"))
    return module, module._parameters["weight"]  # type: ignore[return-value]


def by_load_weights(model: Any, name: str, new: Tensor) -> None:
    """As a worker extension of a training framework does."""
    model.load_weights([(name, new)])


def by_copy_into_data(model: Any, name: str, new: Tensor) -> None:
    """No counter of PyTorch's sees it."""
    parameter = parameter_of(model, name)[1]
    version = parameter._version
    parameter.data.copy_(new)
    assert parameter._version == version


def by_operation_in_place(model: Any, name: str, new: Tensor) -> None:
    """As LoRA adapters are merged."""
    parameter = parameter_of(model, name)[1]
    with torch.no_grad():
        parameter.add_(new - parameter)


def in_inference_mode(model: Any, name: str, new: Tensor) -> None:
    with torch.inference_mode():
        parameter_of(model, name)[1].copy_(new)


def by_new_data(model: Any, name: str, new: Tensor) -> None:
    parameter_of(model, name)[1].data = new.clone()


def by_new_parameter(model: Any, name: str, new: Tensor) -> None:
    module, _ = parameter_of(model, name)
    module.weight = nn.Parameter(new.clone(), requires_grad=False)


def by_new_module(model: Any, name: str, new: Tensor) -> None:
    module, old = parameter_of(model, name)
    other = copy.deepcopy(module, {id(old): nn.Parameter(new.clone(), requires_grad=False)})
    parent, _, child = name.removesuffix(".weight").rpartition(".")
    model.get_submodule(parent)._modules[child] = other


def by_memory_of_others(model: Any, name: str, new: Tensor) -> None:
    """Somebody who shares the memory, as over CUDA IPC, writes to it; vLLM is not called."""
    parameter_of(model, name)[1].detach().numpy()[...] = new.numpy()


def by_sleep(model: Any, name: str, new: Tensor) -> None:
    """Sleep of level 2 leaves anything in the memory; then the weights are loaded again."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    by_load_weights(model, name, new)


WAYS: list[Callable[[Any, str, Tensor], None]] = [
    by_load_weights,
    by_copy_into_data,
    by_operation_in_place,
    in_inference_mode,
    by_new_data,
    by_new_parameter,
    by_new_module,
    by_memory_of_others,
    by_sleep,
]


@pytest.mark.parametrize("name", [OUT, EMBEDDING, NORM])
@pytest.mark.parametrize("way", WAYS)
def test_a_change(engine: V2Engine, float64_llama: Any, way: Any, name: str) -> None:
    """A trace that it falls into fails by name; later ones are those of the new weights."""
    before, within, after = traced(60, (40, 60)), traced(60, (40, 60)), traced(60, (40, 60))
    engine.step({"before": 60}, new={"before": before.new})
    old = assert_exact(engine, before, float64_llama)
    engine.step({"within": 30}, new={"within": within.new}, finished=["before"])

    changed = copy.deepcopy(float64_llama)
    weight = changed.get_parameter(name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data.add_(noise * weight.std())
    way(engine.model, name, weight.detach().float())

    engine.step({"within": 30})
    with pytest.raises(TraceError) as caught:
        engine.report(within)
    replaced = way is by_new_module and name == OUT
    assert caught.value.code == ("unsupported_model" if replaced else "weights_changed")

    engine.step({"after": 60}, new={"after": after.new}, finished=["within"])
    if replaced:
        with pytest.raises(TraceError, match="an output projection that was replaced"):
            engine.report(after)
        return
    new = assert_exact(engine, after, changed)
    assert relative_l1(new.scores, old.scores) > 100 * LIMIT
    assert new.weights != old.weights  # Two hops with these would fail.


def test_a_single_bit(engine: V2Engine) -> None:
    """It is certain to be noticed, in whichever step it changes; so is that it changes back."""
    word = engine.model.model.embed_tokens.weight.data.view(torch.int32)[7]
    traces = {name: traced(60, (40, 60)) for name in ("same", "once", "twice")}
    for name, flips in (("same", ()), ("once", (2,)), ("twice", (1, 2))):
        new = {name: traces[name].new}
        for chunk in range(3):
            if chunk in flips:
                word[9] ^= 1
            engine.step({name: 20}, new=new)
            new = {}
    reports = [engine.report(traces["same"])]
    for name in ("once", "twice"):
        with pytest.raises(TraceError, match="weights changed"):
            engine.report(traces[name])
    word[9] ^= 1
    trace = traced(60, (40, 60))
    engine.step({"again": 60}, new={"again": trace.new})
    reports.append(engine.report(trace))
    assert reports[0].weights == reports[1].weights


def test_other_traces_of_the_step_go_on(engine: V2Engine, float64_llama: Any) -> None:
    early, late = traced(60, (40, 60)), traced(60, (40, 60))
    engine.step({"early": 30}, new={"early": early.new})
    changed = copy.deepcopy(float64_llama)
    changed.get_parameter(OUT).data.mul_(3)
    engine.model.get_parameter(OUT).data.mul_(3)
    engine.step({"early": 30, "late": 60}, new={"late": late.new})
    with pytest.raises(TraceError, match="weights changed"):
        engine.report(early)
    assert_exact(engine, late, changed)


def test_no_cost_without_a_trace(engine: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu.v2_engine import untraced

    trace = traced(60, (40, 60))
    engine.step({"trace": 60}, new={"trace": trace.new})
    monkeypatch.setattr(engine.capture._model.fingerprint, "take", None)  # type: ignore[union-attr]
    engine.step({"other": 20}, new={"other": untraced(30, 1)}, finished=["trace"])
    engine.step({"other": 10})
    assert engine.report(trace).scores.sum() > 0
