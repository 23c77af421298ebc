"""Which processes say that they carry the patches."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_flashtrace.base import process


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        # The plugin may have been loaded into this process, too.
        env={**os.environ, "FLASHTRACE_PROCESSES": "[]"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def test_a_started_process_knows_its_ancestors_and_itself():
    child = (
        "from vllm_flashtrace.base import process as p; p.note_process(['b']); print(p.lineage())"
    )
    out = run(
        "import subprocess, sys, os; from vllm_flashtrace.base import process as p\n"
        "p.note_process(['a']); p.note_process(['a'])\n"
        f"out = subprocess.check_output([sys.executable, '-c', {child!r}], text=True)\n"
        "import ast, json; print(json.dumps([os.getpid(), ast.literal_eval(out)]))"
    )
    pid, entries = json.loads(out)
    assert [entry["patches"] for entry in entries] == [["a"], ["b"]]
    assert entries[0]["pid"] == pid != entries[1]["pid"]
    assert all(entry["name"] for entry in entries)


def test_a_forked_process_is_in_the_list_too():
    out = run(
        "import multiprocessing, json; from vllm_flashtrace.base import process as p\n"
        "p.note_process(['a'])\n"
        "context = multiprocessing.get_context('fork'); queue = context.SimpleQueue()\n"
        "fork = context.Process(target=lambda: queue.put(p.lineage())); fork.start()\n"
        "entries = queue.get(); fork.join()\n"
        "print(json.dumps([fork.pid, len(p.lineage()), entries]))"
    )
    forked, own, entries = json.loads(out)
    assert own == 1
    assert [entry["patches"] for entry in entries] == [["a"], ["a"]]
    assert entries[1]["pid"] == forked


@pytest.mark.parametrize("value", ["nonsense", '[{"pid": "x", "patches": []}]', '{"pid": 1}'])
def test_a_foreign_value_in_the_environment_is_not_believed(monkeypatch, value):
    monkeypatch.setenv("FLASHTRACE_PROCESSES", value)
    assert process.lineage() == []
