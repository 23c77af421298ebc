"""Starting a Ray of its own, and joining one; processes whose parent is gone. No engine.

The Ray is another than the one of ``test_ray.py``: what it listens on and what is left of it can be
told only of a process that starts it and ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

pytestmark = pytest.mark.timeout(600)

_OWN = """
import sys
from vllm_flashtrace.scale.ray_cluster import connect
with connect(num_cpus=3, object_store_memory=100 << 20) as ray:
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
    print(ray.get(ray.remote(lambda: "goes on").remote()), flush=True)
"""
_JOIN = """
from vllm_flashtrace.scale.ray_cluster import connect
with connect(num_cpus=1, object_store_memory=90 << 20) as ray:
    print(ray.cluster_resources()["CPU"], ray.get_runtime_context().gcs_address)
"""
_PARENT = """
import multiprocessing, os, sys, time
from vllm_flashtrace.base.process import end_engine_with_this_process, end_with_parent_if_asked

def child():
    end_with_parent_if_asked()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    if sys.argv[1:] == ["asked"]:
        end_engine_with_this_process()
    multiprocessing.get_context("fork").Process(target=child).start()
"""


@contextmanager
def python(code: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "RAY_ADDRESS": "", **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(120)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def listening(process: psutil.Process) -> set[str]:
    """Addresses that a process listens on."""
    try:
        found = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return set()
    return {entry.laddr.ip for entry in found if entry.status == psutil.CONN_LISTEN}


def test_a_ray_of_its_own_is_local_and_outlives_who_joins_it() -> None:
    with python(_OWN) as own:
        address = line(own)
        children = psutil.Process(own.pid).children(recursive=True)
        addresses = set().union(*map(listening, children))
        assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        # A Ray that is started here guards itself with a token, which those who join have to want.
        with python(_JOIN, RAY_ADDRESS=address, RAY_AUTH_MODE="token") as joined:
            assert line(joined) == f"3.0 {address}"
            assert joined.wait(120) == 0
        assert own.stdin is not None
        own.stdin.write("\n")
        own.stdin.flush()
        assert line(own) == "goes on"
        assert own.wait(120) == 0
    assert psutil.wait_procs(children, timeout=120)[1] == []


@pytest.mark.parametrize("asked", [True, False])
def test_a_process_ends_with_its_parent_if_that_asked(asked: bool) -> None:
    with python(_PARENT, *(["asked"] if asked else []), FLASHTRACE_END_WITH_PARENT="") as parent:
        child = psutil.Process(int(line(parent)))
    _, alive = psutil.wait_procs([child], timeout=120 if asked else 1)
    try:
        assert bool(alive) is not asked
    finally:
        for process in alive:
            process.kill()
