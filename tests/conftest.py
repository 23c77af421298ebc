"""What every part of the test suite may use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The bundled model, prepared once per machine."""
    from vllm_flashtrace.models import prepare_smollm2

    return prepare_smollm2()
