"""What the kernels compute, in float64 and straight from the definitions.

Invariant: nothing here is paged, tiled or shared with the package: a row's logits are all made and
normalised by `torch.logsumexp`, and a contribution is made whole. Blocks only bound the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_flashtrace.kernels import AttentionForm

_BLOCK_DOUBLES = 1 << 24


def lse_and_column_sums(
    query: Tensor, keys: Tensor, positions: Tensor, weights: Tensor, form: AttentionForm
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and weighted column sums of the rows of one trace.

    Args:
        query: ``[R, H, d]``, any type that converts to float64.
        keys: ``[N, G, d]``, likewise.
        positions: int64 ``[R]``.
        weights: ``[R]``.
        form: How logits are made.

    Returns:
        float64 ``[R, H]`` and ``[H, N]``.
    """
    query, keys, weights = (t.float().double() for t in (query, keys, weights))
    heads, context = query.shape[1], len(keys)
    keys = keys.repeat_interleave(heads // keys.shape[1], dim=1).permute(1, 2, 0)  # [H, d, N]
    sums = keys.new_zeros(heads, context)
    parts = []
    step = max(1, _BLOCK_DOUBLES // (heads * context))
    for first in range(0, len(query), step):
        rows = slice(first, first + step)
        logits = _logits(query[rows].transpose(0, 1) @ keys, positions[rows], form)  # [H, B, N]
        denominators = logits
        if form.sinks is not None:
            sinks = form.sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)
            denominators = torch.cat([logits, sinks], dim=2)
        lse = torch.logsumexp(denominators, dim=2)  # [H, B]
        attention = torch.exp(logits - lse[:, :, None])
        sums += (weights[rows][None, :, None] * attention).sum(dim=1)
        parts.append(lse.t())
    return torch.cat(parts), sums


def _logits(dots: Tensor, positions: Tensor, form: AttentionForm) -> Tensor:
    """Logits ``[H, B, N]`` of dot products, ``-inf`` where a row does not see a key."""
    logits = dots * form.scale
    if form.soft_cap:
        logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
    distances = positions[:, None] - torch.arange(logits.shape[2], device=logits.device)
    if form.alibi_slopes is not None:
        logits = logits - form.alibi_slopes.double()[:, None, None] * distances
    hidden = distances < 0
    if form.sliding_window is not None:
        hidden |= distances >= form.sliding_window
    return logits.masked_fill(hidden, float("-inf"))


def pair_proximities(
    column_sums: Tensor, values: Tensor, weight: Tensor, stream: Tensor, value_scale: float
) -> tuple[Tensor, Tensor]:
    """L1 proximity of every pair of a head and a token, and the bound on it.

    Args:
        column_sums: ``[H, N]``.
        values: ``[N, G, d]``, as cached.
        weight: ``[D, H*d]``.
        stream: ``[D]``.
        value_scale: Factor on the values.

    Returns:
        float64 ``[H, N]`` twice: ``max(0, |x|_1 - |x - z|_1)``, and ``max(0, sign(x) . z)``.
    """
    heads, tokens = column_sums.shape
    values = values.float().double() * value_scale
    column_sums, stream = column_sums.double(), stream.double()
    by_head = weight.float().double().unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, d, D]
    signs = torch.where(stream < 0, -1.0, 1.0).to(stream.dtype)
    whole = stream.abs().sum()
    exact, bounds = torch.empty_like(column_sums), torch.empty_like(column_sums)
    step = max(1, _BLOCK_DOUBLES // len(stream))
    for head in range(heads):
        group = head // (heads // values.shape[1])
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            contribution = column_sums[head, part, None] * (values[part, group] @ by_head[head])
            exact[head, part] = whole - (stream - contribution).abs().sum(dim=1)
            bounds[head, part] = contribution @ signs
    return exact.clamp_(min=0), bounds.clamp_(min=0)
