"""What every part of the test suite may use, and how its parts share the machine."""

from __future__ import annotations

import collections
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import engine_starts, heap
from tests.cores import BIND

# Read when Ray is imported: what a test leaves to the garbage collector must start no Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

# A folder has servers and engines that its tests share, so it stays in one process of the suite.
# The longest come first, so that none is waited for at the end.
PARTS = ("engine", "server/live", "scale/deploy", "server", "kernels", "scale/batch", "server/page")

# Engines compute with one thread each, on whichever core is free; by themselves all of a small
# machine's would be bound to the same core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(BIND, "nobind")

# Read when torch is imported. What computes in this process or is forked off it cannot be bound,
# and threads that wait for a core that another process has take milliseconds per operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Transformers and vLLM ask for it when they are imported, here and in what this process starts.
if importlib.util.find_spec("torchvision") is None:
    STANDINS = str(Path(__file__).parent / "standins")
    sys.path.append(STANDINS)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.environ.get("PYTHONPATH"), STANDINS])
    )

# How long an example takes says how busy the machine is.
settings.register_profile("flashtrace", parent=settings(), deadline=None)
settings.load_profile("flashtrace")

heap.import_without_collecting()

pytest_plugins = ["tests.measured"]


def pytest_collection_finish() -> None:
    """Leaves the modules of all tests out of garbage collection."""
    heap.leave_out_what_is_there()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the parts, so that the longest are begun first."""
    order = {part: i for i, part in enumerate(PARTS)}
    items.sort(key=lambda item: order.get(_part(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a folder to one process of the suite, as a whole."""
    from xdist.scheduler import LoadScopeScheduling

    class PartScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _part(nodeid)

    return PartScheduling(config, log)


def _part(nodeid: str) -> str:
    """The folder of ``tests`` that a test is in, as ``server/live``."""
    return nodeid.partition("::")[0].removeprefix("tests/").rpartition("/")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Takes over the starts that a process of the suite counted."""
    engine_starts.STARTED.extend(getattr(node, "workeroutput", {}).get("engine_starts", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the counted starts to the process that prints the summary."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["engine_starts"] = engine_starts.STARTED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints how many engines were started, and why."""
    if not engine_starts.STARTED:
        return
    terminalreporter.section(f"{len(engine_starts.STARTED)} engine starts")
    for reason, count in collections.Counter(engine_starts.STARTED).most_common():
        terminalreporter.line(f"{count:3} {reason}")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The bundled model, prepared once per machine."""
    from vllm_flashtrace.models import prepare_smollm2

    return prepare_smollm2()
