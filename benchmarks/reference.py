"""The paper authors' package, in this process or in one of its own under a memory limit.

A process per run makes the peak memory that of the run, and one that does not fit is an outcome
instead of the end of the benchmark. Spans are half-open here; the package's are inclusive.

    python -m benchmarks.reference REQUEST.json ANSWER.pt
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from flashtrace import core as package
from torch import nn

from benchmarks.processes import peak_rss_mb, rss_mb

Span = tuple[int, int]
GIB = 1 << 30


@dataclass(frozen=True)
class ReferenceRequest:
    """What to run; spans are half-open, like everywhere in this repository.

    Attributes:
        model: Folder of the weights.
        token_ids: The whole trace, prompt and generated.
        target: Tokens to explain.
        reasoning: Tokens that the second hop explains; None leaves that hop out.
        threads: Threads of torch.
        memory_limit_gib: Largest data segment of the process.
        repeats: Timed runs.
        per_token: Ranges of tokens to explain one by one; only these are explained if given.
    """

    model: str
    token_ids: list[int]
    target: Span
    reasoning: Span | None
    threads: int
    memory_limit_gib: float
    repeats: int = 1
    per_token: list[Span] = field(default_factory=list)


class ReferenceFailed(RuntimeError):
    """The package could not finish; the message says why."""


def run_reference(request: ReferenceRequest, timeout: float) -> dict[str, Any]:
    """Runs the package in a process; the keys are those of `explain_hops` and `explain_each_token`.

    Raises:
        ReferenceFailed: It ran out of memory or time, or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "answer.pt")
        asked.write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-m", "benchmarks.reference", str(asked), str(answer)]
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


# The package's own defaults.
CHUNK_TOKENS = 128
SINK_CHUNK_TOKENS = 32


@dataclass(frozen=True)
class Captured:
    """What one forward pass leaves for any number of explanations."""

    shared: dict[str, Any]

    def hops(self, target: Span, reasoning: Span, hops: int = 1) -> Any:
        """Hop 0 from the target and later hops from the reasoning."""
        return package.compute_multi_hop_ifr(
            sink_start=target[0],
            sink_end=target[1] - 1,
            thinking_span=(reasoning[0], reasoning[1] - 1),
            n_hops=hops,
            **self.shared,
        )

    def span(self, target: Span) -> torch.Tensor:
        """Scores of one span explained as a whole."""
        aggregate = package.compute_ifr_sentence_aggregate(
            sink_start=target[0], sink_end=target[1] - 1, **self.shared
        )
        return aggregate.token_importance_total

    def each_token(self, span: Span) -> torch.Tensor:
        """Scores ``[tokens of the span, N]``, every token explained by itself."""
        result = package.compute_ifr_for_all_positions(
            sink_range=(span[0], span[1] - 1), **self.shared
        )
        return result.token_importance_matrix


@torch.no_grad()
def capture(model: nn.Module, token_ids: list[int]) -> Captured:
    """The forward pass with stored attentions, as the package's own classes do it."""
    metadata = package.extract_model_metadata(model)
    dtype = next(model.parameters()).dtype
    cache, handles = package.attach_hooks(metadata.layers, dtype)
    try:
        ids = torch.tensor([token_ids])
        outputs = model(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    params = package.IFRParameters(
        n_layers=metadata.n_layers,
        n_heads_q=metadata.n_heads_q,
        n_kv_heads=metadata.n_kv_heads,
        head_dim=metadata.head_dim,
        group_size=metadata.group_size,
        d_model=metadata.d_model,
        sequence_length=len(token_ids),
        model_dtype=dtype,
        chunk_tokens=CHUNK_TOKENS,
        sink_chunk_tokens=SINK_CHUNK_TOKENS,
    )
    return Captured(
        {
            "cache": cache,
            "attentions": outputs.attentions,
            "weight_pack": package.build_weight_pack(metadata, dtype),
            "params": params,
            "rotary_emb": metadata.rotary_emb,
        }
    )


def explain_hops(model: nn.Module, request: ReferenceRequest) -> dict[str, Any]:
    """Times the whole attribution: forward pass and two hops."""
    assert request.reasoning is not None
    seconds = []
    for _ in range(request.repeats):
        began = time.perf_counter()
        captured = capture(model, request.token_ids)
        result = captured.hops(request.target, request.reasoning)
        seconds.append(time.perf_counter() - began)
        del captured
    return {
        "seconds": seconds,
        "hops": torch.stack([hop.token_importance_total for hop in result.raw_attributions]),
        "observation": result.observation["sum"],
    }


def explain_each_token(model: nn.Module, request: ReferenceRequest) -> dict[str, Any]:
    """Times the forward pass, and every range of tokens explained one by one.

    A call costs something before its first token; that is what explaining position 0, which sees
    only itself, takes.
    """
    forward, captured = _timed(lambda: capture(model, request.token_ids))
    span, span_scores = _timed(lambda: captured.span(request.target))
    overhead, _ = _timed(lambda: captured.each_token((0, 1)))
    ranges, rows = [], []
    for tokens in request.per_token:
        spent, scores = _timed(lambda tokens=tokens: captured.each_token(tokens))
        ranges.append(spent)
        rows.append(scores)
    return {
        "forward_seconds": forward,
        "span_seconds": span,
        "overhead_seconds": overhead,
        "range_seconds": ranges,
        "span_scores": span_scores,
        "rows": torch.cat(rows),
    }


def main() -> None:
    """Runs the request of a file and writes its answer."""
    asked, answer = (Path(argument) for argument in sys.argv[1:])
    request = ReferenceRequest(**json.loads(asked.read_text()))
    # Allocations above the limit fail here, before the machine runs out.
    limit = int(request.memory_limit_gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError):  # and if it runs out nevertheless, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(request.threads)
    from transformers import AutoModelForCausalLM

    # Attention matrices can be kept only by the eager implementation.
    model = AutoModelForCausalLM.from_pretrained(
        request.model, attn_implementation="eager", dtype=torch.float32
    )
    idle = rss_mb()
    outcome = (explain_each_token if request.per_token else explain_hops)(model, request)
    torch.save(outcome | {"idle_rss_mb": idle, "peak_rss_mb": peak_rss_mb()}, answer)


def _timed(function: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main()
