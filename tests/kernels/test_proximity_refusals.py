"""What the proximity pass does with numbers that are none, and with tensors that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.layers import inputs_of, make_layer
from tests.kernels.paged import DEVICE, paged_cache
from vllm_flashtrace.kernels import ProximityInputs, proximity
from vllm_flashtrace.kernels.paged_proximity import torch_proximity
from vllm_flashtrace.kernels.triton_proximity import triton_proximity

FORMS = pytest.mark.parametrize("form", [torch_proximity, triton_proximity])

Form = Callable[..., Tensor]
NAN, INF = float("nan"), float("inf")


@FORMS
@pytest.mark.parametrize("fraction", [0.5, 1.0])
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
    form: Form, fraction: float, dtype: torch.dtype, bad: float
) -> None:
    weight = torch.float32 if dtype == torch.float32 else torch.float16
    weight = torch.bfloat16 if dtype == torch.bfloat16 else weight
    layer = make_layer(values=dtype, weight=weight, groups=2, shared=2, tokens=40, size=0.1)
    vectors = layer.values.float()
    vectors[20, 1, 7] = bad
    cache, table = paged_cache(vectors.to(dtype), 16)
    spoilt = replace(layer, value_cache=cache, block_table=table)
    # Where nothing weighs the token either.
    spoilt.column_sums[:, 20] = 0
    _only_token_20(form, spoilt.inputs(), layer.inputs(), fraction)
    spoilt.column_sums[:, 20] = 0.25
    _only_token_20(form, spoilt.inputs(), layer.inputs(), fraction)


@FORMS
@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1e-3])
def test_a_bad_column_sum_spoils_its_token(form: Form, fraction: float, bad: float) -> None:
    layer = make_layer(groups=2, shared=2, tokens=40, size=0.1)
    column_sums = layer.column_sums.clone()
    layer.column_sums[:, 20] = 0
    column_sums[:, 20] = 0
    column_sums[3, 20] = bad
    spoilt = replace(layer, column_sums=column_sums)
    _only_token_20(form, spoilt.inputs(), layer.inputs(), fraction)


def _only_token_20(
    form: Form, spoilt: ProximityInputs, clean: ProximityInputs, fraction: float
) -> None:
    ours = form(spoilt, exact_fraction=fraction)
    assert ours.isnan().nonzero().flatten().tolist() == [20]
    if fraction == 1:
        others = torch.arange(len(ours), device=ours.device) != 20
        torch.testing.assert_close(ours[others], form(clean)[others])


@FORMS
@pytest.mark.parametrize("name", ["stream", "column_norms"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_stream_or_norm_spoils_every_token(form: Form, name: str, bad: float) -> None:
    layer = make_layer(groups=2, shared=2, tokens=40)
    layer.tensors()[name].view(-1)[-5] = bad
    for fraction in (0.0, 0.5, 1.0):
        assert form(layer.inputs(), exact_fraction=fraction).isnan().all()


@FORMS
def test_a_negative_zero_is_no_negative_column_sum(form: Form) -> None:
    layer = make_layer(tokens=20)
    layer.column_sums[0, 3] = -0.0
    assert form(layer.inputs())[3] == 0


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [-0.1, 1.1, NAN])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="exact_fraction"):
        proximity(make_layer(tokens=3).inputs(), exact_fraction=fraction)


@pytest.mark.parametrize("scale", [0.0, -1.0, INF, NAN])
def test_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="value_scale"):
        inputs_of(**{**make_layer(tokens=3).tensors(), "value_scale": scale})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("column_sums", (40,)),
        ("value_cache", (4, 16, 64)),
        ("block_table", (1, 3)),
        ("weight", (96, 2, 64)),
        ("column_norms", (96,)),
        ("stream", (1, 96)),
    ],
)
def test_wrong_dimensions_are_refused(name: str, shape: tuple[int, ...]) -> None:
    arguments = make_layer(shared=2).tensors()
    arguments[name] = arguments[name].new_zeros(shape)
    with pytest.raises(ValueError, match=r"dimensions expected.*column_sums torch\.float32"):
        inputs_of(**arguments)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("column_sums", (3, 40)),  # heads that the value heads do not divide, nor the weight holds
        ("column_sums", (0, 40)),
        ("column_sums", (2, 81)),  # more tokens than the block table names
        ("value_cache", (6, 3, 16, 64)),
        ("value_cache", (6, 0, 16, 64)),
        ("value_cache", (6, 1, 0, 64)),
        ("value_cache", (6, 1, 16, 0)),
        ("value_cache", (6, 1, 16, 32)),
        ("block_table", (2,)),
        ("weight", (95, 128)),
        ("weight", (96, 127)),
        ("column_norms", (2, 95)),
        ("column_norms", (1, 96)),
        ("stream", (95,)),
        ("stream", (0,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    arguments = make_layer(shared=2).tensors()
    arguments[name] = arguments[name].new_zeros(shape)
    with pytest.raises(ValueError, match="do not fit together"):
        inputs_of(**arguments)


def test_head_size_past_the_largest_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        make_layer(dim=257, tokens=3, hidden=8).inputs()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("column_sums", torch.float64),
        ("column_norms", torch.bfloat16),
        ("stream", torch.float16),
        ("block_table", torch.int64),
        ("weight", torch.float64),
        ("weight", torch.float8_e4m3fn),
        ("value_cache", torch.float64),
        ("value_cache", torch.uint8),
    ],
)
def test_types_that_do_not_fit_are_refused(name: str, dtype: torch.dtype) -> None:
    arguments = make_layer(tokens=3).tensors()
    arguments[name] = arguments[name].nan_to_num().to(dtype).to(DEVICE)
    with pytest.raises(ValueError, match=f"do not fit together.*{name} {dtype}"):
        inputs_of(**arguments)
