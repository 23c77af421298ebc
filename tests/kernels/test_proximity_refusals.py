"""What the proximity pass does with numbers that are none, and with tensors that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.layers import FORMS, Form, Layer, make_layer, trace_of
from tests.kernels.paged import paged_cache
from vllm_flashtrace.kernels import (
    Accumulators,
    ProximityLayer,
    ProximityTrace,
    SumsTouchedError,
    replace_by_proximities,
)
from vllm_flashtrace.kernels.triton_proximity import triton_proximities

EACH_FORM = pytest.mark.parametrize("form", FORMS)

NAN, INF = float("nan"), float("inf")


@EACH_FORM
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (torch.float32, NAN),
        (torch.float32, INF),
        (torch.bfloat16, -INF),
        (torch.float16, NAN),
        (torch.float8_e4m3fn, NAN),
        (torch.float8_e5m2, NAN),
        (torch.float8_e5m2, -INF),
    ],
)
def test_a_value_that_is_no_number_spoils_its_token(
    form: Form, dtype: torch.dtype, bad: float
) -> None:
    weight = torch.float32 if dtype == torch.float32 else torch.float16
    weight = torch.bfloat16 if dtype == torch.bfloat16 else weight
    layer = make_layer(values=dtype, weight=weight, groups=2, tokens=24, size=0.1)
    vectors = layer.values.float()
    vectors[20, 1, 7] = bad
    cache, table = paged_cache(vectors.to(dtype), 16)
    spoilt = replace(layer, value_cache=cache, block_table=table)
    # Where nothing weighs the token either.
    spoilt.column_sums[:, 20] = 0
    clean = layer.proximities(form)
    _only_token_20(form, spoilt, clean)
    spoilt.column_sums[:, 20] = 0.25
    _only_token_20(form, spoilt, clean)


@EACH_FORM
@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1e-3])
def test_a_bad_column_sum_spoils_its_token(form: Form, bad: float) -> None:
    layer = make_layer(groups=2, tokens=24, size=0.1)
    column_sums = layer.column_sums.clone()
    layer.column_sums[:, 20] = 0
    column_sums[:, 20] = 0
    column_sums[1, 20] = bad
    spoilt = replace(layer, column_sums=column_sums)
    _only_token_20(form, spoilt, layer.proximities(form))


def _only_token_20(form: Form, spoilt: Layer, clean: torch.Tensor) -> None:
    for fraction in (0.5, 1.0):
        ours = spoilt.proximities(form, fraction)
        assert ours.isnan().nonzero().flatten().tolist() == [20]
    others = torch.arange(len(ours), device=ours.device) != 20
    torch.testing.assert_close(ours[others], clean[others])


@EACH_FORM
@pytest.mark.parametrize("name", ["stream", "weight"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_stream_or_weight_spoils_every_token(form: Form, name: str, bad: float) -> None:
    layer = make_layer(groups=2, tokens=20)
    getattr(layer, name).view(-1)[-5] = bad
    for fraction in (0.0, 0.5, 1.0):
        trace = trace_of([layer], fraction)
        form([layer.layer()], [trace])
        assert trace.sums.column_sums[0, 0].isnan().all() and trace.totals.isnan().all()


@EACH_FORM
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_residual_spoils_its_own_proximity(form: Form, bad: float) -> None:
    layer = make_layer(tokens=5)
    trace = trace_of([layer])
    trace.sums.residual[0, 7] = bad
    form([layer.layer()], [trace])
    assert not trace.residual.isfinite().all() or trace.residual[0] == 0
    assert trace.totals.isfinite().all()


@EACH_FORM
def test_a_negative_zero_is_no_negative_column_sum(form: Form) -> None:
    layer = make_layer(tokens=20)
    layer.column_sums[0, 3] = -0.0
    assert layer.proximities(form)[3] == 0


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [-0.1, 1.1, NAN])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="exact_fraction"):
        trace_of([make_layer(tokens=3)], fraction)


@pytest.mark.parametrize("scale", [0.0, -1.0, INF, NAN])
def test_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale of values must be positive"):
        replace(make_layer(tokens=3), value_scale=scale).layer()


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "changed",
    [
        {"index": -1},
        {"cache": _zeros(4, 16, 64)},
        {"cache": _zeros(6, 0, 16, 64)},
        {"cache": _zeros(6, 1, 0, 64)},
        {"cache": _zeros(6, 1, 16, 0)},
        {"cache": _zeros(6, 1, 16, 257), "weight": _zeros(8, 257)},
        {"cache": _zeros(6, 3, 16, 64)},  # heads that the value heads do not divide
        {"cache": _zeros(6, 1, 16, 64, dtype=torch.float64)},
        {"cache": _zeros(6, 1, 16, 64, dtype=torch.uint8)},
        {"weight": _zeros(96, 2, 64)},
        {"weight": _zeros(0, 128)},
        {"weight": _zeros(96, 127)},
        {"weight": _zeros(96, 128, dtype=torch.float64)},
        {"weight": _zeros(96, 128).to(torch.float8_e4m3fn)},
        {"column_norms": _zeros(2, 95)},
        {"column_norms": _zeros(1, 96)},
        {"column_norms": _zeros(2, 96, dtype=torch.bfloat16)},
    ],
    ids=str,
)
def test_layers_that_do_not_fit_together_are_refused(changed: dict[str, Any]) -> None:
    layer: dict[str, Any] = {
        "index": 0, "cache": _zeros(6, 1, 16, 64), "weight": _zeros(96, 128),
    }  # fmt: skip
    ProximityLayer(**layer)
    with pytest.raises(ValueError, match=r"do not fit together: value_cache torch\.\w+ \("):
        ProximityLayer(**{**layer, **changed})


def _trace(**changed: Any) -> ProximityTrace:
    sums = {
        "column_sums": _zeros(2, 2, 40), "residual": _zeros(2, 96), "stream": _zeros(2, 96),
    }  # fmt: skip
    others = {
        "block_table": _zeros(3, dtype=torch.int32),
        "totals": _zeros(2, dtype=torch.float64),
        "residual_proximity": _zeros(2, dtype=torch.float64),
    }
    sums, others = (
        {**one, **{k: v for k, v in changed.items() if k in one}} for one in (sums, others)
    )
    own = others.pop("residual_proximity")
    return ProximityTrace(Accumulators(**sums), residual=own, **others)


@pytest.mark.parametrize(
    "changed",
    [
        {"column_sums": _zeros(2, 40)},
        {"column_sums": _zeros(2, 2, 0)},
        {"column_sums": _zeros(3, 2, 40)},
        {"column_sums": _zeros(2, 40, 2).transpose(1, 2)},
        {"column_sums": _zeros(2, 2, 40, dtype=torch.float64)},
        {"residual": _zeros(96)},
        {"residual": _zeros(2, 95)},
        {"stream": _zeros(2, 96, dtype=torch.float16)},
        {"block_table": _zeros(1, 3, dtype=torch.int32)},
        {"block_table": _zeros(3, dtype=torch.int64)},
        {"totals": _zeros(3, dtype=torch.float64)},
        {"totals": _zeros(2)},
        {"totals": _zeros(4, dtype=torch.float64)[::2]},
        {"residual_proximity": _zeros(1, dtype=torch.float64)},
    ],
    ids=str,
)
def test_traces_that_do_not_fit_together_are_refused(changed: dict[str, Any]) -> None:
    _trace()
    with pytest.raises(ValueError, match=r"do not fit together: column_sums torch\.float"):
        _trace(**changed)


@pytest.mark.parametrize(
    ("indices", "heads", "hidden", "blocks"),
    [((0, 2), 2, 96, 3), ((0, 0), 2, 96, 3), ((0, 1), 3, 96, 3), ((0, 1), 2, 95, 3),
     ((0, 1), 2, 96, 2)],
)  # fmt: skip
def test_traces_that_do_not_fit_the_layers_are_refused(
    indices: tuple[int, int], heads: int, hidden: int, blocks: int
) -> None:
    weight = _zeros(hidden, heads * 64)
    layers = [ProximityLayer(index, _zeros(6, 1, 16, 64), weight) for index in indices]
    trace = _trace(block_table=_zeros(blocks, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"do not fit the trace|given twice"):
        replace_by_proximities(layers, [trace])


def test_layers_of_different_sizes_are_refused() -> None:
    layers = [ProximityLayer(index, _zeros(6, 1, 16, 64), _zeros(96, 64 * (1 + index)))
              for index in range(2)]  # fmt: skip
    with pytest.raises(ValueError, match="different sizes"):
        replace_by_proximities(layers, [_trace()])


def test_a_fault_after_sums_were_replaced_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repetition would take what is there for column sums."""

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    layer = make_layer(tokens=5)
    monkeypatch.setattr("vllm_flashtrace.kernels.triton_proximity._sum_up", broken)
    monkeypatch.setattr("vllm_flashtrace.kernels.paged_proximity.l1_proximity", broken)
    for form in FORMS:
        with pytest.raises(SumsTouchedError, match="injected"):
            layer.proximities(form)
    monkeypatch.setattr("vllm_flashtrace.kernels.triton_proximity.Tables.copy", broken)
    with pytest.raises(RuntimeError, match="injected"):
        layer.proximities(triton_proximities)
