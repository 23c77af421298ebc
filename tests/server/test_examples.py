"""The examples, run as a reader runs them, and what they print."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.server.live_server import OURS, Server, serve
from tests.server.page_server import PageServer, served

EXAMPLES = Path(__file__).parents[2] / "examples"
RECORDING: dict[str, Any] = json.loads((EXAMPLES / "injected_agent.json").read_text("utf-8"))
OPTIONS = [
    f"--chat-template={EXAMPLES / 'tool_calls.jinja'}",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tool_server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose chat template writes tool calls."""
    log = tmp_path_factory.mktemp("examples") / "server.log"
    with serve(OURS, model_path, log, *OPTIONS, VLLM_ENABLE_COHERE_API="1") as running:
        yield running


@pytest.fixture(scope="module")
def scripted(plugins: None, model_path: str) -> Iterator[PageServer]:
    with served(model_path, *OPTIONS) as server:
        yield server


def start(url: str, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable] if name.endswith(".py") else ["bash"]
    return subprocess.run(
        [*program, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "FLASHTRACE_BASE_URL": url, "COLUMNS": "100"},
        timeout=120,
        check=False,
    )


def run(url: str, name: str, *arguments: str) -> str:
    done = start(url, name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(tool_server):
    output = run(tool_server.url, "curl.sh")
    found = re.findall(r"^\{$.*?^\}$", output, re.MULTILINE | re.DOTALL)
    chat, existing, fetched, deleted = map(json.loads, found)
    [choice] = chat["choices"]
    assert "7306" in choice["message"]["content"]
    assert choice["flashtrace"]["status"] == "completed"
    assert len(choice["flashtrace"]["scores"]) == 5
    assert existing["target"]["text"] == "7306"
    assert fetched["status"] == "completed"
    assert deleted["id"] == fetched["id"]


def test_openai_client(tool_server, tmp_path):
    page = tmp_path / "page.html"
    output = run(tool_server.url, "openai_client.py", "--html", str(page))
    assert re.search(r"Answer: .*7306", output)
    [share] = re.findall(r"(\d+)% of the input is in: The secret access code", output)
    assert int(share) >= 20  # The fact has 14 of 69 tokens with the template's.
    assert "7306" in page.read_text("utf-8")


def test_streaming(tool_server):
    output = run(tool_server.url, "streaming.py")
    assert "153 steps" in output
    assert "status: completed" in output
    rows = re.findall(r"^ *([\d.]+)  '", output, re.MULTILINE)
    assert len(rows) == 8
    assert [float(row) for row in rows] == sorted(map(float, rows), reverse=True)


def test_sources_of_a_retrieved_answer(tool_server):
    output = run(tool_server.url, "rag_with_sources.py")
    assert "153" in output
    rows = re.findall(r"\[(\d)\] (\w+\.txt) .*?([\d.]+)%", output)
    assert [name for _, name, _ in rows][2] == "lighthouse.txt"
    shares = {name: float(share) for _, name, share in rows}
    assert max(shares, key=shares.__getitem__) == "lighthouse.txt"
    assert sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert "[3]" in output.partition("Share of the answer")[0]


def test_citations_in_four_forms(tool_server):
    output = run(tool_server.url, "citations.py")
    answer, *forms = output.split("\n\nPOST ")
    assert [form.partition(",")[0] for form in forms] == [
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/cohere/v2/chat",
    ]
    chat, response, message, cohere = (form.splitlines()[1:] for form in forms)
    assert chat and all(line.split("'")[1] in answer for line in chat)
    sources = [
        [re.findall(r"<- (?:source:)?(\w+)", line)[0] for line in each]
        for each in (chat, response, cohere)
    ]
    assert sources[0] == sources[1] == sources[2]
    assert {name for each in sources for name in each} <= {"Lighthouse", "Ferry", "Museum"}
    assert message  # Its prompt is another one, with the documents where the blocks were.


def test_injected_instruction_is_exposed(tool_server):
    output = run(tool_server.url, "agent_with_tools.py", "--replay")
    assert "send_email(to='backup@mail-vault.example') came from" in output
    shares = {where: float(share) for share, where in re.findall(r"([\d.]+)%  (\d \w+)", output)}
    injected = next(
        i for i, m in enumerate(RECORDING["messages"]) if "mail-vault" in str(m["content"])
    )
    assert next(iter(shares)) == f"{injected} tool"
    assert shares[f"{injected} tool"] > 50
    assert f"STOPPED: message {injected} tool" in output


class Script(list[str]):
    """Answers that are given one after the other."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__(answers)
        self._left = iter(answers)

    def __getitem__(self, index: Any) -> Any:
        return next(self._left)


def test_agent_loop_stops_the_call(scripted):
    written = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{call['function']['arguments']}}}\n</tool_call>"
        for message in RECORDING["messages"]
        for call in message.get("tool_calls", [])
    ]
    scripted.engine.answers = Script(written)
    output = run(scripted.url, "agent_with_tools.py")
    assert re.findall(r"The agent calls (\w+)", output) == [
        "list_inbox",
        "read_email",
        "get_address_book",
        "send_email",
    ]
    # The scripted engine spreads its scores evenly, so the longest message leads.
    assert "send_email(to='backup@mail-vault.example') came from" in output
    assert "STOPPED: message 5 tool decided on 'to'" in output
    assert len(scripted.engine.generations) == 4


def test_agent_loop_of_a_model_that_calls_nothing(scripted):
    scripted.engine.reset()
    scripted.engine.answers = ["There is no offsite."]
    output = run(scripted.url, "agent_with_tools.py")
    assert output.strip() == "The agent answers: There is no offsite."


class Refusing(BaseHTTPRequestHandler):
    """Lists one model and refuses everything else, as vLLM does where a template is missing."""

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(400, {"error": {"message": "you must provide a chat template", "code": 400}})

    def log_message(self, *_: Any) -> None:
        pass


NEEDED = {
    "curl.sh": "vllm-flashtrace serve",
    "openai_client.py": "vllm-flashtrace serve",
    "streaming.py": "vllm-flashtrace serve",
    "rag_with_sources.py": "vllm-flashtrace serve",
    "agent_with_tools.py": "--enable-auto-tool-choice --tool-call-parser hermes",
}


@pytest.mark.parametrize("name", NEEDED)
def test_an_example_says_which_server_it_needs(name):
    if name == "curl.sh" and shutil.which("curl") is None:
        pytest.skip("there is no curl")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused = start(url, name)
        server.shutdown()
    absent = start(url, name)
    for done, reason in ((refused, "you must provide a chat template"), (absent, url)):
        assert done.returncode == 1
        assert reason in done.stderr
        assert NEEDED[name] in done.stderr
        assert "Traceback" not in done.stderr
