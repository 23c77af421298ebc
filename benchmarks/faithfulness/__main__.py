"""The faithfulness benchmark.

Explains generated tasks with known sources by many methods, and says how well each finds them, how
the model's response depends on what it found, and what it cost. A run that is ended goes on when it
is started again with the same arguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from rich.console import Console

from benchmarks.faithfulness import figures, report
from benchmarks.faithfulness.cases import Case
from benchmarks.faithfulness.environment import config, environment, fingerprint, labels
from benchmarks.faithfulness.generated import MAX_TOKENS, engine_generate
from benchmarks.faithfulness.options import Options, parse
from benchmarks.faithfulness.progress import BarProgress
from benchmarks.faithfulness.resources import Resources
from benchmarks.faithfulness.runner import Runner
from benchmarks.faithfulness.summary import rounded, summarise
from benchmarks.faithfulness.work import WorkFile
from vllm_flashtrace.base.process import end_engine_with_this_process
from vllm_flashtrace.offline.engine_log import engine_log


def run(options: Options, resources: Any, console: Console) -> dict[str, Any]:
    """Runs the benchmark and writes its JSON file and figures.

    Args:
        options: What to do.
        resources: See `Resources`; the caller closes them.
        console: Where progress and tables go.

    Returns:
        What stands in the JSON file.
    """
    progress = BarProgress(console)
    with WorkFile(options.work_file, fingerprint(options, resources)) as work, progress.bars:
        runner = Runner(options, resources, work, progress)
        cases = runner.cases()
        resources.max_model_len = _longest(cases, options)
        if options.generated:
            cases = runner.cases(engine_generate(resources.engine.ft.llm))
        runner.attribute(cases)
        resources.close_hf()
        runner.perturb(cases)
        result = {
            "config": config(options),
            "environment": environment(options),
            "labels": labels(options),
            "wall_seconds": work.seconds,
            **summarise(cases, runner.wanted, work, seed=options.seed),
        }
        if options.generated:
            result["generated"] = _kept(cases, min(options.lengths))
    result = rounded(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(as_text(result), encoding="utf-8")
    if options.figures is not None:
        figures.draw(result, options.figures)
    return result


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


def _longest(cases: list[Case], options: Options) -> int:
    """Tokens of the longest sequence, with room for a response where one is generated."""
    longest = max(len(case.prepared.token_ids) for case in cases)
    room = MAX_TOKENS + 1 if options.generated else 1
    shortest = min(options.lengths)
    prompts = [c.prepared.prompt_length for c in cases if c.group[1] == shortest]
    return max(longest, max(prompts, default=0) + room) + 1


def _kept(cases: list[Case], shortest: int) -> dict[str, dict[str, int]]:
    kept: dict[str, dict[str, int]] = {}
    for case in cases:
        example = case.prepared.example
        if not example.generated and example.length == shortest:
            kept.setdefault(example.task, {"asked": 0, "kept": 0})["asked"] += 1
        elif example.generated:
            kept[example.task.removesuffix("-generated")]["kept"] += 1
    return kept


def main() -> int:
    options = parse()
    end_engine_with_this_process()
    from vllm_flashtrace.models import prepare_smollm2

    console = Console(width=None if sys.stdout.isatty() else 140)
    resources = Resources(prepare_smollm2(), dtype=options.dtype, seed=options.seed)
    with engine_log(), closing(resources):
        result = run(options, resources, console)
    report.printed(result, console)
    console.print(f"{result['wall_seconds']:.0f} s in all; wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
