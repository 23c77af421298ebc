"""How far the engine's scores are from exact arithmetic, and from the authors' package.

Both are compared with a dense float64 evaluation of the formulas on the same weights and tokens.
The package is run in float32 and in float64, which separates its formula from its rounding.

    python -m benchmarks.parity [--tokens 600 2000] [--json OUT]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import emit
from benchmarks.tables import parity as table
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

ANSWER = 40


def engine_scores(folder: Path, lengths: list[int]) -> dict[int, dict[str, Any]]:
    """Token ids and scores through vLLM, with the default options."""
    from tests.engine.conftest import text_tokens
    from tests.engine.harness import Engine, TraceJob

    engine = Engine(folder, "a benchmark", max_model_len=max(lengths) + 8)
    results = {}
    try:
        for length in lengths:
            token_ids = text_tokens(engine, length)
            weights = TargetWeights.from_spans([(length - ANSWER, length)])
            job = TraceJob(token_ids, weights, DEFAULT_EXACT_FRACTION)
            results[length] = {"token_ids": token_ids, "scores": engine.trace(job).scores}
    finally:
        engine.close()
    return results


def package_scores(folder: Path, token_ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Scores of ``flashtrace.core`` with stored attentions."""
    from transformers import AutoModelForCausalLM

    from tests.reference import reference_scores

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    length = len(token_ids)
    return reference_scores(model, token_ids, (length - ANSWER, length)).hops[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[600, 2000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    from transformers import AutoModelForCausalLM

    from tests.engine.harness import relative_l1
    from tests.oracle import oracle_scores

    folder = prepare_smollm2()
    measured = engine_scores(folder, options.tokens)
    rows = []
    for length in options.tokens:
        token_ids = measured[length]["token_ids"]
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        positions = list(range(length - ANSWER, length))
        oracle = oracle_scores(model, token_ids, positions, [1.0] * ANSWER)
        package32 = package_scores(folder, token_ids, torch.float32)
        row = {
            "tokens": length,
            "engine": relative_l1(measured[length]["scores"], oracle),
            "package_float32": relative_l1(package32, oracle),
            "engine_against_package": relative_l1(measured[length]["scores"], package32),
        }
        if length <= 1000:  # its stored attentions double in float64
            package64 = package_scores(folder, token_ids, torch.float64)
            row["package_float64"] = relative_l1(package64, oracle)
        rows.append(row)

    result = {"rows": rows}
    emit(result, table(result), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
