"""Weights that change by whatever way, on the CPU backend, which packs most matrices."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.oracle import as_float64, oracle_scores
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceUsage
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.hop import take_report
from vllm_flashtrace.worker.fingerprint import WeightsFingerprint

LIMIT = 1e-3
OUT = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.layers.2.post_attention_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
TOKENS = torch.randint(5, 500, (150,), generator=torch.Generator().manual_seed(1)).tolist()
JOB = TraceJob(TOKENS, TargetWeights.from_spans([(90, 100), (140, 150)]))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Any]]:
    """An engine that takes three steps for `JOB`, and the model as transformers has it."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("llama", tmp_path_factory.mktemp("llama"))
    model = as_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    engine = Engine(
        folder,
        "weights that change",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=64,
    )
    yield engine, model
    engine.close()


def reloaded(worker: Any, changed: Any, folder: Path) -> None:
    """vLLM's own method."""
    copy.deepcopy(changed).float().save_pretrained(folder)
    worker.reload_weights(weights_path=str(folder))


def received(worker: Any, changed: Any, _: Path) -> None:
    """As a weight transfer brings them: vLLM's method of the runner, one tensor after the other."""
    state = copy.deepcopy(changed).float().state_dict()
    worker.model_runner.reload_weights(weights_iterator=iter(state.items()))


def packed_again(worker: Any, changed: Any, _: Path) -> None:
    """By hand, past all of vLLM's methods that load weights."""
    module = worker.get_model().get_submodule(OUT.removesuffix(".weight"))
    new = changed.get_parameter(OUT).detach().float()
    module.weight = nn.Parameter(new, requires_grad=False)
    module.quant_method.process_weights_after_loading(module)


def unused(worker: Any, changed: Any, _: Path) -> None:
    """A parameter that vLLM has packed is not what it computes with any more."""
    module = worker.get_model().get_submodule(OUT.removesuffix(".weight"))
    module.weight = nn.Parameter(3 * changed.get_parameter(OUT).float(), requires_grad=False)


def copied(worker: Any, changed: Any, _: Path) -> None:
    """What is not packed, in the way that no counter of PyTorch's sees."""
    for name in (NORM, EMBEDDING):
        parameter = worker.get_model().get_parameter(name)
        parameter.data.copy_(changed.get_parameter(name).detach())


CHANGES = {
    reloaded: (OUT, NORM),
    received: (OUT, EMBEDDING),
    packed_again: (OUT,),
    copied: (NORM, EMBEDDING),
    unused: (),
}


@pytest.mark.parametrize("way", CHANGES)
def test_a_change(served: tuple[Engine, Any], way: Any, tmp_path: Path) -> None:
    """A trace that it falls into fails by name; later ones are those of the new weights."""
    engine, model = served
    before = engine.trace(JOB)
    assert relative_l1(before.scores, oracle(model)) < LIMIT

    engine.llm.reset_prefix_cache()
    _, nonce = engine.submit(JOB)
    engine.llm.llm_engine.step()
    generator = torch.Generator().manual_seed(0)
    for name in CHANGES[way]:
        weight = model.get_parameter(name).data
        weight.add_(torch.randn(weight.shape, generator=generator) * weight.std())
    engine.on_worker(way, model, tmp_path)
    engine.run()
    with pytest.raises(TraceError) as caught:
        engine.collect(nonce)
    assert caught.value.code == "weights_changed"

    engine.llm.reset_prefix_cache()  # As vLLM asks of who changes weights.
    after = engine.trace(JOB)
    assert relative_l1(after.scores, oracle(model)) < LIMIT
    if CHANGES[way]:
        assert relative_l1(after.scores, before.scores) > 10 * LIMIT

    usage = TraceUsage()
    usage.add(before)
    with pytest.raises(TraceError, match="between two hops") as caught:
        take_report(None, usage, after, 0.0)  # type: ignore[arg-type]
    assert caught.value.code == "weights_changed"


def test_no_change(served: tuple[Engine, Any]) -> None:
    """Neither work of others nor a reload of the same packed matrices is taken for one."""
    engine, _ = served
    first = engine.trace(JOB)
    [second] = engine.trace_many([JOB], decoding=[TOKENS[:20]])
    assert first.weights == second.weights and len(first.weights) == 16


def oracle(model: Any) -> torch.Tensor:
    return oracle_scores(model, TOKENS, JOB.weights.positions, JOB.weights.weights)


def fingerprint(model: nn.Module) -> int:
    return int(WeightsFingerprint(model, torch.device("cpu")).take())


def holding(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 4099), (2, 64, 96)])
@pytest.mark.parametrize("order", ["contiguous", "transposed", "part", "expanded"])
def test_every_bit_counts(dtype: torch.dtype, shape: tuple[int, ...], order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    written = tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    if order == "transposed":
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    elif order == "part":
        written = tensor = torch.stack([tensor, tensor], -1)[..., 1]
    elif order == "expanded":
        tensor = tensor.expand(2, *shape)
    model = holding(first=torch.ones(3), tensor=tensor, empty=torch.empty(0))
    before = fingerprint(model)
    for place in {0, written.numel() // 2, written.numel() - 1}:
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), shape))
        old = written[where].clone()
        written[where] = ~old if dtype == torch.bool else -1 - old
        assert fingerprint(model) != before
        written[where] = old
        assert fingerprint(model) == before


def test_place_counts() -> None:
    rows = torch.arange(4 * 4096, dtype=torch.int64).view(4, 4096)
    before = fingerprint(holding(rows=rows, other=rows[0]))
    assert fingerprint(holding(rows=rows[[1, 0, 2, 3]], other=rows[0])) != before
    assert fingerprint(holding(rows=rows, other=rows[1])) != before


def test_signed_zeros_and_what_is_not_a_number_count() -> None:
    values = [torch.tensor(number) for number in (0.0, -0.0, torch.nan, -torch.nan, torch.inf)]
    assert len({fingerprint(holding(value=value)) for value in values}) == 5


def test_what_is_replaced_is_freed() -> None:
    """And noticed, whatever comes to lie at its address."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 300))
    weight = torch.ones(300, 300)
    model[2].cpu_linear = lambda x: x @ weight  # As vLLM keeps a matrix that it has packed.
    taken = WeightsFingerprint(model, torch.device("cpu"))
    before = int(taken.take())
    held = model[0].weight, model[1], model[1].weight, model[2].cpu_linear
    gone = [weakref.ref(one) for one in held]
    del held
    numbers = [before]
    for replace in (
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(300, 300))),
        lambda: model.__setitem__(1, nn.Linear(300, 300)),
        lambda: setattr(model[2], "cpu_linear", lambda x: x @ weight),
    ):
        replace()
        assert any(one() is None for one in gone)
        gone = [one for one in gone if one() is not None]
        numbers.append(int(taken.take()))
    assert not gone and len(set(numbers)) == 4
    assert int(taken.take()) == numbers[-1]
