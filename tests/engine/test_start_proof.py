"""At the start a worker proves that its model is traced exactly, and sees whatever was left out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.measured import Measured
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.worker import cpu_model, runner, start_proof
from vllm_flashtrace.worker.cpu_model import CPUTracedModel
from vllm_flashtrace.worker.decoder_stream import argument_names

LAYER = 2
LIMIT = 1e-4
TOKENS = list(range(10, 210))
JOB = TraceJob(TOKENS, TargetWeights.from_spans([(150, 200)]))


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Engine]:
    engine = Engine(
        tiny_folder, "a model proven again and again", in_process=True, max_model_len=1024
    )
    yield engine
    engine.close()


def proven(engine: Engine) -> dict[str, Any]:
    """The report of another proof."""
    return engine.on_worker(prove_again)


def prove_again(worker: Any) -> dict[str, Any]:
    vars(worker.model_runner).pop(runner.PROOF_ATTRIBUTE, None)
    start_proof.prove(worker)
    return getattr(worker.model_runner, runner.PROOF_ATTRIBUTE, None)


def decoder(engine: Engine) -> Any:
    return engine.on_worker(lambda worker: worker.model_runner.get_model().model.layers[LAYER])


def start_reports(engine: Engine) -> list[dict[str, Any]]:
    replies = engine.llm.collective_rpc("flashtrace_status")
    return [msgspec.msgpack.decode(reply)["worker"]["proof"] for reply in replies]


# --- what a layer has, and what the reader may make of it -----------------------------------------

Change = Callable[[pytest.MonkeyPatch, Any], None]


def nothing(patch: pytest.MonkeyPatch, layer: Any) -> None:
    pass


def has(**attributes: Any) -> Change:
    """A layer whose attention kernel does so."""

    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        for name, value in attributes.items():
            patch.setattr(layer.self_attn.attn.impl, name, value)
            if name == "sliding_window":
                patch.setattr(layer.self_attn.attn, name, value)

    return change


def reads_form(**attributes: Any) -> Change:
    """A reader that takes the layer's form of attention for another."""

    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        stock = CPUTracedModel.attention_form

        def attention_form(self: CPUTracedModel, index: int) -> Any:
            form = stock(self, index)
            if index != LAYER:
                return form
            factor = attributes.get("scale", 1.0)
            return dataclasses.replace(form, **{**attributes, "scale": form.scale * factor})

        patch.setattr(CPUTracedModel, "attention_form", attention_form)

    return change


