"""Models that benchmarks and tests take: GGUF files whose parts lie in installed packages."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PackagedGGUF:
    """A GGUF file in parts, one or more in each of some packages.

    Attributes:
        packages: Name of a package on the index, with ``{}`` in the place of its number.
        count: How many there are; their numbers begin at 1.
        files: Pattern of the parts' names in a package's folder ``data``.
    """

    packages: str
    count: int
    files: str

    def parts(self) -> list[Path]:
        """The parts in their order; empty if a package is missing."""
        parts: list[Path] = []
        for number in range(1, self.count + 1):
            spec = importlib.util.find_spec(self.packages.format(number).replace("-", "_"))
            if spec is None or spec.origin is None:
                return []
            parts += sorted((Path(spec.origin).parent / "data").glob(self.files))
        return parts

    @contextmanager
    def joined(self, folder: Path) -> Iterator[Path]:
        """The whole file, in a folder as long as the block lasts."""
        whole = folder / "parts.gguf"
        with whole.open("wb") as file:
            for part in self.parts():
                file.write(part.read_bytes())
        yield whole
        whole.unlink()

    def main(self, description: str, write_folder: Callable[[Path], Path]) -> None:
        """The command line of a module that writes the model to a folder.

        Args:
            description: What the command does.
            write_folder: Writes the model into a new folder, and returns it.
        """
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("folder", type=Path)
        folder = parser.parse_args().folder
        if not self.parts():
            parser.exit(1, f"{self.packages.format(1)} to {self.count} are not installed\n")
        print(write_folder(folder))
