from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from vllm_flashtrace.models import folder_cache
from vllm_flashtrace.models.folder_cache import MANIFEST, build_once, cache_root, is_intact


class Builder:
    """Writes two files and counts how often it was asked to."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.runs = 0
        self.seconds = seconds

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        time.sleep(self.seconds)
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(b"abc")


def test_builds_once(tmp_path: Path) -> None:
    build = Builder()
    folder = build_once(tmp_path / "deep" / "model", "v1", build)
    assert build_once(folder, "v1", build) == folder == tmp_path / "deep" / "model"
    assert build.runs == 1
    assert {path.name for path in folder.iterdir()} == {"config.json", "weights", MANIFEST}
    assert is_intact(folder, "v1")


def test_another_source_builds_again(tmp_path: Path) -> None:
    build = Builder()
    folder = build_once(tmp_path / "model", "v1", build)
    build_once(folder, "v2", build)
    assert build.runs == 2
    assert not is_intact(folder, "v1")


@pytest.mark.parametrize("damage", ["remove", "truncate", "change", "manifest", "no-manifest"])
def test_damage_is_found_and_repaired(tmp_path: Path, damage: str) -> None:
    build = Builder()
    folder = build_once(tmp_path / "model", "v1", build)
    if damage == "remove":
        (folder / "weights").unlink()
    elif damage == "truncate":
        (folder / "weights").write_bytes(b"ab")
    elif damage == "change":
        (folder / "weights").write_bytes(b"abd")
    elif damage == "manifest":
        (folder / MANIFEST).write_text("[]")
    else:
        (folder / MANIFEST).unlink()
    assert not is_intact(folder, "v1")
    build_once(folder, "v1", build)
    assert build.runs == 2
    assert (folder / "weights").read_bytes() == b"abc"


def test_large_files_are_checked_by_size_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_cache, "SMALL_FILE_BYTES", 2)
    folder = build_once(tmp_path / "model", "v1", Builder())
    (folder / "weights").write_bytes(b"abd")
    assert is_intact(folder, "v1")
    (folder / "weights").write_bytes(b"abde")
    assert not is_intact(folder, "v1")


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        build_once(tmp_path / "model", "v1", fail)
    assert not (tmp_path / "model").exists()
    folder = build_once(tmp_path / "model", "v1", Builder())
    assert not (folder / "half").exists()


def test_a_failed_rebuild_keeps_the_old_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("no network")

    folder = build_once(tmp_path / "model", "v1", Builder())
    with pytest.raises(RuntimeError, match="no network"):
        build_once(folder, "v2", fail)
    assert is_intact(folder, "v1")


def test_concurrent_builders_wait_for_each_other(tmp_path: Path) -> None:
    build = Builder(seconds=0.2)
    threads = [
        threading.Thread(target=build_once, args=(tmp_path / "model", "v1", build))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.runs == 1
    assert is_intact(tmp_path / "model", "v1")


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = build_once(tmp_path / "model", "v1", Builder())
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["source"] == "v1"
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        "config.json": 2,
        "weights": 3,
    }


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLASHTRACE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "vllm-flashtrace"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/vllm-flashtrace")
    monkeypatch.setenv("FLASHTRACE_CACHE", "~/own")
    assert cache_root() == tmp_path / "own"
