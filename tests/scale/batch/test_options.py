from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.scale import ray_cluster
from vllm_flashtrace.scale.batch import batch_replica as slots
from vllm_flashtrace.scale.batch.batch_replica import Slot
from vllm_flashtrace.scale.batch.dataset import as_argv, workers_of
from vllm_flashtrace.scale.batch.run_batch import (
    _reason,
    engine_argv,
    parse_flashtrace,
    parse_replicas,
    progress,
)
from vllm_flashtrace.scale.ray_cluster import Interrupted, stop_on_signals


def test_keywords_become_options() -> None:
    arguments = {
        "max_model_len": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "revision": None,
        "served_model_name": ["a", "b"],
        "additional_config": {"x": 1},
    }
    assert as_argv(arguments) == (
        "--max-model-len",
        "8",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--served-model-name",
        "a",
        "b",
        "--additional-config",
        '{"x": 1}',
    )


@pytest.mark.parametrize(
    ("argv", "workers"),
    [
        ([], 1),
        (["--tensor-parallel-size", "2"], 2),
        (["-tp=2", "--pipeline_parallel_size", "3", "-dp", "2"], 12),
    ],
)
def test_workers(argv: list[str], workers: int) -> None:
    assert workers_of(argv) == workers


@pytest.mark.parametrize("argv", [["-tp"], ["-tp", "x"], ["-tp=0"]])
def test_bad_parallel_sizes(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        workers_of(argv)


def test_replicas() -> None:
    assert parse_replicas("2") == (2, 2)
    assert parse_replicas("1-4") == (1, 4)
    for bad in ("", "0", "x", "4-1", "1-", "-2"):
        with pytest.raises(ValueError, match="--replicas"):
            parse_replicas(bad)


def test_flashtrace_default() -> None:
    assert parse_flashtrace("true") is True
    assert parse_flashtrace('{"hops": 2}') == {"hops": 2}
    with pytest.raises(ValueError, match="JSON"):
        parse_flashtrace("{")
    with pytest.raises(InvalidRequestError, match=r"flashtrace\.hops"):
        parse_flashtrace('{"hops": -1}')
    with pytest.raises(ValueError, match="inline"):
        parse_flashtrace('{"mode": "deferred"}')


def test_options_of_a_server_are_refused() -> None:
    assert engine_argv(["--max-model-len", "8"]) == ("--max-model-len", "8")
    with pytest.raises(ValueError, match="--port"):
        engine_argv(["--port=1"])


def test_a_slot_is_free_when_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path))
    child = os.fork()
    if not child:
        Slot("g")
        os.kill(os.getpid(), signal.SIGKILL)
    first, second = Slot("g"), None
    os.waitpid(child, 0)
    second = Slot("g")
    assert {first.number, second.number} == {0, 1}


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the handlers of signals back, which stay ignored after one."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_once(number: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted) as stopped, stop_on_signals(), stop_on_signals():
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # Ignored while the run is cleaned up.
    assert stopped.value.code == code


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_became_another_exception_stops_as_well() -> None:
    with pytest.raises(Interrupted) as stopped, stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted as error:
            raise SystemError("returned a result with an exception set") from error
    assert stopped.value.code == 143


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_was_dropped_stops_at_the_next_turn_or_the_end() -> None:
    with pytest.raises(Interrupted), stop_on_signals() as stopping:
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stopping.check()


@pytest.mark.usefixtures("handlers")
def test_without_a_signal_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stopping:
        stopping.check()
    with pytest.raises(SystemError), stop_on_signals():
        raise SystemError
    assert signal.getsignal(signal.SIGTERM) == before


class SlowRay:
    """Is not up in time so many times; leaves a process behind each time."""

    def __init__(
        self, times: int, message: str = "The current node timed out during startup."
    ) -> None:
        self.times, self.message = times, message
        self.left: list[subprocess.Popen[bytes]] = []
        self.up = False

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        if len(self.left) == self.times:
            self.up = True
            return
        self.left.append(subprocess.Popen(["sleep", "600"]))
        raise RuntimeError(self.message)

    def shutdown(self) -> None:
        self.up = False


@pytest.mark.parametrize(
    ("ray", "starts"),
    [(SlowRay(2), True), (SlowRay(9), False), (SlowRay(1, "no such option"), False)],
)
def test_a_ray_that_comes_too_late_is_started_again(
    ray: SlowRay, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: ray)
    refused = pytest.raises(ray_cluster.RayUnavailableError, match=ray.message)
    try:
        with nullcontext() if starts else refused, ray_cluster.connect():
            assert ray.up
        *earlier, last = ray.left
        for child in [*earlier, last] if starts else earlier:
            assert child.wait(60) == -signal.SIGKILL
        assert starts or last.poll() is None
    finally:
        for child in ray.left:
            child.kill()
            child.wait()


def test_progress_without_a_terminal() -> None:
    console = io.StringIO()
    with progress(console, 10, 4) as report:
        report(3, 1)
        report(3, 0)
    assert console.getvalue().splitlines()[-1].startswith("10/10 rows, 1 errors, ")


def test_the_reason_is_what_the_replica_said() -> None:
    error = RuntimeError("Traceback…\nreplica.ReplicaError: no such model\nmore of Ray's\n")
    assert _reason(error) == "no such model"
    assert _reason(RuntimeError("first\nlast\n")) == "last"
