"""The README is short, and what it shows is what a reader gets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from docs import readme_example
from tests import engine_starts
from tests.server.live_server import OURS, Server, serve

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
SHOWN: dict[str, Any] = json.loads(readme_example.block(TEXT, "answer"))
# One unit in the last digit shown: a number may lie on the edge of two.
TOLERANCE = 1.01 * 10**-readme_example.DIGITS


def test_it_is_a_front_page() -> None:
    assert len(TEXT.encode()) <= 8192


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert "://" in target or (ROOT / target).exists(), target


def test_request_goes_to_the_model_that_is_served() -> None:
    path, body = readme_example.request(TEXT)
    assert path == "/v1/chat/completions"
    options = readme_example.serve_options(TEXT)
    assert options[options.index("--served-model-name") + 1] == body["model"]


def test_answer_is_written_as_the_script_writes_it() -> None:
    assert readme_example.with_answer(TEXT, SHOWN) == TEXT


@pytest.fixture(scope="module")
def server(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the README's command starts it: every process imports vLLM and the plugin itself."""
    options = readme_example.serve_options(TEXT)
    engine_starts.note("README: the server as its command starts it")
    log = tmp_path_factory.mktemp("readme") / "server.log"
    with serve(
        OURS, str(smollm2_folder), log, *options, worker_process=True, by_command=True
    ) as running:
        yield running


@pytest.mark.timeout(600)
def test_answer_is_the_servers(server: Server) -> None:
    answer = readme_example.answer(server.url, TEXT)
    got, shown = _comparable(answer), _comparable(SHOWN)
    assert _structure(got) == _structure(shown)
    assert _numbers(got) == pytest.approx(_numbers(shown), abs=TOLERANCE)
    best = max(answer["flashtrace"]["sentences"], key=lambda sentence: sentence["mean"])
    assert best["text"] == "The access code for Lisbon is 7306."


@pytest.mark.timeout(600)
def test_every_process_of_the_server_has_the_patches_and_the_secret(server: Server) -> None:
    report = httpx.get(f"{server.url}/v1/attributions/status", timeout=30).json()
    assert report["status"] == "ready"
    [worker] = report["engine"]["workers"]
    processes = [*report["processes"], *worker["processes"]]
    assert len({process["pid"] for process in processes}) >= 3
    assert len({tuple(sorted(process["patches"])) for process in worker["processes"]}) == 1
    environments = [child.environ() for child in psutil.Process(server.pid).children(True)]
    [secret] = {e["FLASHTRACE_SECRET"] for e in environments if "VLLM_PLUGINS" in e}
    assert len(secret) >= 32
    assert secret not in server.log.read_text(errors="replace")


@pytest.mark.timeout(600)
def test_offline_sample_runs_as_it_stands(smollm2_folder: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    code = readme_example.block(TEXT, "offline")
    # Engines start as processes that import the program's own file.
    sample.write_text(f'if __name__ == "__main__":\n{_indented(code)}', "utf-8")
    engine_starts.note("README: the offline sample as it stands")
    done = subprocess.run(
        [sys.executable, sample], cwd=tmp_path, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "7306" in done.stdout
    assert done.stdout.count("TokenScore(") == 5 + 3
    assert "7306" in (tmp_path / "answer.html").read_text("utf-8")


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in code.splitlines())


def _comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two runs: id and seconds, whose form is checked here."""
    attribution = answer["flashtrace"]
    assert re.fullmatch(r"ft-[0-9a-f]{32}", attribution["id"])
    seconds = attribution["usage"]["seconds"]
    assert all(value >= 0 for value in seconds.values())
    usage = {**attribution["usage"], "seconds": dict.fromkeys(seconds)}
    return {**answer, "flashtrace": {**attribution, "id": "", "usage": usage}}


def _structure(value: Any) -> Any:
    """The same JSON with every number that is not whole blanked."""
    if isinstance(value, dict):
        return {key: _structure(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_structure(item) for item in value]
    return float if isinstance(value, float) else value


def _numbers(value: Any) -> list[float]:
    """Those numbers, in order."""
    if isinstance(value, float):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for part in parts for number in _numbers(part)]
