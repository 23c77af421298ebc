"""The first pass over an input: how many rows, which ids are taken, and what exactly was read.

Invariant: it depends on the files' bytes and names alone. Of two rows with one id the first in
input order keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_flashtrace.scale.batch.inputs import input_files, read_rows

_DIGEST = 16


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of an input.

    Attributes:
        name: Its path within the input; rows are known by it.
        path: Where it lies.
        sha256: Of its bytes, in hex.
        first: Number of its first row over all files, from 0.
        rows: How many rows it has.
    """

    name: str
    path: Path
    sha256: str
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Scan:
    """What an input holds.

    Attributes:
        files: In input order.
        rows: Of all files.
        duplicates: Numbers of the rows whose id an earlier row has, int64 ``[D]``, sorted.
    """

    files: Sequence[InputFile]
    rows: int
    duplicates: np.ndarray


def scan_input(path: Path) -> Scan:
    """Reads every row once; 16 bytes a row are kept meanwhile.

    Raises:
        OSError: A file cannot be read.
        ValueError: There is no row, or a file is broken.
    """
    files: list[InputFile] = []
    digests = bytearray()
    for name, file in input_files(path):
        first = len(digests) // _DIGEST
        try:
            for row in read_rows(name, file):
                digests += hashlib.blake2b(row.custom_id.encode(), digest_size=_DIGEST).digest()
        except ValueError as error:  # pyarrow's errors among them.
            raise ValueError(f"{file} cannot be read: {error}") from None
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        files.append(InputFile(name, file, sha256, first, len(digests) // _DIGEST - first))
    if not digests:
        raise ValueError(f"there is no row in {path}")
    return Scan(files, len(digests) // _DIGEST, _later_ones(bytes(digests)))


def _later_ones(digests: bytes) -> np.ndarray:
    """Positions whose digest occurs at an earlier one."""
    values = np.frombuffer(digests, dtype=[("high", "<u8"), ("low", "<u8")])
    order = np.lexsort((values["low"], values["high"]))  # Stable: ties stay in input order.
    ordered = values[order]
    return np.sort(order[1:][ordered[1:] == ordered[:-1]])
