"""Whether a compiled server with the plugin computes, without a trace, the bits of one without.

Starts an engine with the plugin and one without it, each with a compilation cache of its own, and
compares the log-probabilities of eight prompts, to the last digit.

    python -m benchmarks.same_bits [--dtype bfloat16] [--family llama] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import emit

ENGINE_OPTIONS = {
    "enforce_eager": False,
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 64 << 20,
}


def answers(engine: Any) -> list[Any]:
    """Tokens and log-probabilities, to the last digit, of prompts of several lengths.

    The prompts come one after another. Sent together they would be computed in batches that depend
    on which of them the engine has received, and a stock engine's last digits differ between
    batches.
    """
    from vllm import SamplingParams

    generator = random.Random(1)
    token_ids = [generator.randrange(5, 500) for _ in range(200)]
    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=5, ignore_eos=True)
    answered = []
    for i in range(8):
        prompt = {"prompt_token_ids": token_ids[i : 7 * i + 30]}
        [request] = engine.llm.generate([prompt], params, use_tqdm=False)
        output = request.outputs[0]
        steps = [sorted([k, repr(v.logprob)] for k, v in step.items()) for step in output.logprobs]
        answered.append([list(output.token_ids), steps])
    return answered


def run_engine(folder: Path, dtype: str, out: Path) -> None:
    """Writes what an engine answers; for a process of its own."""
    from tests.engine.harness import Engine

    place = {"worker_process": True} if _on_gpu() else {"in_process": True}
    engine = Engine(folder, "same bits", **place, dtype=dtype, **ENGINE_OPTIONS)
    out.write_text(json.dumps(answers(engine)))
    engine.close()


def _on_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def differences(stock: Any, ours: Any) -> dict[str, float]:
    """How many of the generated tokens' log-probabilities differ, and by how much at most."""
    steps = [
        (dict(before), dict(after))
        for (_, first), (_, second) in zip(stock, ours, strict=True)
        for before, after in zip(first, second, strict=True)
    ]
    distances = [
        abs(float(before[token]) - float(after[token]))
        for before, after in steps
        for token in before.keys() & after.keys()
    ]
    return {
        "steps": len(steps),
        "differ": sum(before != after for before, after in steps),
        "largest": max(distances),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--family", default="llama", help="of tests.tiny_models")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--engine", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine is not None:
        run_engine(options.engine[0], options.dtype, options.engine[1])
        return 0
    from tests.tiny_models import make_tiny_model

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(options.family, folder / "model")
        for disabled in ("1", "0"):
            out, cache = folder / f"{disabled}.json", str(folder / f"cache-{disabled}")
            subprocess.run(
                [
                    *(sys.executable, "-m", "benchmarks.same_bits", f"--dtype={options.dtype}"),
                    *("--engine", str(model), str(out)),
                ],
                env={
                    **os.environ,
                    "VLLM_FLASHTRACE_DISABLE": disabled,
                    "VLLM_CACHE_ROOT": cache,
                    "TORCHINDUCTOR_CACHE_DIR": f"{cache}-inductor",
                },
                check=True,
                stdout=sys.stderr,
            )
            found.append(json.loads(out.read_text()))
    result = {"dtype": options.dtype, "family": options.family, **differences(*found)}
    line = "{steps} steps, {differ} differ, by {largest:.3g} at most".format(**result)
    emit(result, line, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
