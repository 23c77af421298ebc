"""Writes the README's answer: starts the README's server and sends it the README's request.

    python -m docs.readme_example [--base-url URL]

With ``--base-url`` the request goes to a server that runs already. Nothing but the block between
``<!-- answer -->`` and ``<!-- /answer -->`` is changed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

README = Path(__file__).parents[1] / "README.md"
DIGITS = 4


def block(text: str, name: str) -> str:
    """The fenced block between a pair of markers, without the fence.

    Raises:
        ValueError: The markers do not stand exactly once around one fenced block.
    """
    pattern = rf"<!-- {name} -->\n```\w+\n(.*?)\n```\n<!-- /{name} -->"
    found = re.findall(pattern, text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"{len(found)} blocks named {name!r}, expected one")
    return str(found[0])


def serve_options(text: str) -> list[str]:
    """The options of the README's ``vllm-flashtrace serve`` command, behind the model."""
    program, command, _, *options = _words(block(text, "serve"))
    if (program, command) != ("vllm-flashtrace", "serve"):
        raise ValueError(f"expected vllm-flashtrace serve, got {program} {command}")
    return options


def _words(command: str) -> list[str]:
    """A shell command's words; ``shlex`` keeps the newline of a continued line."""
    return shlex.split(command.replace("\\\n", " "))


def request(text: str) -> tuple[str, dict[str, Any]]:
    """Path and body of the README's curl command."""
    _, address, *rest = _words(block(text, "request"))
    path = "/" + address.partition("/")[2]
    return path, json.loads(rest[rest.index("-d") + 1])


def answer(base_url: str, text: str) -> dict[str, Any]:
    """What the server answers, cut down to what the README shows: text and attribution.

    Raises:
        httpx.HTTPStatusError: The server refuses the request.
        RuntimeError: The trace has no result.
    """
    path, body = request(text)
    response = httpx.post(f"{base_url}{path}", json=body, timeout=300)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    if choice["flashtrace"]["status"] != "completed":
        raise RuntimeError(f"no attribution: {choice['flashtrace']}")
    return {
        "message": {"content": choice["message"]["content"]},
        "flashtrace": choice["flashtrace"],
    }


def rounded(value: Any) -> Any:
    """The same JSON with its floats at the digits that the README shows."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def written(value: Any, indent: int = 0, width: int = 140) -> str:
    """JSON with as much on a line as fits, so that a token or a sentence takes one line."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + len(line) <= width or not isinstance(value, dict | list) or not value:
        return line
    pad = " " * (indent + 2)
    if isinstance(value, list):
        inner = [written(item, indent + 2, width) for item in value]
        return "[\n" + ",\n".join(pad + item for item in inner) + "\n" + " " * indent + "]"
    lines: list[str] = []
    for key, item in value.items():
        start = f"{json.dumps(key)}: "
        entry = start + written(item, indent + 2, width)
        joined = f"{lines[-1]}, {entry}" if lines else ""
        if joined and "\n" not in joined and len(pad) + len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(entry)
    return "{\n" + ",\n".join(pad + item for item in lines) + "\n" + " " * indent + "}"


def with_answer(text: str, shown: dict[str, Any]) -> str:
    """The README with ``shown`` as its answer."""
    pattern = re.compile(r"(<!-- answer -->\n).*?(<!-- /answer -->)", re.DOTALL)
    fenced = f"```json\n{written(rounded(shown))}\n```\n"
    return pattern.sub(lambda found: found[1] + fenced + found[2], text)


def main() -> int:
    """Asks and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", help="a server that was started as the README says")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    if options.base_url:
        shown = answer(options.base_url, text)
    else:
        from tests.server.live_server import OURS, serve
        from vllm_flashtrace.models import prepare_smollm2

        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "server.log"
            model = str(prepare_smollm2())
            options = serve_options(text)
            with serve(OURS, model, log, *options, worker_process=True) as server:
                shown = answer(server.url, text)
    README.write_text(with_answer(text, shown), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
