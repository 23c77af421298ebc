"""Declares our kill switch among vLLM's environment variables.

Invariant: only a variable that is set is declared, so that nothing else changes. vLLM warns about
variables of its prefix that it does not know, or stops with ``--fail-on-environ-validation``, after
it has loaded general plugins.
"""

from __future__ import annotations

import os

import vllm.envs


def declare(name: str) -> None:
    """Makes vLLM know the variable ``name`` if it is set."""
    known = getattr(vllm.envs, "environment_variables", None)
    if name in os.environ and isinstance(known, dict):
        known.setdefault(name, lambda: os.environ.get(name))
