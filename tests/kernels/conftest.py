"""Kernels run interpreted on the CPU in this folder, and as they are where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny; more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interprets Triton functions, those of the test's own module too, while a test runs."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield
        return
    from tests.kernels.interpreter import interpreted

    with interpreted(request.module):
        yield