def reads_weight(read: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A reader that makes something else of the output projection."""

    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        stock = CPUTracedModel.output_projection

        def output_projection(self: CPUTracedModel, index: int, adapter: int | None = None) -> Any:
            projection = stock(self, index, adapter)
            weight = projection.weight
            return projection._replace(weight=read(weight) if index == LAYER else weight)

        patch.setattr(CPUTracedModel, "output_projection", output_projection)

    return change


def swaps_values(patch: pytest.MonkeyPatch, layer: Any) -> None:
    stock = CPUTracedModel.read_values

    def read(self: CPUTracedModel, index: int, *args: Any) -> torch.Tensor:
        values = stock(self, index, *args)
        return values.flip(1) if index == LAYER else values

    patch.setattr(CPUTracedModel, "read_values", read)


def swaps_keys(patch: pytest.MonkeyPatch, layer: Any) -> None:
    stock, cache = cpu_model.read_keys, layer.self_attn.attn.kv_cache

    def read(kv_cache: torch.Tensor, *args: Any) -> torch.Tensor:
        keys = stock(kv_cache, *args)
        return keys.flip(0) if kv_cache is cache else keys

    patch.setattr(cpu_model, "read_keys", read)


def hooked(module: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A module that does one thing more, which no reader knows of."""

    def add(patch: pytest.MonkeyPatch, layer: Any) -> None:
        hooks = layer.get_submodule(module)._forward_hooks
        patch.setitem(hooks, -1, lambda module, args, output: change(output))

    return add


def called_by_name(patch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Modules of these classes get all they are given by name, and the first of it last."""
    for kind in {type(module): module for module in modules}.values():
        names, stock = argument_names(kind), type(kind).__call__

        def call(self: Any, *args: Any, n: Any = names, f: Any = stock, **kwargs: Any) -> Any:
            named = dict(reversed(list(zip(n, args, strict=False))))
            assert named or kwargs
            return f(self, **named, **kwargs)

        patch.setattr(type(kind), "__call__", call, raising=False)


def has_bias(patch: pytest.MonkeyPatch, layer: Any) -> None:
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3))
    patch.setitem(layer.self_attn.o_proj._parameters, "bias", torch.nn.Parameter(bias, False))


SINKS = torch.tensor([0.5, 1.0, -1.0, 2.0])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
GAIN = torch.linspace(0.5, 1.5, 128)

BREAKS: dict[str, tuple[Change, Change, str]] = {
    "soft cap (2.0)": (has(logits_soft_cap=2.0), reads_form(soft_cap=0.0), "attention"),
    "window (16)": (has(sliding_window=16), reads_form(sliding_window=None), "attention"),
    "window one token short": (
        has(sliding_window=16),
        reads_form(sliding_window=15),
        "attention",
    ),
    "sinks": (has(sinks=SINKS), reads_form(sinks=None), "attention"),
    "ALiBi": (has(alibi_slopes=SLOPES), reads_form(alibi_slopes=None), "attention"),
    "scale 1 % too large": (nothing, reads_form(scale=1.01), "attention"),
    "swapped heads of keys": (nothing, swaps_keys, "attention"),
    "swapped heads of values": (nothing, swaps_values, "attention"),
    "`M` transposed": (nothing, reads_weight(lambda weight: weight.T), "identity"),
    "`M` 0.1 % too large": (nothing, reads_weight(lambda weight: weight * 1.001), "identity"),
    "residual multiplier (0.22)": (nothing, hooked("self_attn", lambda x: x * 0.22), "identity"),
    "output bias": (has_bias, hooked("self_attn", lambda x: x + 0.1), "identity"),
    "gate": (
        nothing,
        hooked("self_attn.attn", lambda x: x * torch.sigmoid(x)),
        "identity",
    ),
    "norm behind attention": (
        nothing,
        hooked("self_attn", lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt()),
        "identity",
    ),
    "its `gamma`": (nothing, hooked("self_attn", lambda x: x * GAIN), "identity"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_left_out_is_seen(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    feature, broken, measure = BREAKS[name]
    layer = decoder(engine)
    feature(monkeypatch, layer)
    if feature is not nothing:
        good = proven(engine)
        assert good["refusal"] is None and good["largest_error"] < LIMIT / 10, good
    broken(monkeypatch, layer)
    report = proven(engine)
    measured("breaks", name, measure=measure, error=report["largest_error"])
    assert report["largest_error"] > 5 * LIMIT
    words = start_proof._MEASURES[measure]
    assert report["refusal"].startswith(
        f"the proof at the start failed in layer {LAYER} "
        f"(model.layers.{LAYER}.self_attn.attn): {words}: relative error "
    )
    assert report["refusal"].endswith("limit 0.0001")


def test_norms_that_are_called_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is read again, and the taps that were placed see the stream all the same."""
    with as_at_start(engine):
        assert proven(engine)["refusal"] is None
        expected = engine.trace(JOB).scores
    called_by_name(monkeypatch, decoder(engine).post_attention_layernorm)
    with as_at_start(engine):
        assert proven(engine)["refusal"] is None
        assert relative_l1(engine.trace(JOB).scores, expected) <= 1e-5


def test_nothing_of_the_probe_stays(engine: Engine) -> None:
    """Random numbers, KV blocks and prefix cache are as they were, and no request is left."""
    before = engine.generate(TOKENS, 4)  # Its blocks are those that the probe writes to.

    def state(worker: Any) -> list[torch.Tensor]:
        caches = [cache.clone() for cache in worker.model_runner.kv_caches]
        return [torch.get_rng_state(), *caches]

    def left(worker: Any) -> bool:
        runner = worker.model_runner
        return start_proof._REQUEST in {*runner.requests, *runner.input_batch.req_ids}

    was = engine.on_worker(state)
    report = proven(engine)
    assert (report["tokens"], report["rows"], report["refusal"]) == (64, 8, None)
    now = engine.on_worker(state)
    assert len(was) == 1 + 4 and all(map(torch.equal, was, now))
    assert not engine.on_worker(left)
    assert engine.on_worker(lambda worker: runner.existing_capture(worker.model_runner)) is None
    assert engine.generate(TOKENS, 4) == before


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    assert report["refusal"] is None
    assert report["limit"] == LIMIT and 0 < report["largest_error"] < LIMIT / 10
    assert report["found"] == {
        "layers": [0, 3],
        "untraced_layers": [],
        "norms": ["RMSNorm"],
        "block_norms": [],
        "query_key_norms": False,
        "latent_attention": False,
        "output_bias": False,
        "residual_multipliers": [1.0],
        "output_gates": False,
        "windows": [None],
        "chunks": [None],
        "soft_caps": [],
        "sinks": False,
        "alibi": False,
        "quantization": [None],
        "up_projection_quantization": [],
        "kv_cache": ["auto"],
    }


def test_a_model_that_is_not_proven_is_served_and_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The words of the start are those of the status and of every refused trace."""
    completion = engine.generate(TOKENS, 4)
    with monkeypatch.context() as patch, as_at_start(engine):
        hooked("self_attn", lambda x: x * 0.22)(patch, decoder(engine))
        with caplog.at_level(logging.WARNING, "vllm_flashtrace"):
            words = proven(engine)["refusal"]
            patch.undo()
            assert engine.status()["refusal"] == words
            with pytest.raises(TraceError) as caught:
                engine.trace(JOB)
        assert (caught.value.code, caught.value.message) == ("unsupported_model", words)
        assert engine.generate(TOKENS, 4) == completion
    said = [record.getMessage() for record in caplog.records if words in record.getMessage()]
    assert said == [f"FlashTrace: this model is served without attribution: {words}"]
    assert "layer 2 (model.layers.2.self_attn.attn)" in words


def test_without_the_probe_known_architectures_are_traced(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine.llm.llm_engine.vllm_config
    without = {"flashtrace": {"probe": False}}
    monkeypatch.setattr(config, "additional_config", {**config.additional_config, **without})
    with as_at_start(engine):
        assert proven(engine) is None
        assert engine.status()["refusal"] is None
        assert engine.trace(JOB).scores.sum() > 0
    monkeypatch.setattr(config.model_config, "_architecture", "OtherForCausalLM")
    with as_at_start(engine):
        assert "OtherForCausalLM without a proof at the start" in engine.status()["refusal"]
    monkeypatch.setattr(config.model_config, "quantization", "fp8")
    with as_at_start(engine):
        refusal = "quantized weights (fp8) without a proof at the start"
        assert refusal in engine.status()["refusal"]


def test_a_proven_model_is_traced_whatever_its_name(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.trace(JOB).scores
    config = engine.llm.llm_engine.vllm_config
    monkeypatch.setattr(config.model_config, "_architecture", "OtherForCausalLM")
    with as_at_start(engine):
        assert proven(engine)["refusal"] is None
        assert torch.equal(engine.trace(JOB).scores, expected)


def test_a_structure_that_cannot_be_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(decoder(engine)._modules, "post_attention_layernorm")
    with as_at_start(engine):
        assert proven(engine) is None
        assert engine.status()["refusal"] == (
            "the decoder layer of model.layers.2.self_attn.attn has no pre_feedforward_layernorm "
            "or pre_mlp_layernorm or post_attention_layernorm or feedforward_layernorm: its norm "
            "behind attention was not found"
        )


def test_a_limit_of_ones_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine.llm.llm_engine.vllm_config
    strict = {"flashtrace": {"probe_limit": 1e-12}}
    monkeypatch.setattr(config, "additional_config", {**config.additional_config, **strict})
    assert proven(engine)["refusal"].endswith("limit 1e-12")
    with pytest.raises(ValueError, match="probe_limit"):
        FlashTraceConfig.from_additional_config({"flashtrace": {"probe_limit": 0}})


def test_a_probe_that_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, the model is refused with the reason, and the engine goes on."""

    def broken(*_: Any) -> None:
        raise MemoryError("no memory for the probe")

    completion = engine.generate(TOKENS, 4)
    for module, name in (
        (start_proof, "StepRecorder"),
        (start_proof, "attention_error"),
        (CPUTracedModel, "add_column_sums"),
        (decoder(engine).mlp, "forward"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            report = proven(engine)
        assert report["refusal"].startswith(
            "the proof at the start could not be run: no memory for the probe (the option 'probe'"
        )
        assert report["largest_error"] is None
        assert engine.generate(TOKENS, 4) == completion


def test_real_weights(smollm2: Engine) -> None:
    [report] = start_reports(smollm2)
    assert report["refusal"] is None and report["largest_error"] < LIMIT / 10
    # Other processes of the suite may have had the cores at the start.
    seconds = min(report["seconds"], *(proven(smollm2)["seconds"] for _ in range(2)))
    print(f"SmolLM2: error {report['largest_error']:.1e} in {seconds:.2f} s")
    assert seconds < 2


@contextmanager
def as_at_start(engine: Engine) -> Iterator[None]:
    """Within the block, and behind it, no trace was ever asked of the engine."""

    def forget(worker: Any) -> None:
        vars(worker.model_runner).pop(runner._ATTRIBUTE, None)

    engine.on_worker(forget)
    try:
        yield
    finally:
        engine.on_worker(forget)
        engine.on_worker(lambda worker: vars(worker.model_runner).pop(runner.PROOF_ATTRIBUTE, None))
