"""Declares the kill switch among vLLM's environment variables.

After loading general plugins vLLM warns about variables of its prefix that it does not know, or
stops with ``--fail-on-environ-validation``. Only a variable that is set is declared.
"""

from __future__ import annotations

import os

import vllm.envs


def declare(name: str) -> None:
    """Makes vLLM know the variable ``name`` if it is set."""
    known = getattr(vllm.envs, "environment_variables", None)
    if name in os.environ and isinstance(known, dict):
        known.setdefault(name, lambda: os.environ.get(name))
