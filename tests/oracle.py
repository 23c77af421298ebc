"""Dense float64 oracle of FlashTrace, written from the paper's formulas (arXiv 2602.01914).

Shares no code with the package. Per layer and query head h, with attention weights alpha, values v
and the head's slice W_h of the output projection,

    c_h[j]  = sum_i w_i alpha^h_ij
    r       = sum_i w_i x_prev_i             x = sum_i w_i x_mid_i
    f_jh    = c_h[j] v_j^h W_h               prox(z) = max(0, |x|_1 - |x - z|_1)
    e_j     = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))

and a token's score is the sum of e_j over layers. Where the block's output u passes an RMSNorm
before it is added, w_i alpha^h_ij is divided by rms(u_i) and W_h multiplied by the norm's gain.
Where a block multiplies attention's output by a gate g, f_jh = (sum_i w_i alpha^h_ij g_i^h) * v_j^h
W_h, coordinate by coordinate of the value. Where a head has a sink, alpha^h_i is what the softmax
gives the tokens beside one more logit. The activations come from a Hugging Face model in float64
whose attention is computed here; norms,
rotary angles and MoE routing keep the float32 that transformers hard-codes for them (so do the
engines this is compared with).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_IMPLEMENTATION = "float64_oracle"


@dataclass
class LayerActivations:
    """Float64 activations of one decoder layer.

    x_prev and x_mid are [N, D]; query (after rotary) [N, H, d]; key [N, G, d]; value [N, G, e] with
    its bias; alpha [H, N, N]; o_proj the weight [D, H*e], times the factor with which the block's
    output is added, or the gain of its norm; scale the factor before the softmax; row_scale [N]
    what the norm multiplies each row by; gate [N, H, d] what attention's output is multiplied by.
    """

    x_prev: Tensor
    x_mid: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    o_proj: Tensor
    scale: float
    row_scale: Tensor
    gate: Tensor | None = None


# --- the formulas -------------------------------------------------------------------------------


def proximity(z: Tensor, x: Tensor) -> Tensor:
    return torch.clamp(x.abs().sum() - (x - z).abs().sum(-1), min=0)


def layer_oracle(
    alpha: Tensor,
    x_prev: Tensor,
    x_mid: Tensor,
    v: Tensor,
    o_proj: Tensor,
    w: Tensor,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """e_j of one layer, [N], for dense target weights w [N]."""
    row_scale = torch.ones_like(w) if row_scale is None else row_scale
    heads, context = alpha.shape[0], alpha.shape[1]
    groups, dim = v.shape[1], v.shape[2]
    r = (w[:, None] * x_prev).sum(0)
    x = (w[:, None] * x_mid).sum(0)
    token_proximity = torch.zeros(context, dtype=torch.float64)
    for h in range(heads):
        w_h = o_proj[:, h * dim : (h + 1) * dim].T
        value = v[:, h // (heads // groups)]
        if gate is None:
            c = ((w * row_scale)[:, None] * alpha[h]).sum(0)
            f = c[:, None] * (value @ w_h)
        else:
            f = (torch.einsum("i,id,ij->jd", w * row_scale, gate[:, h], alpha[h]) * value) @ w_h
        token_proximity += proximity(f, x)
    return token_proximity / (token_proximity.sum() + proximity(r, x))


def dense_weights(length: int, positions: Sequence[int] | Tensor, weights: Any) -> Tensor:
    w = torch.zeros(length, dtype=torch.float64)
    w[torch.as_tensor(positions)] = torch.as_tensor(weights, dtype=torch.float64)
    return w


def activation_scores(layers: Sequence[LayerActivations], w: Tensor) -> Tensor:
    """Scores of every layer [L, N] from stored activations."""
    return torch.stack([_scores_of(layer, w) for layer in layers])


def oracle_layer_scores(
    model: Any, input_ids: Any, positions: Any, weights: Any, **inputs: Any
) -> Tensor:
    """Scores of every layer [L, N]; each layer is reduced as it runs and its attention dropped.

    inputs are what the model takes besides tokens: pixels.
    """
    ids = _row(input_ids)
    w = dense_weights(ids.shape[1], positions, weights)
    scores: list[Tensor] = []
    _run(model, ids, lambda layer: scores.append(_scores_of(layer, w)), **inputs)
    return torch.stack(scores)


def oracle_scores(
    model: Any, input_ids: Any, positions: Any, weights: Any, **inputs: Any
) -> Tensor:
    """Scores [N] summed over layers for a target given by positions and weights."""
    return oracle_layer_scores(model, input_ids, positions, weights, **inputs).sum(0)


def oracle_attention(model: Any, input_ids: Any, positions: Any, weights: Any) -> Tensor:
    """Attention sums [L, H, N] of a target whose weights are made to sum to 1."""
    ids = _row(input_ids)
    w = dense_weights(ids.shape[1], positions, weights)
    sums: list[Tensor] = []
    _run(model, ids, lambda layer: sums.append(torch.einsum("i,hij->hj", w, layer.alpha)))
    return torch.stack(sums) / w.sum()


def oracle_hops(
    one_hop: Callable[[Tensor], Tensor], target: Tensor, is_input: Tensor, followed: Tensor, k: int
) -> tuple[Tensor, float]:
    """The recursion over hops 0..k without skipped tokens.

    one_hop maps dense weights [N] to scores [N]. Returns the final input scores
    w_I^(0) + sum_k (prod_{j<k} rho_j) w_I^(k), zero off the input, and prod_{j<=k} rho_j.
    """
    final = torch.zeros_like(target)
    product, w = 1.0, target
    for _ in range(k + 1):
        scores = one_hop(w)
        scores = scores / scores.sum()
        final += product * scores * is_input
        w = scores * followed
        product *= float(w.sum())
        if product == 0:
            break
    return final, product


def _scores_of(layer: LayerActivations, w: Tensor) -> Tensor:
    return layer_oracle(
        layer.alpha,
        layer.x_prev,
        layer.x_mid,
        layer.value,
        layer.o_proj,
        w,
        layer.row_scale,
        layer.gate,
    )


def oracle_changes(model: Any, input_ids: Any, positions: Any, weights: Any) -> tuple[float, float]:
    """How much the layers with attention, and all, change the weighted stream by mixing tokens.

    L1 norms of sum_i w_i (x_mid_i - x_prev_i), with weights made to sum to 1, summed over layers.
    """
    ids = _row(input_ids)
    w = dense_weights(ids.shape[1], positions, weights)
    before: dict[Any, Tensor] = {}
    changes: dict[bool, float] = {True: 0.0, False: 0.0}
    hooks = []
    for layer in model.model.layers:

        def in_front(module: Any, args: Any, kwargs: Any) -> None:
            before[module] = (args[0] if args else kwargs["hidden_states"])[0]

        def behind(_: Any, args: Any, layer: Any = layer) -> None:
            change = (w / w.sum()) @ (args[0][0] - before[layer])
            changes[getattr(layer, "self_attn", None) is not None] += float(change.abs().sum())

        hooks.append(layer.register_forward_pre_hook(in_front, with_kwargs=True))
        hooks.append(_norms(layer)[0].register_forward_pre_hook(behind))
    try:
        _run(model, ids, lambda _: None)
    finally:
        for hook in hooks:
            hook.remove()
    return changes[True], changes[True] + changes[False]


# --- activations from a Hugging Face model --------------------------------------------------------


def capture_hf(model: Any, input_ids: Any) -> list[LayerActivations]:
    """Activations of every decoder layer; needs L*H*N*N*8 bytes for the attention weights."""
    layers: list[LayerActivations] = []
    _run(model, _row(input_ids), layers.append)
    return layers


def _row(input_ids: Any) -> Tensor:
    ids = torch.as_tensor(input_ids)
    return ids.reshape(1, -1)


def as_float64(model: Any) -> Any:
    """The model in float64: itself if it is already, else a converted copy.

    Convert once and pass the result where the oracle runs several times.
    """
    if model.dtype == torch.float64:
        return model
    return copy.deepcopy(model).double()


def _run(
    model: Any, ids: Tensor, consume: Callable[[LayerActivations], Any], **inputs: Any
) -> None:
    model = as_float64(model).eval()
    with torch.no_grad(), _recording(model, consume):
        model.model(input_ids=ids, use_cache=False, **inputs)


def _decoder(model: Any) -> Any:
    """The model that has the decoder layers."""
    return getattr(model.model, "language_model", model.model)


@contextmanager
def _recording(model: Any, consume: Callable[[LayerActivations], Any]) -> Iterator[None]:
    """Hands each layer's activations to consume as soon as its attention block has run."""
    state: dict[str, Any] = {}

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        alpha, output = _attention(
            query[0], key[0], value[0], attention_mask, scaling, softcap, s_aux
        )
        state.update(query=query[0], key=key[0], value=value[0], alpha=alpha, scale=scaling)
        state["mixed"] = output.transpose(0, 1)
        return state["mixed"].contiguous().unsqueeze(0), None

    def before_layer(_: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        state.clear()
        state["x_prev"] = hidden[0]

    def before_projection(_: Any, args: Any) -> None:
        state["projected"] = args[0][0]

    def after_attention(module: Any, _: Any, output: Any) -> None:
        state["block"] = output[0][0]
        state["o_proj"] = module.o_proj.weight.detach()
        state["norm"] = norms[module]

    def behind_attention(_: Any, args: Any, kwargs: Any) -> None:
        x_mid = (args[0] if args else kwargs["hidden_states"])[0]
        added, block = x_mid - state["x_prev"], state["block"]
        norm = state["norm"]
        if norm is None:
            row_scale = torch.ones(len(block), dtype=torch.float64)
            factor = torch.full((block.shape[1],), _factor(added, block), dtype=torch.float64)
        else:
            row_scale, factor = _norm_factors(added, block, norm)
        consume(
            LayerActivations(
                x_prev=state["x_prev"],
                x_mid=x_mid,
                query=state["query"].transpose(0, 1),
                key=state["key"].transpose(0, 1),
                value=state["value"].transpose(0, 1),
                alpha=state["alpha"],
                o_proj=state["o_proj"] * factor[:, None],
                scale=float(state["scale"]),
                row_scale=row_scale,
                gate=_gate(state["mixed"], state["projected"]),
            )
        )
        state.clear()

    hooks, norms = [], {}
    for layer in _decoder(model).layers:
        if getattr(layer, "self_attn", None) is None:  # Its scores are in no sum over layers.
            continue
        hooks.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
        projection = layer.self_attn.o_proj  # Its own hooks may round what it gets.
        hooks.append(projection.register_forward_pre_hook(before_projection, prepend=True))
        hooks.append(layer.self_attn.register_forward_hook(after_attention))
        behind, block_norm = _norms(layer)
        norms[layer.self_attn] = block_norm
        hooks.append(behind.register_forward_pre_hook(behind_attention, with_kwargs=True))
    with _attention_implementation(model, attention):
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _norms(layer: Any) -> tuple[Any, Any]:
    """What takes the stream behind the attention block, and the norm of the block's output or None.

    That is a norm, or the MLP itself.
    """
    if hasattr(layer, "feedforward_layernorm"):  # Apertus
        return layer.feedforward_layernorm, None
    if not hasattr(layer, "input_layernorm"):  # OLMo 2 and 3
        return layer.mlp, layer.post_attention_layernorm
    if hasattr(layer, "pre_mlp_layernorm"):  # AfMoE
        return layer.pre_mlp_layernorm, layer.post_attention_layernorm
    if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 2 and 3
        return layer.pre_feedforward_layernorm, getattr(layer, "post_attention_layernorm", None)
    return layer.post_attention_layernorm, getattr(layer, "post_self_attn_layernorm", None)


def _gate(mixed: Tensor, projected: Tensor) -> Tensor | None:
    """What attention's output [N, H, d] is multiplied by in front of W_h, None if by nothing."""
    projected = projected.view_as(mixed)
    return None if torch.equal(mixed, projected) else projected / mixed


def _norm_factors(added: Tensor, block: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """What a norm multiplies the rows and the coordinates of a block's output by."""
    epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
    ones = torch.ones(1, block.shape[1], dtype=torch.float64)
    gain = norm(ones)[0].double() * (1 + epsilon) ** 0.5
    row_scale = (block.square().mean(-1) + epsilon).rsqrt()
    if float((added - row_scale[:, None] * block * gain).norm()) > 1e-6 * float(added.norm()):
        raise ValueError(
            "the stream behind attention is not the one in front plus the normed block"
        )
    return row_scale, gain


def _factor(added: Tensor, block: Tensor) -> float:
    """With which factor a block's output was added to the stream."""
    factor = float((added * block).sum() / block.square().sum())
    if float((added - factor * block).norm()) > 1e-9 * float(added.norm()):
        raise ValueError("the stream behind attention is not the one in front plus the block")
    return factor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Float64 attention weights [H, N, N] and output [H, N, e], one head at a time.

    sinks [H] are logits that take of the weights of all tokens and give no value.
    """
    heads, length, _ = query.shape
    shared = heads // key.shape[0]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    alpha = torch.empty(heads, length, length, dtype=torch.float64)
    output = query.new_empty(heads, length, value.shape[-1])
    for h in range(heads):
        logits = (query[h] * scaling) @ key[h // shared].T
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = logits + mask[0, 0, :, :length]
        logits = logits.masked_fill_(causal, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks[h].expand(length, 1)], dim=-1)
        alpha[h] = torch.softmax(logits, dim=-1)[:, :length]
        output[h] = alpha[h] @ value[h // shared]
    return alpha, output


@contextmanager
def _attention_implementation(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Lets transformers call this attention function, with the additive mask "eager" gets.

    Grouped GEMMs do not take float64, so mixture-of-experts layers run expert by expert meanwhile.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, eager_mask)
    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, function)
    before = model.config._attn_implementation
    experts_before = model.get_experts_implementation()
    # What sees images attends in another way.
    alone = _decoder(model) is model.model
    model.set_attn_implementation(
        _IMPLEMENTATION if alone else {"": before, "text_config": _IMPLEMENTATION}
    )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        if model._can_set_experts_implementation():
            model.set_experts_implementation(experts_before)
