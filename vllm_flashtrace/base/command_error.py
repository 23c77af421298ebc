"""What the command line reports in one line."""

from __future__ import annotations


class CommandError(Exception):
    """A mistake or a failure that one line explains."""
