"""Fills the documentation's ``{{ name }}`` markers from the code and from files of the repository.

MkDocs calls :func:`on_page_markdown` for every page. A marker that nothing here fills stops the
build, so a page never shows a table of something that is gone.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARKER = re.compile(r"^\{\{ (\w+)(?: ([\w./-]+))? \}\}$", re.MULTILINE)
_TABLE_MARKER = re.compile(r"^(<!-- /?\w+(?::\w+)? -->)\n", re.MULTILINE)
_TYPES = {"null": "null", "boolean": "boolean", "integer": "integer", "number": "number"}
# Files of the repository that are pages as well, by their path from the root.
FILES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook: replaces the markers of one page."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """The page with its markers replaced.

    Raises:
        KeyError: A marker has no generator.
    """

    def replace(found: re.Match[str]) -> str:
        generator = GENERATORS[found[1]]
        return generator(found[2]) if found[2] else generator()

    # Markdown takes a table only behind an empty line.
    return _TABLE_MARKER.sub(r"\n\1\n\n", _MARKER.sub(replace, markdown))


def file(name: str) -> str:
    """A file of the repository, its links pointing to the pages of this site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    folder = Path(name).parent

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found[1].partition("#")
        if "://" in target or not target:
            return found[0]
        path = os.path.normpath(folder / target)
        page = FILES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None:
            raise ValueError(f"{name} links to {target}, which is no page")
        return f"]({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def request_table() -> str:
    """Keys of the ``flashtrace`` field."""
    from vllm_flashtrace.api.request import FlashTraceRequest

    return _fields_table(FlashTraceRequest.model_json_schema(), with_default=True)


def target_table() -> str:
    """The objects that name a part of the generated text."""
    from vllm_flashtrace.api.request import TARGETS

    rows = []
    for model in TARGETS.values():
        schema = model.model_json_schema()
        for name, field in schema["properties"].items():
            description = field.get("description", "")
            rows.append([f"`{name}`", _type(field, schema), description])
    return _table(["key", "type", "meaning"], rows)


def source_table() -> str:
    """A source that the request marks, and sources with a separator between them."""
    from vllm_flashtrace.api.request import CitationOptions, MarkedSource, SeparatedSources

    schemas = [
        model.model_json_schema() for model in (MarkedSource, SeparatedSources, CitationOptions)
    ]
    return "\n\n".join(
        f"#### {schema['title']}\n\n{schema['description']}\n\n{_fields_table(schema)}"
        for schema in schemas
    )


def guard_table() -> str:
    """Options of the guard."""
    from vllm_flashtrace.api.request import GuardOptions

    schema = GuardOptions.model_json_schema()
    return f"#### {schema['title']}\n\n{_fields_table(schema, with_default=True)}"


def request_limits() -> str:
    """The most that one request may ask for."""
    from vllm_flashtrace.api.request import RequestLimits

    limits = [f for f in dataclasses.fields(RequestLimits) if not isinstance(f.default, bool)]
    rows = [[f"`{f.name}`", f"{f.default:,}"] for f in limits]
    return _table(["limit", "value"], rows)


def response_tables() -> str:
    """The attribution object and the objects in it."""
    from vllm_flashtrace.api.response import AttributionObject

    schema = AttributionObject.model_json_schema()
    parts = [_fields_table(schema)]
    for name, part in schema["$defs"].items():
        title = f"### {name}\n\n{part.get('description', '').splitlines()[0]}"
        parts.append(f"{title}\n\n{_fields_table({**part, '$defs': schema['$defs']})}")
    return "\n\n".join(parts)


def options_table() -> str:
    """Options of the server, from the configuration model."""
    from vllm_flashtrace.trace.config import FlashTraceConfig

    texts = _attributes(FlashTraceConfig)
    schema = FlashTraceConfig.model_json_schema()
    rows = []
    for name, field in schema["properties"].items():
        text = field.get("description") or texts[name]
        default = f"`{json.dumps(field['default'])}`"
        rows.append([f"`{name}`", default, _range(field), text])
    return _table(["option", "default", "range", "meaning"], rows)


def cli_help() -> str:
    """What ``--help`` prints for the program and for each command."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from vllm_flashtrace.commands.cli import PROGRAM, app
    from vllm_flashtrace.server.launcher import serve_help

    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    commands: Mapping[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    parts = [
        _help(runner, app, PROGRAM, []),
        f"## serve\n\n```text\n{serve_help()}\n```",
    ]
    for name, command in commands.items():
        if command.add_help_option:
            parts.append(f"## {name}\n\n" + _help(runner, app, PROGRAM, [name]))
    return "\n\n".join(parts)


def _help(runner: Any, app: Any, program: str, words: list[str]) -> str:
    result = runner.invoke(app, [*words, "--help"], prog_name=program)
    if result.exit_code:
        raise RuntimeError(f"{program} {words} --help: {result.output}")
    return f"```text\n{result.output.strip()}\n```"


def imports_table() -> str:
    """How often each room imports from each other one."""
    # Run as its readers run it: MkDocs takes back what a hook adds to ``sys.path``.
    command = [sys.executable, "-m", "tests.test_structure"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def patches_table() -> str:
    """The patches, each with what it changes and why, from their docstrings."""
    import ast

    rows = []
    for path in sorted((ROOT / "patches").glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summary = text.split("\n\n")[0].replace("\n", " ")
        rows.append([f"`{path.stem}`", summary.rstrip(".").replace("``", "`")])
    return _table(["module", "purpose"], rows)


def tested_vllm() -> str:
    """The vLLM versions that the patches were tested on."""
    from vllm_flashtrace.patches import TESTED_VLLM_VERSIONS

    return f"Tested on vLLM {', '.join(TESTED_VLLM_VERSIONS)}."


def _fields_table(schema: Mapping[str, Any], with_default: bool = False) -> str:
    rows = []
    for name, field in schema["properties"].items():
        row = [f"`{name}`", _type(field, schema)]
        if with_default:
            row.append(f"`{json.dumps(field['default'])}`")
        rows.append([*row, field.get("description", "")])
    head = ["key", "type", *(["default"] if with_default else []), "meaning"]
    return _table(head, rows)


def _type(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The type of a field in a few words."""
    if "anyOf" in field:
        kinds = [_type(part, schema) for part in field["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        keys = list(schema["$defs"][name]["properties"])
        if name.endswith("Target"):
            return "`{" + ", ".join(f'"{key}"' for key in keys) + "}`"
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    kind = field.get("type")
    if kind == "array":
        if "prefixItems" in field:
            return "[" + ", ".join(_type(item, schema) for item in field["prefixItems"]) + "]"
        return f"list of {_type(field['items'], schema)}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"object of {_type(values, schema)}" if isinstance(values, Mapping) else "object"
    return _TYPES.get(str(kind), str(kind))


def _range(field: Mapping[str, Any]) -> str:
    """The bounds of a number, also of one that may be null."""
    parts = [field, *field.get("anyOf", ())]
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
    }
    found = [
        word.format(f"{part[key]:g}")
        for part in parts
        for key, word in words.items()
        if key in part
    ]
    return ", ".join(found)


def _attributes(model: type) -> dict[str, str]:
    """The ``Attributes:`` section of a class's docstring."""
    text = inspect.getdoc(model) or ""
    section = text.partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.split()).replace("``", "`") for name, words in found}


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return (
            "| " + " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells) + " |"
        )

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


GENERATORS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        cli_help,
        file,
        imports_table,
        options_table,
        patches_table,
        request_limits,
        request_table,
        response_tables,
        source_table,
        guard_table,
        target_table,
        tested_vllm,
    )
}
