"""Which cores the tests of this process compute on, and in which processes their engines run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BIND = "VLLM_CPU_OMP_THREADS_BIND"
"""Where vLLM is told; by itself it binds every engine of a small machine to the same core."""

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
IN_ENGINE = {MULTIPROCESSING: "0"}
"""Environment in which a worker on CPUs may run in its engine's process (`UNI`).

vLLM otherwise gives even a single worker a process of its own, which imports vLLM once more: 15 s
of processor time.
"""
UNI = "--distributed-executor-backend=uni"


@contextmanager
def worker_in_engine() -> Iterator[None]:
    """The same for a ``vllm.LLM`` that is made within, whose engine keeps a process of its own."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(config: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(MULTIPROCESSING, "0")
            stock(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))
        yield


def own_core() -> int:
    """A core for each process of the suite, as far as there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    return cores[int(worker.removeprefix("gw")) % len(cores)]
