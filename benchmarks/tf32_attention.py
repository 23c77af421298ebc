"""What TF32 in an engine's attention does to the scores of a float32 model. Needs no GPU.

vLLM's Triton attention multiplies float32 by ``tl.dot`` with Triton's default, TF32: the tensor
core reads ten bits of each operand's mantissa. A trace explains what the engine computed, so its
scores move with the engine's activations, however exactly they are summed. Here a float64 model is
run twice, once with the operands of both products of attention cut to TF32, and each run is traced
exactly.

    python -m benchmarks.tf32_attention [--tokens 700] [--json OUT]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.tables import Column, emit, error, markdown
from tests import oracle
from tests.engine.harness import relative_l1
from tests.tiny_models import Family, make_tiny_model

_DROPPED_BITS = 13  # Of the 23 of a float32's mantissa.


def truncated(x: Tensor) -> Tensor:
    """As a tensor core reads a float32 that was not rounded before."""
    bits = x.float().contiguous().view(torch.int32)
    return (bits >> _DROPPED_BITS << _DROPPED_BITS).view(torch.float32).double()


def rounded(x: Tensor) -> Tensor:
    """To the nearest number of TF32."""
    bits = x.float().contiguous().view(torch.int32) + (1 << (_DROPPED_BITS - 1))
    return (bits >> _DROPPED_BITS << _DROPPED_BITS).view(torch.float32).double()


def attention_with(cut: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention whose output is of cut operands; the weights it returns are exact, as a trace's."""
    exact = oracle._attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        alpha, _ = exact(query, key, value, *others)
        weights, _ = exact(cut(query), cut(key), value, *others)
        values = cut(value).repeat_interleave(len(query) // len(value), 0)
        return alpha, cut(weights) @ values

    return attention


def row(family: Family, tokens: int) -> dict[str, Any]:
    """Relative L1 distance of the scores to those of the uncut model."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(family, Path(folder))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(5, 500, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    positions = [*range(tokens // 2, tokens * 3 // 5), *range(tokens * 6 // 7, tokens)]
    weights = [1.0 + position % 3 for position in positions]
    exact = oracle.oracle_scores(model, ids, positions, weights)

    def distance(cut: Callable[[Tensor], Tensor]) -> float:
        with mock.patch.object(oracle, "_attention", attention_with(cut)):
            return relative_l1(oracle.oracle_scores(model, ids, positions, weights), exact)

    return {
        "family": family,
        "float32": distance(lambda x: x.float().double()),
        "rounded": distance(rounded),
        "truncated": distance(truncated),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = [row(family, options.tokens) for family in ("qwen3", "llama")]
    columns = [
        Column("model", "family", str),
        *(Column(name, name, error) for name in ("float32", "rounded", "truncated")),
    ]
    emit({"tokens": options.tokens, "rows": rows}, markdown(columns, rows), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
