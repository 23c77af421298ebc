"""What a run is, written down beside its results, so that only the same run goes on with them.

Invariant: results of two different runs never mix: a folder belongs to one fingerprint, and one
process at a time works in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.scale.batch.parts import has_rows, sync_folder

MANIFEST, LOCK, PARTS = "manifest.json", ".lock", "parts"
OUTPUT, ERRORS, RESULTS = "output.jsonl", "errors.jsonl", "results.parquet"
_FORMAT = 1


class OutputFolderError(FlashTraceError):
    """The output folder is in use, or holds results of another run."""

    def __init__(self, message: str) -> None:
        super().__init__("output_folder", message)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One run.

    Attributes:
        facts: Everything that the results depend on, as JSON.
        finished: Whether the final files are written.
    """

    facts: Mapping[str, Any]
    finished: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the facts, in hex."""
        return sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest in one step."""
        content = {"format": _FORMAT, "fingerprint": self.fingerprint, "finished": self.finished}
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps({**content, "run": self.facts}, indent=2) + "\n", "utf-8")


def claim(folder: Path, facts: Mapping[str, Any]) -> Manifest:
    """The manifest of this run in ``folder``: the one that is there, or a new one.

    Args:
        folder: The output folder, locked by the caller.
        facts: Everything that the results depend on, as JSON.

    Raises:
        OutputFolderError: The folder holds results of another run; the message names what
            differs.
    """
    path = folder / MANIFEST
    if not path.exists():
        for name in (OUTPUT, ERRORS, RESULTS, PARTS):
            if (folder / name).exists():
                raise OutputFolderError(f"{folder} has {name} but no {MANIFEST}; use another one")
        manifest = Manifest(facts)
        manifest.write(folder)
        return manifest
    try:
        content = json.loads(path.read_text("utf-8"))
        earlier, finished = content["run"], bool(content["finished"])
        known = content["format"] == _FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(f"{path} is damaged: {error!r}") from None
    if not known:
        raise OutputFolderError(f"{path} is of another version of vllm-flashtrace")
    differing = [
        name for name in sorted({*earlier, *facts}) if earlier.get(name) != facts.get(name)
    ]
    if differing and not finished and not has_rows(folder / PARTS):
        manifest = Manifest(facts)  # The earlier run came to nothing.
        manifest.write(folder)
        return manifest
    if differing:
        raise OutputFolderError(
            f"{folder} holds results of another run (other {', '.join(differing)}); "
            "use another output folder"
        )
    return Manifest(facts, finished)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; a kill releases it.

    Raises:
        OSError: It cannot be made or written.
        OutputFolderError: Another run works in it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputFolderError(f"another run is working in {folder}") from None
    with lock:
        lock.release()  # ``with`` holds it once more.
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` in one step once the block is through."""
    draft = path.with_name(path.name + ".tmp")
    yield draft
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
    sync_folder(path.parent)
