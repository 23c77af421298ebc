"""DeepSeek V3: multi-head latent attention (MLA); what the proof sees left out; what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.harness import (
    TARGET,
    TOKENS,
    WAYS,
    Engine,
    TraceJob,
    assert_hops_agree,
    attention_error,
    relative_l1,
    run_hops,
    tiny_folder,
)
from tests.engine.test_start_proof import (
    LAYER,
    LIMIT,
    decoder,
    proven,
    reads_form,
    start_reports,
)
from tests.engine.worker_faults import core_each
from tests.measured import Measured
from tests.tiny_models import FAMILY_NAMES
from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker import cpu_model, latents, start_proof
from vllm_flashtrace.worker.cpu_cache import Scratch
from vllm_flashtrace.worker.cpu_model import CPUTracedModel
from vllm_flashtrace.worker.layers import find_layers
from vllm_flashtrace.worker.runner import capture_of

# Where a CPU has AMX, vLLM would choose another.
BACKEND = {"attention_backend": "CPU_MLA"}

folder = tiny_folder("deepseek_v3")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(
        folder,
        "latent attention",
        in_process=True,
        max_model_len=1024,
        max_num_seqs=8,
        **BACKEND,
    )
    yield engine
    engine.close()


# First, since it starts engines in other processes.
@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_run(
    way: str,
    folder: Path,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    if way == "ranks":
        core_each(monkeypatch, 2)
    engine = Engine(folder, f"latent attention, {way}", **BACKEND, **WAYS[way])
    try:
        for report in start_reports(engine):
            assert report["refusal"] is None, report
            assert report["largest_error"] < report["limit"] / 5, report
        error = relative_l1(engine.trace(TraceJob(TOKENS, TARGET)).scores, expected)
    finally:
        engine.close()
    measured("families", FAMILY_NAMES["deepseek_v3"], **{way: error})
    assert error <= 1e-5


def test_beside_requests_that_decode(
    engine: Engine,
    reference: Any,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    """vLLM computes rows that decode before those that prefill, in the order of requests or not."""
    places: list[int] = []
    stock = CPUTracedModel.plan_rows

    def plan_rows(self: CPUTracedModel, segments: Any) -> Any:
        places.extend(int(segment.rows[0] - segment.positions[0]) for segment in segments)
        return stock(self, segments)

    monkeypatch.setattr(CPUTracedModel, "plan_rows", plan_rows)
    for start, new_tokens in ((0, 3), (150, 60), (300, 60)):
        engine.submit_completion(TOKENS[start : start + 100], new_tokens)
    for _ in range(6):  # The first ends, and the trace takes its place.
        engine.step()
    job = TraceJob(TOKENS, TARGET, attention=True)
    _, nonce = engine.submit(job)
    engine.run()
    report = engine.collect(nonce)
    assert places == [2]
    error = relative_l1(report.scores, expected)
    proof = start_reports(engine)[0]["largest_error"]
    measured("breaks_latents", "nothing", error=proof, scores=error)
    assert error <= 1e-5
    assert attention_error(report, reference, job) <= 1e-3


def test_hops_from_one_prefill(engine: Engine) -> None:
    assert_hops_agree(engine, TOKENS, 379)


def test_in_little_memory(
    engine: Engine, reference: Any, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys head by head, or of three heads at a time, and values of some tokens."""
    taken: list[int] = []
    stock = Scratch.take

    def take(self: Scratch, *shape: int) -> torch.Tensor:
        taken.append(4 * math.prod(shape))
        return stock(self, *shape)

    monkeypatch.setattr(Scratch, "take", take)
    whole = engine.trace(TraceJob(TOKENS, TARGET))
    heads = engine.on_worker(lambda worker: capture_of(worker.model_runner)._model.layers[0].heads)
    one, most = 4 * heads.keys * len(TOKENS), max(taken)
    assert most == heads.queries * one
    arguments = (engine, TOKENS, 100, (380, 397), (110, 379), 2)
    hops = run_hops(*arguments, at_once=True)
    for limit in (one // 2, 3 * one):
        taken.clear()
        monkeypatch.setattr(cpu_model, "LATENT_SCRATCH_BYTES", limit)
        job = TraceJob(TOKENS, TARGET, attention=True)
        report = engine.trace(job)
        assert max(taken) == max(one, limit) and len(taken) > 2 * len(set(taken))
        error = relative_l1(report.scores, expected)
        print(f"in {limit} of {most} bytes: relative L1 {error:.1e}")
        assert error <= 1e-5 and relative_l1(report.scores, whole.scores) <= 1e-6
        assert attention_error(report, reference, job) <= 1e-3
        again = run_hops(*arguments, at_once=True)
        for ours, others in zip(again.per_hop_scores, hops.per_hop_scores, strict=True):
            assert relative_l1(ours, others) <= 1e-6


Change = Callable[[pytest.MonkeyPatch, Any], None]


def reads_matrices(read: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]]) -> Change:
    """A reader that makes something else of ``W_UK`` and ``W_UV``."""

    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        stock = latents.up_projections

        def up_projections(attention: Any) -> Any:
            pair = stock(attention)
            return read(*pair) if attention is _attention(layer) else pair

        patch.setattr(latents, "up_projections", up_projections)

    return change


