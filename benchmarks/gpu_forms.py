"""The kernels under test, under one name each.

Invariant: with a GPU these are the public functions that the product calls; without one they are
their Triton forms in Triton's interpreter, which the public functions do not pick for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_flashtrace import kernels
from vllm_flashtrace.kernels import AttentionForm, PagedRows


class Forms(NamedTuple):
    """What is checked and timed.

    Attributes:
        lse: As `kernels.paged_lse`.
        column_sums: As `kernels.paged_column_sums`: both passes.
        first_pass: What `second_pass` needs of every row and head.
        second_pass: As `column_sums`, with the result of `first_pass` as the last argument.
        row_sums: As `kernels.add_row_sums`.
        proximity: As `kernels.proximity`.
    """

    lse: Callable[..., Tensor]
    column_sums: Callable[..., None]
    first_pass: Callable[..., Tensor]
    second_pass: Callable[..., None]
    row_sums: Callable[..., None]
    proximity: Callable[..., Tensor]


def triton_on(device: torch.device) -> AbstractContextManager[None]:
    """Within it Triton functions take tensors of a device: on the CPU, they are interpreted."""
    if device.type == "cuda":
        return nullcontext()
    from tests.kernels.interpreter import interpreted

    return interpreted()


def forms_on(device: torch.device) -> Forms:
    """The forms that run on a device."""
    from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums
    from vllm_flashtrace.kernels.triton_lse import row_offsets, triton_lse
    from vllm_flashtrace.kernels.triton_proximity import triton_proximity
    from vllm_flashtrace.kernels.triton_row_sums import triton_row_sums

    if device.type == "cuda":
        return Forms(
            kernels.paged_lse,
            kernels.paged_column_sums,
            row_offsets,
            triton_column_sums,
            kernels.add_row_sums,
            kernels.proximity,
        )

    def both(
        query: Tensor, key_cache: Tensor, rows: PagedRows, form: AttentionForm, layer: int
    ) -> None:
        offsets = row_offsets(query, key_cache, rows, form)
        triton_column_sums(query, key_cache, rows, form, layer, offsets)

    return Forms(
        triton_lse, both, row_offsets, triton_column_sums, triton_row_sums, triton_proximity
    )
