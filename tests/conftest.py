"""What every part of the test suite may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read when Ray is imported: what a test leaves to the garbage collector must start no Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The bundled model, prepared once per machine."""
    from vllm_flashtrace.models import prepare_smollm2

    return prepare_smollm2()
