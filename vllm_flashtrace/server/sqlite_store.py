"""Deferred attributions of all API servers of one machine, in one SQLite file.

The file lies in a folder of this user alone, whose name travels in the environment of the process
that chose it, and which that process removes. Nothing is created before the first attribution.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_flashtrace.api.response import OBJECT
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.server.deferred import AttributionStore, StoreLimits
from vllm_flashtrace.text.result import failed_result
from vllm_flashtrace.trace.config import FlashTraceConfig

STORE_ENV = "FLASHTRACE_STORE"
# Makes a store from this server's name and the bounds.
StoreMaker = Callable[[str, StoreLimits], AttributionStore]

_PRIVATE = 0o700
_FILE = "attributions.sqlite3"
_ID = re.compile(r"ft-[0-9a-f]{32}")
_BUSY_SECONDS = 30.0
_LOST = TraceError(
    "server_lost", "the server that ran this trace stopped before the trace was finished"
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attributions (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    finished INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    changed REAL NOT NULL,
    expires REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_age ON attributions (finished, changed);
"""


class SqliteStore:
    """One API server's view of the shared file; see :class:`AttributionStore`.

    There are never more entries nor bytes than the bounds allow. Only finished entries make room
    for new ones, the oldest first. An entry that is over its time is as good as absent, and one
    whose server is gone has failed.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        limits: StoreLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens nothing yet; the file is created on first use.

        Args:
            folder: Private folder, created if absent.
            owner: Names this API server among those that share the folder.
            limits: Bounds, the same in every server that shares the folder.
            clock: Seconds, on a clock that all these servers share.
        """
        self._folder = folder
        self._owner = owner
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def reserve(self, attribution_id: str) -> str:
        """Adds a ``queued`` entry and returns its JSON."""
        body = _pending(attribution_id, "queued")
        with self._transaction() as db:
            now = self._purge(db)
            (count,) = db.execute("SELECT COUNT(*) FROM attributions").fetchone()
            excess = count - self._limits.entries + 1
            if excess > 0:
                dropped = db.execute(
                    "DELETE FROM attributions WHERE id IN (SELECT id FROM attributions "
                    "WHERE finished ORDER BY changed LIMIT ?)",
                    (excess,),
                ).rowcount
                if dropped < excess:
                    raise TraceError(
                        "overloaded",
                        f"{count} deferred attributions are unfinished; "
                        f"at most {self._limits.entries} are stored",
                    )
            db.execute(
                # A store behind a network may be told twice.
                "INSERT OR REPLACE INTO attributions VALUES (?, ?, 'queued', 0, ?, 0, ?, ?)",
                (attribution_id, self._owner, body, now, now + self._limits.lease_seconds),
            )
        return body

    def start(self, attribution_id: str) -> bool:
        """Marks an entry ``running``; False when it was deleted meanwhile."""
        body = _pending(attribution_id, "running")
        with self._transaction() as db:
            return bool(
                db.execute(
                    "UPDATE attributions SET status = 'running', finished = 0, body = ?, "
                    "bytes = 0, expires = ? WHERE id = ?",
                    (body, self._clock() + self._limits.lease_seconds, attribution_id),
                ).rowcount
            )

    def finish(self, attribution_id: str, status: str, body: str) -> bool:
        """Stores an attribution's JSON and final status; False when its entry was deleted."""
        if len(body) > self._limits.nbytes:
            error = TraceError(
                "result_too_large",
                f"the attribution has {len(body)} bytes, at most {self._limits.nbytes} are stored;"
                " ask for a smaller top_k or include less",
            )
            failure = failed_result(attribution_id, error)
            body, status = json.dumps(failure), failure["status"]
        with self._transaction() as db:
            now = self._purge(db)
            kept = db.execute(
                "UPDATE attributions SET status = ?, finished = 1, body = ?, bytes = ?, "
                "changed = ?, expires = ? WHERE id = ?",
                (status, body, len(body), now, now + self._limits.ttl_seconds, attribution_id),
            ).rowcount
            self._make_room(db, attribution_id)
        return bool(kept)

    def get(self, attribution_id: str) -> str | None:
        """The JSON of an entry's attribution object; None when unknown or over its time."""
        if not _ID.fullmatch(attribution_id):
            return None
        with self._transaction() as db:
            self._purge(db)
            query = "SELECT body FROM attributions WHERE id = ?"
            row = db.execute(query, (attribution_id,)).fetchone()
        return None if row is None else str(row[0])

    def delete(self, attribution_id: str) -> bool:
        """Drops an entry; False when unknown or over its time."""
        if not _ID.fullmatch(attribution_id):
            return False
        with self._transaction() as db:
            self._purge(db)
            query = "DELETE FROM attributions WHERE id = ?"
            return bool(db.execute(query, (attribution_id,)).rowcount)

    def renew(self) -> set[str]:
        """Keeps this server's unfinished entries from expiring.

        Returns:
            The ids of all its entries that are still there.
        """
        with self._transaction() as db:
            now = self._clock()
            db.execute(
                "UPDATE attributions SET expires = ? WHERE owner = ? AND NOT finished",
                (now + self._limits.lease_seconds, self._owner),
            )
            self._purge(db)
            rows = db.execute("SELECT id FROM attributions WHERE owner = ?", (self._owner,))
            return {row[0] for row in rows}

    def abandon(self) -> None:
        """Lets this server's unfinished entries fail: it stops."""
        with self._transaction() as db:
            self._fail(db, "owner = ?", self._owner)

    def counts(self) -> dict[str, int]:
        """Number of entries by status, of all servers together."""
        with self._transaction() as db:
            self._purge(db)
            return dict(db.execute("SELECT status, COUNT(*) FROM attributions GROUP BY status"))

    def close(self) -> None:
        """Closes the file; a later call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _purge(self, db: sqlite3.Connection) -> float:
        now = self._clock()
        db.execute("DELETE FROM attributions WHERE finished AND expires <= ?", (now,))
        self._fail(db, "expires <= ?", now)
        return now

    def _fail(self, db: sqlite3.Connection, which: str, value: Any) -> None:
        query = f"SELECT id FROM attributions WHERE NOT finished AND {which}"
        for (attribution_id,) in db.execute(query, (value,)).fetchall():
            body = json.dumps(failed_result(attribution_id, _LOST))
            now = self._clock()
            db.execute(
                "UPDATE attributions SET status = 'failed', finished = 1, body = ?, bytes = ?, "
                "changed = ?, expires = ? WHERE id = ?",
                (body, len(body), now, now + self._limits.ttl_seconds, attribution_id),
            )

    def _make_room(self, db: sqlite3.Connection, newest: str) -> None:
        (total,) = db.execute("SELECT COALESCE(SUM(bytes), 0) FROM attributions").fetchone()
        rows = db.execute(
            "SELECT id, bytes FROM attributions WHERE finished AND id != ? ORDER BY changed",
            (newest,),
        ).fetchall()
        for attribution_id, nbytes in rows:
            if total <= self._limits.nbytes:
                return
            db.execute("DELETE FROM attributions WHERE id = ?", (attribution_id,))
            total -= nbytes

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            db = self._connection or self._open()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _open(self) -> sqlite3.Connection:
        path = open_store_folder(self._folder) / _FILE
        db = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Nothing here outlives the server, so nothing has to reach the disk.
        db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;" + _SCHEMA)
        self._connection = db
        return db


def _pending(attribution_id: str, status: str) -> str:
    entry = {"id": attribution_id, "object": OBJECT, "status": status}
    return json.dumps(entry, separators=(",", ":"))


def make_store(config: FlashTraceConfig, maker: StoreMaker | None = None) -> AttributionStore:
    """The store of one API server process, which gets a name of its own among those that share it.

    Args:
        config: Has the bounds.
        maker: Makes a store that reaches further than this launcher's own, which is the default.
    """
    limits = StoreLimits(
        entries=config.max_stored_attributions,
        nbytes=config.max_stored_mib << 20,
        ttl_seconds=config.stored_ttl_seconds,
    )
    owner = secrets.token_hex(8)
    if maker is not None:
        return maker(owner, limits)
    return SqliteStore(ensure_store_folder(), owner, limits)


def ensure_store_folder() -> Path:
    """The folder's path, chosen by the first process that asks and inherited by its children.

    Like the secret, the path travels in the environment. Only the name is decided here, so that a
    process that never defers an attribution leaves nothing on the disk.
    """
    known = os.environ.get(STORE_ENV)
    if known:
        return Path(known)
    path = Path(tempfile.gettempdir()) / f"flashtrace-{secrets.token_hex(16)}"
    os.environ[STORE_ENV] = str(path)
    atexit.register(_remove, path, os.getpid())
    return path


def open_store_folder(path: Path) -> Path:
    """Creates the folder, or checks the one that another process of ours created.

    Raises:
        PermissionError: It is a link, is another user's, or others may enter it.
        OSError: It cannot be created.
    """
    try:
        path.mkdir(mode=_PRIVATE)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise PermissionError(f"{STORE_ENV}: {path} is not a folder") from None
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(f"{STORE_ENV}: {path} is not private to this user") from None
    return path


def _remove(path: Path, chooser: int) -> None:
    # A forked child runs the same exit handlers and must leave the folder to its parent.
    if os.getpid() == chooser:
        shutil.rmtree(path, ignore_errors=True)
