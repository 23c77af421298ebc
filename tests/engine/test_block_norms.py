"""A norm between the attention block and the stream: hops, and what the proof sees left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import (
    Engine,
    TraceJob,
    assert_hops_agree,
    leaves_transformers_classes_alone,
    relative_l1,
)
from tests.engine.test_start_proof import (
    LAYER,
    LIMIT,
    called_by_name,
    decoder,
    hooked,
    proven,
    start_reports,
)
from tests.measured import Measured
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.worker.cpu_model import CPUTracedModel
from vllm_flashtrace.worker.decoder_stream import BlockNorm
from vllm_flashtrace.worker.layers import find_layers

TOKENS = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=["gemma2", "olmo2"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """vLLM's own code, and Transformers', whose layers do not carry the stream."""
    with pytest.MonkeyPatch.context() as patch:
        leaves_transformers_classes_alone(patch)
        engine = Engine(
            make_tiny_model(request.param, folder / request.param),
            "blocks whose output is normed",
            in_process=True,
            max_model_len=1024,
        )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("normed")


def test_hops_from_one_prefill(engine: Engine) -> None:
    assert_hops_agree(engine, TOKENS, 250)


def test_traces_beside_each_other(engine: Engine) -> None:
    jobs = [TraceJob(TOKENS, TargetWeights.from_spans([span])) for span in ((90, 99), (20, 270))]
    together = [report.scores for report in engine.trace_many(jobs)]
    assert all(map(torch.equal, together, [engine.trace(job).scores for job in jobs]))


Change = Callable[[pytest.MonkeyPatch, Any], None]


def reads_gain(read: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(patch: pytest.MonkeyPatch, layer: Any) -> None:
        stock = BlockNorm.gain

        def gain(self: BlockNorm) -> torch.Tensor:
            own = self.module is layer.post_attention_layernorm
            return read(stock(self)) if own else stock(self)

        patch.setattr(BlockNorm, "gain", gain)

    return change


def reads_size(read: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(patch: pytest.MonkeyPatch, _: Any) -> None:
        stock = CPUTracedModel.row_scales

        def row_scales(
            self: CPUTracedModel, layer: int, rows: Any, output: Any, out: torch.Tensor
        ) -> None:
            stock(self, layer, rows, output, out)
            if layer == LAYER:
                out.copy_(read(out))

        patch.setattr(CPUTracedModel, "row_scales", row_scales)

    return change


def gated(output: Any) -> Any:
    """vLLM's code takes a bias beside what is projected, Transformers' does not."""
    if isinstance(output, tuple):
        return output[0] * output[0].abs(), None
    return output * output.abs()


BREAKS: dict[str, Change] = {
    "`gamma`": reads_gain(torch.ones_like),
    "`gamma` as `w` where it is `1 + w`, or the other way round": reads_gain(lambda gain: gain - 1),
    "`1/rms`": reads_size(torch.ones_like),
    "`1/rms` 1 % too large": reads_size(lambda scales: scales * 1.01),
    "multiplier (0.22) behind the norm": hooked("post_attention_layernorm", lambda x: x * 0.22),
    "gate in front of the norm": hooked("self_attn.o_proj", gated),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_left_out_is_seen(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    good = proven(engine)
    assert good["refusal"] is None and good["largest_error"] < LIMIT / 10, good
    BREAKS[name](monkeypatch, decoder(engine))
    report = proven(engine)
    gemma = start_reports(engine)[0]["found"]["block_norms"] == ["GemmaRMSNorm"]
    measured("breaks_normed", name, **{"gemma2" if gemma else "olmo2": report["largest_error"]})
    assert report["largest_error"] > 5 * LIMIT
    assert f"failed in layer {LAYER} (" in report["refusal"]
    assert "contributions do not add up" in report["refusal"]


def test_norms_that_are_called_by_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Transformers' code the proof looks at the MLP's input."""
    job = TraceJob(TOKENS, TargetWeights.from_spans([(270, 300)]))
    expected, layer = engine.trace(job).scores, decoder(engine)
    called_by_name(monkeypatch, layer.post_attention_layernorm, layer.mlp)
    assert proven(engine)["refusal"] is None
    assert relative_l1(engine.trace(job).scores, expected) <= 1e-5


def test_the_report(engine: Engine) -> None:
    proven(engine)
    [report] = start_reports(engine)
    found = report["found"]
    if found["block_norms"] == ["GemmaRMSNorm"]:
        assert found["norms"] == found["block_norms"]
        assert (found["windows"], found["soft_caps"]) == ([None, 64], [3.0])
    else:
        assert (found["norms"], found["block_norms"]) == ([], ["TPAwareRMSNorm"])
        assert (found["windows"], found["soft_caps"]) == ([None], [])


def test_norms_that_are_not_known(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = decoder(engine)
    monkeypatch.setitem(layer._modules, "post_attention_layernorm", torch.nn.LayerNorm(128))
    with pytest.raises(UnsupportedModelError, match="a LayerNorm of what the attention"):
        engine.on_worker(
            lambda worker: find_layers(worker.model_runner.get_model(), worker.vllm_config)
        )
