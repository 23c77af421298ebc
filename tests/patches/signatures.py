"""Does a version of vLLM have the private interfaces that the patches rely on? No GPU is needed.

The Python sources of that version's wheel are unpacked beside the installed vLLM and take its
place: every patch, those for CUDA among them, checks the signatures it relies on, and every module
of the package is imported. That proves names and parameters, and nothing about behaviour.

    python -m tests.patches.signatures VERSION
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_CACHE = _ROOT / ".cache" / "vllm"
_READ = (".py", ".json", ".jinja")
_WITHOUT_CHECK = ("kill_switch",)
# They start something when they are imported, or need Ray.
_NOT_IMPORTED = ("vllm_flashtrace.scale",)


def sources(version: str) -> Path:
    """The folder with a version's Python sources, downloaded at first use.

    Raises:
        subprocess.CalledProcessError: pip found no such wheel.
    """
    folder = _CACHE / version
    if folder.exists():
        return folder
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as temporary:
        wheel, unpacked = Path(temporary) / "wheel", Path(temporary) / "sources"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(wheel), f"vllm=={version}"], check=True)
        [path] = wheel.glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            wanted = [n for n in names if n.endswith(_READ) or ".dist-info/" in n]
            archive.extractall(unpacked, wanted)
        unpacked.rename(folder)
    return folder


def checks() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is to be checked, by name, in the process that has the version's sources."""
    import vllm_flashtrace
    from vllm_flashtrace import patches

    for module in pkgutil.iter_modules(patches.__path__):
        if not module.name.startswith("_"):
            yield f"patches.{module.name}", lambda name=module.name: _check_patch(name)
    for module in pkgutil.walk_packages(vllm_flashtrace.__path__, "vllm_flashtrace."):
        name = module.name
        if not name.startswith(_NOT_IMPORTED) and not name.endswith("__main__"):
            yield name, lambda name=name: importlib.import_module(name)


def _check_patch(name: str) -> None:
    module = importlib.import_module(f"vllm_flashtrace.patches.{name}")
    if name not in _WITHOUT_CHECK:
        module.check()


def run(found: Iterator[tuple[str, Callable[[], object]]]) -> int:
    """Prints what does not fit, and how many checks there were; 1 if something does not."""
    number = faults = 0
    for name, check in found:
        number += 1
        try:
            check()
        except Exception as error:
            faults += 1
            print(f"{name}: {type(error).__name__}: {error}")
    print(f"{number} patches and modules checked, {faults} do not fit")
    return int(faults > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        import vllm

        print(f"vLLM {vllm.__version__}")
        return int(vllm.__version__ != options.version) or run(checks())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(sources(options.version)), str(_ROOT)]),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_FLASHTRACE_DISABLE": "1",  # Nothing is to be patched.
    }
    command = [sys.executable, "-m", "tests.patches.signatures", "--here", options.version]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
