"""A cache of generated folders that are either complete or absent.

A folder appears under its final name only after every file in it, and a manifest with their sizes
and hashes, has reached the disk. Concurrent builders of one folder wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "manifest.json"
SMALL_FILE_BYTES = 16 * 2**20
"""Larger files are checked by size alone when a folder is reused; smaller ones are hashed too."""


def cache_root() -> Path:
    """The folder this package keeps prepared models in.

    Returns:
        ``$FLASHTRACE_CACHE``, else ``$XDG_CACHE_HOME/vllm-flashtrace``, else
        ``~/.cache/vllm-flashtrace``. It may not exist yet.
    """
    if own := os.environ.get("FLASHTRACE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-flashtrace"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(folder: Path, source: str) -> bool:
    """Whether ``folder`` was completely built from ``source`` and has not been damaged since.

    Args:
        folder: The cached folder.
        source: Identity of what it must have been built from.

    Returns:
        False if the folder or its manifest is missing or unreadable, if it was built from another
        source, or if a listed file has another size or (small files only) another hash.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["source"] != source:
            return False
        return all(_matches(folder / name, entry) for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_once(folder: Path, source: str, build: Callable[[Path], None]) -> Path:
    """Returns ``folder``, built by ``build`` if it is not there in full.

    Args:
        folder: Final path; its parent holds the lock file and the unfinished copy.
        source: Identity of what is built, e.g. a hash and a format version.
        build: Fills the empty directory it is given. If it raises, nothing appears at ``folder``.

    Returns:
        ``folder``.

    Raises:
        OSError: The cache cannot be written.
    """
    if is_intact(folder, source):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_intact(folder, source):
            return folder
        unfinished = folder.parent / f".{folder.name}.part"
        _remove(unfinished)
        unfinished.mkdir()
        build(unfinished)
        _write_manifest(unfinished, source)
        _remove(folder)
        unfinished.rename(folder)
        _fsync(folder.parent)
    return folder


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    size = path.stat().st_size
    if size != entry["size"]:
        return False
    return size > SMALL_FILE_BYTES or file_sha256(path) == entry["sha256"]


def _write_manifest(folder: Path, source: str) -> None:
    """Records every file of ``folder`` and flushes them, the manifest and the folder to disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        _fsync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n", "utf-8")
    _fsync(manifest)
    _fsync(folder)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
