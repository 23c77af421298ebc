"""The rows of a run on disk, so that one that was killed goes on where it was.

Invariant: the file is only appended to, a row at a time; a row that a kill cut short is dropped
when the file is next opened, and the work of that row alone is done again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.method import Scores, Values

Row = dict[str, Any]


def key_of(prepared: Prepared) -> str:
    """Names an example and its text: rows of a text that has changed no longer count."""
    parts = (prepared.token_ids, prepared.user, prepared.target, sorted(prepared.gold))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=5).hexdigest()
    return f"{prepared.example.id}#{digest}"


def pack(values: Values) -> str:
    """Scores as text, to the last bit."""
    return base64.b64encode(np.asarray(values, dtype="<f8").tobytes()).decode()


def unpack(text: str) -> Values:
    """The inverse of `pack`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


class WorkFile:
    """What has been done: scores, failures, perturbations, the model's own responses."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Opens or makes the file.

        Args:
            path: Where it is.
            fingerprint: What all rows have in common, e.g. model, dtype and seed.

        Raises:
            ValueError: The file is of a run with another fingerprint.
        """
        self.rows: dict[tuple[str, ...], Row] = {}
        self.costs: list[Row] = []
        self._sessions: list[float] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_row(path)
        self._began = time.perf_counter()
        for row in _read(path):
            self._take(row, fingerprint, path)
        self._file = path.open("a", encoding="utf-8")
        self.add({"kind": "session", "fingerprint": dict(fingerprint)})

    def add(self, row: Row) -> None:
        """Appends a row at once."""
        row["at"] = round(time.perf_counter() - self._began, 2)
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
        self._file.flush()
        self._take(row, None, None)

    def add_scores(self, example: str, method: str, scores: Scores) -> None:
        """What a method said."""
        self.add(
            {
                "kind": "scores",
                "example": example,
                "method": method,
                "seconds": scores.seconds,
                "facts": dict(scores.facts),
                "values": pack(scores.values),
            }
        )

    def add_failure(self, example: str, method: str, reason: str, *, final: bool) -> None:
        """That a method failed; unless this is final, the next run tries again."""
        row = {"kind": "scores", "example": example, "method": method, "reason": reason}
        self.add({**row, "final": final})

    def scores(self, example: str, method: str) -> Row | None:
        """The row of a method on an example: with ``values``, or with the ``reason`` it failed."""
        return self.rows.get(("scores", example, method))

    def perturbation(self, example: str, method: str, protocol: str) -> Row | None:
        """The row of a perturbation."""
        return self.rows.get(("perturbation", example, method, protocol))

    def response(self, example: str) -> str | None:
        """The model's own response."""
        row = self.rows.get(("response", example))
        return None if row is None else str(row["text"])

    @property
    def seconds(self) -> float:
        """Of all sessions together, each up to its last row."""
        return sum(self._sessions)

    def forget_passing_failures(self) -> None:
        """Failures that are not final count as not yet tried."""
        passing = [key for key, row in self.rows.items() if row.get("final") is False]
        for key in passing:
            del self.rows[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _take(self, row: Row, expected: Mapping[str, Any] | None, path: Path | None) -> None:
        kind = row["kind"]
        if kind == "session":
            if expected is not None and row["fingerprint"] != dict(expected):
                raise ValueError(
                    f"{path} is of a run with {row['fingerprint']}, this one has {dict(expected)}; "
                    "remove it or write to another file"
                )
            self._sessions.append(0.0)
        elif kind == "cost":
            self.costs.append(row)
        else:
            parts = [row[part] for part in ("example", "method", "protocol") if part in row]
            self.rows[(kind, *parts)] = row
        self._sessions[-1] = max(self._sessions[-1], row["at"])


def _drop_torn_row(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
