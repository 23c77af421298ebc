"""One run of the paper authors' package; `benchmarks.reference` starts it as a process.

    python -m benchmarks.reference_process REQUEST.json ANSWER.pt

Spans of the package are inclusive, those of the request half-open.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flashtrace import core as package
from torch import nn

from benchmarks.processes import peak_rss_mb, rss_mb
from benchmarks.reference import GIB, ReferenceRequest, Span

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
def capture(model: nn.Module, token_ids: list[int], recompute: bool) -> Captured:
    """The forward pass, as the package's own classes do it."""
    metadata = package.extract_model_metadata(model)
    dtype = next(model.parameters()).dtype
    cache, handles = package.attach_hooks(metadata.layers, dtype)
    try:
        outputs = model(
            input_ids=torch.tensor([token_ids]),
            use_cache=False,
            output_attentions=not recompute,
        )
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
            "attentions": None if recompute else outputs.attentions,
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
        captured = capture(model, request.token_ids, request.mode == "recompute")
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
    forward, captured = _timed(lambda: capture(model, request.token_ids, False))
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


def load_model(request: ReferenceRequest) -> nn.Module:
    """Weights in float32; attention matrices can be kept only by the eager implementation."""
    from transformers import AutoModelForCausalLM

    attention = "eager" if request.mode == "stored" else "sdpa"
    return AutoModelForCausalLM.from_pretrained(
        request.model, attn_implementation=attention, dtype=torch.float32
    )


def main() -> None:
    """Runs the request."""
    asked, answer = (Path(argument) for argument in sys.argv[1:])
    request = ReferenceRequest(**json.loads(asked.read_text()))
    _limit_memory(request.memory_limit_gib)
    torch.set_num_threads(request.threads)
    model = load_model(request)
    idle = rss_mb()
    outcome = (explain_each_token if request.per_token else explain_hops)(model, request)
    torch.save(outcome | {"idle_rss_mb": idle, "peak_rss_mb": peak_rss_mb()}, answer)


def _timed(function: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def _limit_memory(gib: float) -> None:
    """Makes allocations above the limit fail here, before the machine runs out."""
    limit = int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError):  # and if it runs out nevertheless, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main()