def reads_keys(read: Callable[[torch.Tensor], Any]) -> Change:
    """A reader that changes the rotated part of the keys, ``[H, R, n]``."""

    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        stock = cpu_model.write_keys

        def write_keys(attention: Any, *args: Any) -> None:
            stock(attention, *args)
            if attention is _attention(layer):
                read(args[-1].transpose(1, 2)[:, attention.qk_nope_head_dim :])

        patch.setattr(cpu_model, "write_keys", write_keys)

    return change


def _attention(layer: Any) -> Any:
    return layer.self_attn.mla_attn.mla_attn


def transposed(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.flatten(1).unflatten(1, matrices.shape[:0:-1]).transpose(1, 2)


YARN = 0.1 * math.log(8.0) + 1
BREAKS: dict[str, tuple[Change, float]] = {
    "`W_UK` of other heads": (reads_matrices(lambda keys, values: (keys.roll(1, 0), values)), 1e-3),
    "`W_UV` of other heads": (reads_matrices(lambda keys, values: (keys, values.roll(1, 0))), 1e-3),
    "`W_UK` transposed": (reads_matrices(lambda keys, values: (transposed(keys), values)), 1e-3),
    "`W_UV` transposed": (reads_matrices(lambda keys, values: (keys, transposed(values))), 1e-3),
    "`W_UV` 0.1 % too large": (reads_matrices(lambda keys, values: (keys, values * 1.001)), 1e-6),
    "rotated part of the keys": (reads_keys(lambda rotated: rotated.zero_()), 1e-3),
    "rotated part of the next token": (
        reads_keys(lambda rotated: rotated.copy_(rotated.roll(-1, 2))),
        1e-3,
    ),
    "YaRN's factor (1.46) in the scale": (reads_form(scale=YARN**-2), 1e-3),
    "scale 1 % too large": (reads_form(scale=1.01), 1e-5),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_left_out_is_seen(
    engine: Engine,
    expected: torch.Tensor,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    good = proven(engine)
    assert good["refusal"] is None and good["largest_error"] < LIMIT / 10, good
    change, wrong = BREAKS[name]
    change(monkeypatch, decoder(engine))
    # What the scores would be without a proof.
    scores = engine.trace(TraceJob(TOKENS, TARGET)).scores
    error = relative_l1(scores, expected)
    report = proven(engine)
    measured("breaks_latents", name, error=report["largest_error"], scores=error)
    assert report["largest_error"] > 5 * LIMIT
    assert f"failed in layer {LAYER} (" in report["refusal"]
    assert start_proof._MEASURES["attention"] in report["refusal"]
    assert error > wrong


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    assert report["found"]["latent_attention"] is True


def _named(name: str) -> Any:
    return SimpleNamespace(get_name=lambda: name)


# What is set where, and what is then refused.
REFUSALS: dict[str, tuple[str, str, Any]] = {
    "multi-head latent attention (MLA) on the AMX_MLA backend": (
        "mla_attn",
        "attn_backend",
        _named("AMX_MLA"),
    ),
    "multi-head latent attention (MLA) on the FLASHMLA_SPARSE backend": (
        "mla_attn",
        "attn_backend",
        _named("FLASHMLA_SPARSE"),
    ),
    "sparse attention": ("mla_attn", "use_sparse", True),
    "a sliding window of latent attention": ("mla_attn", "sliding_window", 64),
    "non-causal attention": ("mla_attn", "non_causal_multi_token_decode", True),
    "an output gate of latent attention": ("", "g_proj", torch.nn.Identity()),
    "an up-projection of latents that is packed or has a bias": (
        "kv_b_proj",
        "bias",
        torch.nn.Parameter(torch.zeros(1), False),
    ),
    "an output projection of another width than its heads": ("mla_attn", "v_head_dim", 32),
    # As if the backend applied what holds adapters.
    "LoRA adapters of an up-projection of latents": (
        "mla_attn",
        "impl",
        SimpleNamespace(kv_b_proj=torch.nn.Identity()),
    ),
}


@pytest.mark.parametrize("feature", REFUSALS)
def test_refusals(engine: Engine, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, name, value = REFUSALS[feature]
    block = decoder(engine).self_attn.mla_attn
    module = block.get_submodule(path)
    tables = (vars(module), module._parameters, module._modules)
    [table] = [own for own in tables if name in own]
    monkeypatch.setitem(table, name, value)
    assert found_refusal(engine) == (
        f"traces are not supported with {feature} (model.layers.{LAYER}.self_attn.attn); the "
        "option 'partial_coverage' traces the other 3 alone"
    )


def found_refusal(engine: Engine) -> str:
    """Why the engine's model cannot be read."""

    def find(worker: Any) -> str:
        with pytest.raises(UnsupportedModelError) as caught:
            find_layers(worker.model_runner.get_model(), worker.vllm_config)
        return caught.value.message

    message: str = engine.on_worker(find)
    return message
