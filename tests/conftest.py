"""What every part of the test suite may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cores import BIND, own_core

# Read when Ray is imported: what a test leaves to the garbage collector must start no Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

# What may run beside what: each part of the suite has servers and engines that its tests share, so
# a part stays in one process. The longest come first, so that they are not waited for at the end.
PARTS = ("serving", "engine", "deploy", "kernels", "batch", "faithfulness")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(BIND, str(own_core()))


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Names the part of each test for ``--dist loadgroup``, and sorts the parts."""
    if not hasattr(config, "workerinput"):
        return
    parts = {item: _part(item.path) for item in items}
    for item, part in parts.items():
        item.add_marker(pytest.mark.xdist_group(part))
    order = {part: i for i, part in enumerate(PARTS)}
    items.sort(key=lambda item: order.get(parts[item], len(order)))


def _part(path: Path) -> str:
    """The folder of ``tests`` that a test is in."""
    return path.relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """Engines are bound as they would be for a user who has bound nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(BIND, raising=False)
        yield


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The bundled model, prepared once per machine."""
    from vllm_flashtrace.models import prepare_smollm2

    return prepare_smollm2()
