"""A completion made with a LoRA adapter is traced through what the adapter makes of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.test_scores import log_probs
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import make_tiny_model
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import ScoredText
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 1e-3
RANK, ALPHA = 8, 12
TOKENS = torch.randint(5, 500, (200,), generator=torch.Generator().manual_seed(1)).tolist()
TARGET = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(150, 200)})


@dataclass(frozen=True)
class Adapter:
    """An adapter as vLLM is told of it, and the model it makes of the base."""

    request: Any
    model: Any


def make_adapter(base: Path, folder: Path, number: int, targets: list[str]) -> Adapter:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return adapter_of(model, folder, number, targets)


def adapter_of(model: Any, folder: Path, number: int, targets: list[str]) -> Adapter:
    """Writes a random adapter, and makes the model one with it."""
    from vllm.lora.request import LoRARequest

    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.rpartition(".")[0].endswith(tuple(targets)):
            down = 0.3 * torch.randn(RANK, weight.shape[1], generator=generator)
            up = 0.1 * torch.randn(weight.shape[0], RANK, generator=generator)
            weight += ALPHA / RANK * up @ down
            place = f"base_model.model.{name.rpartition('.')[0]}"
            tensors |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(LoRARequest(folder.name, number, str(folder)), model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Adapter]:
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    return [
        make_adapter(base, base.parent / "all", 1, everything),
        make_adapter(base, base.parent / "output", 2, ["o_proj"]),
        make_adapter(base, base.parent / "queries", 3, ["q_proj"]),
    ]


@pytest.fixture(scope="module")
def of_the_head(base: Path) -> Adapter:
    return make_adapter(base, base.parent / "head", 4, ["o_proj", "lm_head"])


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    engine = Engine(
        base,
        "LoRA",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=160,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=RANK,
    )
    yield engine
    engine.close()


def compare(engine: Engine, cases: list[Adapter]) -> float:
    """Returns the largest relative L1 distance to the oracle."""
    jobs = [TraceJob(TOKENS, TARGET, lora_request=case.request) for case in cases]
    errors = []
    for case, report in zip(cases, engine.trace_many(jobs), strict=True):
        expected = oracle_scores(case.model, TOKENS, TARGET.positions, TARGET.weights)
        errors.append(relative_l1(report.scores, expected))
        assert errors[-1] <= LIMIT
    return max(errors)


def test_an_adapter_beside_the_base_model(
    engine: Engine, base: Path, adapters: list[Adapter]
) -> None:
    """First, while the last slot has never been used.

    vLLM's CPU code adds what the last slot holds to the requests without an adapter, beside one
    that has one: index -1 in ``lora_ops.bgmv_shrink``.
    """
    from transformers import AutoModelForCausalLM

    plain = Adapter(None, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    compare(engine, [adapters[1], plain])


def test_more_adapters_than_slots(
    engine: Engine, adapters: list[Adapter], measured: Measured
) -> None:
    """Only two fit at a time, so that slots change hands between the traces of one batch."""
    error = compare(engine, [*adapters, adapters[0]])
    measured("ways", "LoRA adapters, several in a batch", against="oracle", scores=error)


def test_tokens_are_scored_with_their_own_adapter(
    engine: Engine, adapters: list[Adapter], of_the_head: Adapter
) -> None:
    """Logits are asked for of other rows than those vLLM has noted adapters of."""
    text = ScoredText(TOKENS, [*range(3, 60, 3), *range(120, 200)])
    cases = [of_the_head, adapters[1]]
    reports = engine.score_many([text, text], [case.request for case in cases])
    for case, report in zip(cases, reports, strict=True):
        assert (report.log_probs - log_probs(case.model, text)).abs().max() <= 1e-3


def test_offline_explains_with_the_adapter_it_is_given(
    engine: Engine, adapters: list[Adapter]
) -> None:
    ft = FlashTrace(llm=engine.llm)
    request = adapters[0].request
    wanted = {"preset": "paper", "target": {"tokens": [[0, 50]]}, "hops": 0}
    answer = ft.attribute(
        TOKENS[:150], TOKENS[150:], {**wanted, "top_k": None}, lora_request=request
    )
    scores = torch.zeros(150)
    for token in answer.to_dict()["scores"]:
        scores[token["index"]] = token["score"]
    expected = oracle_scores(adapters[0].model, TOKENS, torch.arange(150, 200), torch.ones(50))[
        :150
    ]
    assert relative_l1(scores, expected) <= LIMIT
    [generated] = ft.generate([TOKENS[:150]], flashtrace={"hops": 0}, lora_request=request)
    assert generated.to_dict()["status"] == "completed"


def test_an_adapter_that_is_gone_fails_its_trace(engine: Engine, adapters: list[Adapter]) -> None:
    def forget(worker: Any) -> None:
        from vllm_flashtrace.worker.runner import capture_of

        model = capture_of(worker.model_runner)._model
        model.remembered = model.slot_of
        model.slot_of = lambda adapter: model.remembered(adapter + 1000)

    def remember(worker: Any) -> None:
        from vllm_flashtrace.worker.runner import capture_of

        model = capture_of(worker.model_runner)._model
        model.slot_of = model.remembered

    job = TraceJob(TOKENS, TARGET, lora_request=adapters[0].request)
    engine.on_worker(forget)
    try:
        with pytest.raises(TraceError, match="LoRA adapter 1001 is not active"):
            engine.trace(job)
        assert engine.trace(TraceJob(TOKENS, TARGET)).scores.sum() > 0
    finally:
        engine.on_worker(remember)
    assert engine.trace(job).scores.sum() > 0


def test_an_adapter_that_is_loaded_again_meanwhile(engine: Engine, adapters: list[Adapter]) -> None:
    """A trace that it falls into fails by name; one without the adapter does not."""

    def load_again(worker: Any, number: int, factor: float) -> None:
        from vllm_flashtrace.worker.output_projections import adapter_slot

        slot = adapter_slot(worker.model_runner, number)
        module = worker.model_runner.get_model().model.layers[1].self_attn.qkv_proj
        module.lora_b_stacked[0][slot].mul_(factor)

    target = TargetWeights.from_spans([(130, 200)])  # Of both chunks.
    jobs = [TraceJob(TOKENS, target, lora_request=adapters[0].request), TraceJob(TOKENS, target)]
    before, plain = (engine.trace(job) for job in jobs)
    assert engine.trace(jobs[0]).weights == before.weights != plain.weights
    engine.llm.reset_prefix_cache()
    nonces = [engine.submit(jobs[0])[1]]
    engine.llm.llm_engine.step()
    engine.on_worker(load_again, adapters[0].request.lora_int_id, 2.0)
    engine.run()
    with pytest.raises(TraceError) as caught:
        engine.collect(nonces[0])
    assert caught.value.code == "weights_changed"
    engine.llm.reset_prefix_cache()
    after, plain_after = (engine.trace(job) for job in jobs)
    assert after.weights != before.weights  # Two hops with these would fail.
    assert plain_after.weights == plain.weights
    engine.on_worker(load_again, adapters[0].request.lora_int_id, 0.5)
    engine.llm.reset_prefix_cache()
    assert engine.trace(jobs[0]).weights == before.weights


def test_fully_sharded_adapters_are_refused(engine: Engine) -> None:
    from vllm.lora.layers import RowParallelLinearWithShardedLoRA

    from vllm_flashtrace.base.errors import UnsupportedModelError
    from vllm_flashtrace.worker.output_projections import base_projection

    with pytest.raises(UnsupportedModelError, match="fully sharded"):
        base_projection(object.__new__(RowParallelLinearWithShardedLoRA))
