"""A process that is gone, or going, when a stopping server asks who has its port."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
import pytest


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """What the launcher finds where vLLM finds the given process."""
    from vllm.entrypoints.launchers import launcher

    from vllm_flashtrace.patches import port_owner

    def finding(process: Any) -> Any:
        monkeypatch.setattr(launcher, "find_process_using_port", lambda port: process)
        port_owner.check()
        port_owner.apply()
        return launcher.find_process_using_port(8000)

    return finding


def test_a_zombie_has_no_command_line_and_is_not_named(find):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    process = psutil.Process(child)
    with pytest.raises(psutil.ZombieProcess):
        process.cmdline()
    assert find(process) is None
    os.waitpid(child, 0)
    assert find(process) is None


def test_another_process_is_named_as_vllm_names_it(find):
    process = psutil.Process(os.getppid())
    owner = find(process)
    assert owner.cmdline() == process.cmdline()
    assert str(owner) == str(process)


def test_nobody_is_nobody(find):
    assert find(None) is None
