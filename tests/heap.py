"""What the garbage collector goes through in a process of the suite.

The modules of all tests and of vLLM are a million objects that stay to the end. Going through them
takes a second, again and again while they are imported, and eight times for each engine that starts
and ends here. So they are left out, and vLLM, which has the same done in a process of its own and
takes it back when an engine ends, does neither here.
"""

from __future__ import annotations

import atexit
import gc

_freeze, _unfreeze = gc.freeze, gc.unfreeze


def import_without_collecting() -> None:
    """Until :func:`leave_out_what_is_there` nothing is collected."""
    gc.disable()


def leave_out_what_is_there() -> None:
    """What exists now stays to the end of the process."""
    if gc.freeze is _freeze:
        gc.freeze = gc.unfreeze = lambda: None
        atexit.register(_unfreeze)  # Triton complains of what is left then.
    _freeze()
    gc.enable()
