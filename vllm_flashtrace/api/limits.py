"""The most one request may ask for.

Invariant: every part of the ``flashtrace`` field whose size a client chooses has a limit here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most one request may ask for; lengths are in characters."""

    max_hops: int = 8
    max_top_k: int = 100_000
    max_spans: int = 256
    max_skip_tokens: int = 256
    max_regex_length: int = 512
    max_text_length: int = 65_536
    max_weights: int = 65_536
    max_tool_call_index: int = 65_535
