"""The private folder in which the API servers of one launcher share deferred attributions.

Invariant: the folder belongs to this user alone (mode 0700) and is removed by the process that
chose its name; no client can name it, and nothing is created before the first attribution.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

STORE_ENV = "FLASHTRACE_STORE"
_PRIVATE = 0o700


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
