"""Runs the paper authors' package in a process of its own, under a memory limit.

A process per run makes the peak memory that of the run, and one that does not fit is an outcome
instead of the end of the benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Span = tuple[int, int]
Mode = Literal["stored", "recompute"]
GIB = 1 << 30


@dataclass(frozen=True)
class ReferenceRequest:
    """What to run; spans are half-open, like everywhere in this repository.

    Attributes:
        model: Folder of the weights.
        token_ids: The whole trace, prompt and generated.
        target: Tokens to explain.
        reasoning: Tokens that the second hop explains; None leaves that hop out.
        mode: Whether all attention matrices are kept from the forward pass (``stored``), or each
            layer's is computed again whenever it is needed (``recompute``).
        threads: Threads of torch.
        memory_limit_gib: Largest data segment of the process.
        repeats: Timed runs.
        per_token: Ranges of tokens to explain one by one; only these are explained if given.
    """

    model: str
    token_ids: list[int]
    target: Span
    reasoning: Span | None
    mode: Mode
    threads: int
    memory_limit_gib: float
    repeats: int = 1
    per_token: list[Span] = field(default_factory=list)


class ReferenceFailed(RuntimeError):
    """The package could not finish; the message says why."""


def stored_attention_gib(model: Path, tokens: int) -> float:
    """Size of the attention matrices of all layers in float32."""
    config = json.loads((model / "config.json").read_text())
    matrices = config["num_hidden_layers"] * config["num_attention_heads"]
    return matrices * tokens**2 * 4 / GIB


def run_reference(request: ReferenceRequest, timeout: float) -> dict[str, Any]:
    """Runs the package; the keys are those that `benchmarks.reference_process` writes.

    Raises:
        ReferenceFailed: It ran out of memory or time, or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "answer.pt")
        asked.write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-m", "benchmarks.reference_process", str(asked), str(answer)]
        try:
            done = subprocess.run(
                command,
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise ReferenceFailed(f"not finished after {timeout:.0f} s") from None
        if done.returncode < 0:
            raise ReferenceFailed(f"ended by signal {-done.returncode}; 9 means out of memory")
        if done.returncode > 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "MemoryError" in last or "can't allocate memory" in last:
                raise ReferenceFailed(f"exceeded the limit of {request.memory_limit_gib:g} GiB")
            raise ReferenceFailed(last[:300])
        return torch.load(answer, weights_only=True)


def run_in_fitting_mode(
    request: ReferenceRequest, timeout: float
) -> tuple[dict[str, Any], Mode, str]:
    """Runs with stored attentions where they fit, else with recomputed ones.

    Args:
        request: What to run; its mode is replaced.
        timeout: Seconds for each try.

    Returns:
        The outcome, the mode it ran in, and why not with stored attentions ("" if it did).

    Raises:
        ReferenceFailed: Neither mode could finish.
    """
    size = stored_attention_gib(Path(request.model), len(request.token_ids))
    limit = request.memory_limit_gib
    if size > limit:
        reason = f"stored attentions need {size:.1f} GiB, the limit is {limit:g} GiB"
    else:
        try:
            return run_reference(_with_mode(request, "stored"), timeout), "stored", ""
        except ReferenceFailed as failure:
            reason = f"stored attentions: {failure}"
    try:
        return run_reference(_with_mode(request, "recompute"), timeout), "recompute", reason
    except ReferenceFailed as failure:
        raise ReferenceFailed(f"{reason}; recomputed attentions: {failure}") from None


def _with_mode(request: ReferenceRequest, mode: Mode) -> ReferenceRequest:
    return ReferenceRequest(**{**asdict(request), "mode": mode})
