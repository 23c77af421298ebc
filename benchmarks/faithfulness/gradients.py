"""Gradient baselines: by embeddings (captum), by attention weights, and AttnLRP (lxt's rules).

Only the user's tokens are varied or scored, the forward pass stays the model's own to rounding, and
no class of transformers is changed: AttnLRP's rules are bound to a copy.

AttnLRP (Achtibat et al. 2024) as gradient times input. Of lxt are the identity rule on RMS norms,
the identity and uniform rules of the gated MLP, and the uniform rule on the two products of
attention; linear layers and softmax need none, their rules being plain gradients. ``import
lxt.efficient`` also imports patches for models that newer transformers no longer have, so its rule
modules are imported without it.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.attention import Outcome, attention_mean
from benchmarks.faithfulness.example import Family, MethodFailed, Prepared, Scores
from benchmarks.faithfulness.hf import HFModel, all_cores, target_logits

STEPS = 20
"""Points of the integral."""

ATTENTION_STEPS = 8
"""Points of the integral over attention weights; 20 in the paper, at more than twice the time."""

_BATCH_TOKENS = 1024
"""Most tokens of one forward and backward pass; its activations are kept."""

_ATTENTION = "attnlrp"
_GIVEN_ATTENTION = "attention_given"
_RECORDED = ("attention-times-ig", "attention-ig")
"""Methods that begin with a recorded forward pass and are charged for it."""


class GradientFamily(Family):
    """Methods that differentiate the answer by the prompt's embeddings or by attention weights."""

    labels: Mapping[str, str] = {
        "integrated-gradients": "integrated gradients of the target's log-probability, 20 steps",
        "attention-times-ig": "mean attention of the target times integrated gradients",
        "attention-ig": f"integrated gradients over attention weights, {ATTENTION_STEPS} steps",
        "attention-gradient": "attention times its gradient, positive parts rolled out",
        "attn-lrp": "AttnLRP relevance of the mean target logit, negatives dropped",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf
        self._relevance_model: Any = None

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        methods: dict[str, Callable[[HFModel, Prepared], Outcome]] = {
            "integrated-gradients": integrated_gradients,
            "attention-times-ig": attention_times_ig,
            "attention-ig": attention_ig,
            "attention-gradient": attention_gradient,
            "attn-lrp": self._attn_lrp,
        }
        results = {}
        for name in names:
            if name == "attn-lrp" and self._relevance_model is None:
                self._relevance_model = with_lrp_rules(self._hf.twin())
            recorded = self._hf.recorded(prepared).seconds if name in _RECORDED else 0.0
            with all_cores():
                began = time.perf_counter()
                scores, facts = methods[name](self._hf, prepared)
                seconds = recorded + time.perf_counter() - began
            results[name] = Scores(scores.double()[slice(*prepared.user)].numpy(), seconds, facts)
        return results

    def _attn_lrp(self, _: HFModel, prepared: Prepared) -> Outcome:
        relevance, facts = attn_lrp(self._relevance_model, prepared)
        return relevance.clamp(min=0), facts

    def close(self) -> None:
        """Lets go of the copy with the rules."""
        self._relevance_model = None


def integrated_gradients(hf: HFModel, prepared: Prepared, steps: int = STEPS) -> Outcome:
    """Integrated gradients (Sundararajan et al. 2017) from the pad token, through captum.

    Signed and summed over the dimensions of the embedding, as captum's tutorials for text do, so
    that scores add up to what the whole prompt changes: the log-probability of all target tokens.

    Returns:
        Scores ``[N]``, zero off the user's text; and ``completeness_gap``, by how much of that
        change the sum misses it.
    """
    from captum.attr import LayerIntegratedGradients  # type: ignore[import-untyped]

    token_ids = torch.tensor([prepared.token_ids])
    baseline = token_ids.clone()
    baseline[:, slice(*prepared.user)] = hf.pad_token_id
    answer = token_ids[0, slice(*prepared.target)]

    def log_probability(ids: Tensor) -> Tensor:
        logits = target_logits(hf.model, ids, prepared).float().log_softmax(-1)
        return logits[:, torch.arange(len(answer)), answer].sum(-1)

    with hf.fused_attention():
        explainer = LayerIntegratedGradients(log_probability, hf.model.get_input_embeddings())
        attributions, delta = explainer.attribute(
            token_ids,
            baselines=baseline,
            n_steps=steps,
            internal_batch_size=max(1, _BATCH_TOKENS // len(prepared.token_ids)),
            return_convergence_delta=True,
        )
    scores = attributions[0].detach().sum(-1)
    change = abs(float(scores.sum()) - float(delta.sum()))
    facts = {"completeness_gap": abs(float(delta.sum())) / change} if change > 0 else {}
    return scores, facts


def attention_times_ig(hf: HFModel, prepared: Prepared) -> Outcome:
    """The attention baseline of FlashTrace's paper (arXiv 2602.01914), "IG x Attention".

    The product of `integrated_gradients` and `attention_mean`, signed as the former.
    """
    gradients, facts = integrated_gradients(hf, prepared)
    attention, _ = attention_mean(hf.recorded(prepared), prepared)
    return gradients.double() * attention, facts


def attention_ig(hf: HFModel, prepared: Prepared, steps: int = ATTENTION_STEPS) -> Outcome:
    """Integrated gradients over attention weights, AttAttr (Hao et al., AAAI 2021), ``[N]``.

    ``A * 1/m sum_k dF(k/m A) / dA`` for the log-probability ``F`` of all target tokens, signed,
    where every attention matrix ``A`` is given to the model. A token's score is what all attention
    to it is worth, over layers, heads and rows; scores of all tokens add up to ``F(A) - F(0)`` as
    ``steps`` grow. There one layer is scaled at a time and later ones attend anew, at as many times
    the cost as there are layers; and single edges are shown, not tokens.
    """
    weights = [layer.attention for layer in hf.recorded(prepared).layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    for step in range(1, steps + 1):
        scaled = [weight * (step / steps) for weight in weights]
        for total, gradient in zip(sums, _given_gradients(hf, prepared, scaled), strict=True):
            total += gradient
    columns = [
        (weight * total).sum((0, 1), dtype=torch.float64) / steps
        for weight, total in zip(weights, sums, strict=True)
    ]
    return torch.stack(columns).sum(0), {}


def attention_gradient(hf: HFModel, prepared: Prepared) -> Outcome:
    """Attention times gradient, rolled out (Chefer, Gur & Wolf, ICCV 2021), ``[N]``.

    ``R <- R + mean_h(max(0, A * dF/dA)) R`` from the first layer to the last, ``R = I`` before it,
    with the log-probability ``F`` of all target tokens; scores are the mean of the rows of ``R``
    that predict these tokens. The gradient also goes through what later layers attend to.
    """
    with torch.no_grad():
        embeddings = hf.model.get_input_embeddings()(torch.tensor([prepared.token_ids]))
    embeddings.requires_grad_(True)  # so that a graph is kept
    taken: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, output: taken.append(output[1]))
        for layer in hf.model.model.layers
    ]
    try:
        value = _log_probability(hf, prepared, None, embeddings)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(value, taken)
    first, end = prepared.target
    scores = torch.zeros(len(prepared.token_ids), dtype=torch.float64)
    scores[first - 1 : end - 1] = 1 / (end - first)
    for weight, gradient in zip(reversed(taken), reversed(gradients), strict=True):
        # A row vector from the top down is the same product without a matrix of it.
        scores = scores + scores @ (weight.detach() * gradient)[0].clamp(min=0).mean(0).double()
    return scores, {}


def _given_gradients(
    hf: HFModel, prepared: Prepared, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of the target's log-probability by attention weights that are given.

    Args:
        hf: The model, whose attention is replaced meanwhile.
        prepared: What to explain.
        weights: ``[H, N, N]`` of each layer, which stand in for what the softmax gives.

    Returns:
        ``[H, N, N]`` of each layer.
    """
    given = [weight[None].clone().requires_grad_() for weight in weights]
    with _given_attention(hf.model, given):
        value = _log_probability(hf, prepared, torch.tensor([prepared.token_ids]))
        found = torch.autograd.grad(value, given)
    return tuple(gradient[0] for gradient in found)


def _log_probability(
    hf: HFModel, prepared: Prepared, ids: Tensor | None, embeddings: Tensor | None = None
) -> Tensor:
    answer = torch.tensor(prepared.token_ids[slice(*prepared.target)])
    logs = target_logits(hf.model, ids, prepared, embeddings=embeddings)[0].float().log_softmax(-1)
    return logs[torch.arange(len(answer)), answer].sum()


@contextmanager
def _given_attention(model: Any, given: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile each layer mixes its values by these weights, and computes none."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _GIVEN_ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_GIVEN_ATTENTION, _mix_as_given)
        ALL_MASK_ATTENTION_FUNCTIONS.register(
            _GIVEN_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"]
        )
    modules = [layer.self_attn for layer in model.model.layers]
    for module, weights in zip(modules, given, strict=True):
        module.given_attention = weights
    model.set_attn_implementation(_GIVEN_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation("eager")
        for module in modules:
            del module.given_attention


def _mix_as_given(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers: ``[1, N, H, d]`` from values ``[1, G, N, d]``."""
    weights = module.given_attention
    values = value.repeat_interleave(module.num_key_value_groups, dim=1)
    return (weights @ values).transpose(1, 2).contiguous(), weights


def attn_lrp(model: Any, prepared: Prepared) -> Outcome:
    """Relevance of every token for the mean logit of the target, before negatives are dropped.

    Args:
        model: From `with_lrp_rules`.
        prepared: What to explain.

    Returns:
        ``[N]``; and ``conserved``, its sum over the logit. It is not 1: the softmax's share goes
        to its bias term (equation 14 of the paper), as does that of biases.
    """
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([prepared.token_ids]))
    embeddings.requires_grad_(True)
    logits = target_logits(model, None, prepared, embeddings=embeddings)[0]
    answer = torch.tensor(prepared.token_ids[slice(*prepared.target)])
    logit = logits[torch.arange(len(answer)), answer].mean()
    [gradient] = torch.autograd.grad(logit, embeddings)
    relevance = (gradient * embeddings.detach())[0].sum(-1)
    return relevance, {"conserved": float(relevance.sum() / logit.detach())}


def with_lrp_rules(model: Any) -> Any:
    """Binds AttnLRP's rules to the modules of a Llama-type model and returns it.

    Raises:
        MethodFailed: The model has a module that no rule is known for.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lxt = _lxt_patches()
    for name, module in model.named_modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(lxt.rms_norm_forward, module)
        elif hasattr(module, "gate_proj"):
            module.forward = types.MethodType(lxt.gated_mlp_forward, module)
        elif hasattr(module, "experts"):
            raise MethodFailed(f"no AttnLRP rule for {name} ({type(module).__name__})")
    if _ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, lxt.wrap_attention_forward(stock))
        ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_ATTENTION)
    return model


def _lxt_patches() -> Any:
    """``lxt.efficient.patches`` without what ``lxt/efficient/__init__`` imports beside it."""
    import lxt  # type: ignore[import-untyped]

    name = "lxt.efficient"
    if f"{name}.patches" in sys.modules:
        return sys.modules[f"{name}.patches"]
    package = types.ModuleType(name)
    package.__path__ = [str(Path(folder) / "efficient") for folder in lxt.__path__]
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.patches")
    finally:
        del sys.modules[name]  # who imports the real one gets its own error or success
