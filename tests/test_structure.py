"""The floor plan: imports only go down, and no two modules share a name.

``python -m tests.test_structure`` prints the imports between rooms as a table.
"""

from __future__ import annotations

import ast
import collections
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the cellar to the roof; a room may import from itself and from those before it. The entry
# points of the package (`vllm_flashtrace` and `vllm_flashtrace.plugin`) are the roof.
ROOMS = (
    "base",
    "core",
    "kernels",
    "api",
    "text",
    "trace",
    "worker",
    "patches",
    "server",
    "offline",
    "scale",
    "models",
    "commands",
    "roof",
)
PURE_ROOMS = ("core", "kernels")
# Where functions import, when they are called, what imports their module.
CIRCULAR_ROOMS = ("kernels", "api")
PURE_IMPORTS = {"numpy", "torch", "triton", "vllm_flashtrace"}


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for folder, prefix in ((ROOT / "vllm_flashtrace", "vllm_flashtrace"), (ROOT / "patches", "")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            head = prefix.split(".") if prefix else ["vllm_flashtrace", "patches"]
            name = ".".join([*head, *parts])
            found[name.removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "roof"


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Imported modules and names, each with whether it is imported when the module is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in lazy


def arrows() -> collections.Counter[tuple[str, str, str]]:
    """Counts (file, its room, room it imports from) of imports within the package."""
    known = modules()
    found: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for name, path in known.items():
        for target, _ in imports_of(path):
            if not target.startswith("vllm_flashtrace"):
                continue
            module = target if target in known else target.rpartition(".")[0]
            place = str(path.relative_to(ROOT)).removeprefix("vllm_flashtrace/")
            found[place, room_of(name), room_of(module)] += 1
    return found


def test_imports_only_go_down() -> None:
    upward = sorted(
        f"{file} ({room}) imports from {target}"
        for file, room, target in arrows()
        if ROOMS.index(target) > ROOMS.index(room)
    )
    assert not upward, "\n".join(upward)


def test_no_imports_in_a_circle() -> None:
    """Imports for types and within functions count, too."""
    known = modules()
    graph = {
        name: {
            target if target in known else target.rpartition(".")[0]
            for target, _ in imports_of(path)
            if target.startswith("vllm_flashtrace")
        }
        - {name}
        for name, path in known.items()
        if room_of(name) not in CIRCULAR_ROOMS
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_no_two_modules_share_a_name() -> None:
    names = collections.Counter(path.stem for path in modules().values() if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_the_maths_knows_no_engine() -> None:
    import sys

    for name, path in modules().items():
        if room_of(name) in PURE_ROOMS:
            for target, _ in imports_of(path):
                top = target.partition(".")[0]
                assert top in PURE_IMPORTS or top in sys.stdlib_module_names, f"{path}: {target}"


def test_every_room_is_in_the_wheel() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert packages == set(listed)


def table() -> str:
    """Imports between rooms: a row for each room, a column for each room it imports from."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for (_, room, target), count in arrows().items():
        counts[room, target] += count
    lines = ["| | " + " | ".join(ROOMS) + " |", "| --- |" + " ---: |" * len(ROOMS)]
    for room in ROOMS:
        cells = (str(counts[room, target] or "") for target in ROOMS)
        lines.append(f"| **{room}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
