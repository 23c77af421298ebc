"""Replicas share the cores among themselves."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _all_cores(all_cores: None) -> None:
    """As for a user who has bound nothing."""
