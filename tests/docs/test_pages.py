"""The documentation's pages: every marker is filled from the code, and the site builds strictly."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from docs import hooks
from vllm_flashtrace.api.request import FlashTraceRequest, RequestLimits
from vllm_flashtrace.api.response import AttributionObject
from vllm_flashtrace.trace.config import FlashTraceConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def _keys(table: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_markers_are_filled(page: Path) -> None:
    filled = hooks.filled(page.read_text("utf-8"))
    assert "{{ " not in re.sub(r"```.*?```", "", filled, flags=re.DOTALL)


def test_an_unknown_marker_stops_the_build() -> None:
    with pytest.raises(KeyError):
        hooks.filled("{{ nothing }}")


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r": ([\w-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_tables_have_every_field() -> None:
    assert _keys(hooks.request_table()) == list(FlashTraceRequest.model_fields)
    assert _keys(hooks.options_table()) == list(FlashTraceConfig.model_fields)
    assert _keys(hooks.request_limits()) == [
        name for name in RequestLimits.__slots__ if name != "heads"
    ]
    top = hooks.response_tables().split("\n\n")[0]
    assert _keys(top) == list(AttributionObject.model_fields)


def test_every_option_and_key_has_a_meaning() -> None:
    for table in (hooks.request_table(), hooks.target_table(), hooks.options_table()):
        for line in table.splitlines():
            assert not line.endswith("|  |"), line


def test_every_command_is_shown() -> None:
    shown = hooks.cli_help()
    for name in ("serve", "trace", "batch", "deploy", "fit-heads", "demo"):
        assert f"## {name}\n" in shown


def test_every_patch_is_listed() -> None:
    modules = {path.stem for path in (ROOT / "patches").glob("[!_]*.py")}
    assert set(_keys(hooks.patches_table())) == modules


def test_links_between_files_of_the_repository() -> None:
    for name in hooks.FILES:
        text, folder = (ROOT / name).read_text("utf-8"), (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in target or (folder / target).exists(), f"{name}: {target}"


def test_commands_and_paths_in_the_text_exist() -> None:
    for path in [*PAGES, *(ROOT / name for name in hooks.FILES)]:
        text = path.read_text("utf-8")
        for module in re.findall(r"python -m ([\w.]+)", text):
            if module != "pytest":
                file = ROOT / module.replace(".", "/")
                assert file.is_dir() or file.with_suffix(".py").exists(), f"{path.name}: {module}"
        for place in re.findall(r"\b(?:tests|examples|benchmarks|ops)/[\w/.-]*\w", text):
            assert (ROOT / place).exists(), f"{path.name}: {place}"
        for room, module in re.findall(r"`(\w+)/(\w+\.py)`", text):
            assert list(ROOT.glob(f"**/{room}/{module}")), f"{path.name}: {room}/{module}"


@pytest.mark.skipif(find_spec("material") is None, reason="make docs has not been run")
def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)\b[^>]*\bsrc=\"([^\"]+)|<link\b[^>]*rel=\"stylesheet\"[^>]*href=\"([^\"]+)|"
            r"<link\b[^>]*href=\"([^\"]+)\"[^>]*rel=\"stylesheet\"",
            page.read_text("utf-8"),
        )
        assert [url for urls in loaded for url in urls if "//" in url] == []
        assert any(url for urls in loaded for url in urls)


def test_mkdocs_takes_no_fonts_from_the_network() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert yaml.safe_load(text)["theme"]["font"] is False
