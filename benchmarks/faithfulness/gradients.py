"""Gradient baselines: integrated gradients (captum) and AttnLRP (the rules of lxt).

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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Family, MethodFailed, Prepared, Scores
from benchmarks.faithfulness.hf import HFModel, all_cores, target_logits

STEPS = 20
"""Points of the integral."""

_BATCH_TOKENS = 1024
"""Most tokens of one forward and backward pass; its activations are kept."""

_ATTENTION = "attnlrp"


class GradientFamily(Family):
    """Methods that differentiate the answer by the prompt's embeddings."""

    labels: Mapping[str, str] = {
        "integrated-gradients": "integrated gradients of the target's log-probability, 20 steps",
        "attn-lrp": "AttnLRP relevance of the mean target logit, negatives dropped",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf
        self._relevance_model: Any = None

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        results = {}
        for name in names:
            if name == "attn-lrp" and self._relevance_model is None:
                self._relevance_model = with_lrp_rules(self._hf.twin())
            with all_cores():
                began = time.perf_counter()
                if name == "attn-lrp":
                    relevance, facts = attn_lrp(self._relevance_model, prepared)
                    scores = relevance.clamp(min=0)
                else:
                    scores, facts = integrated_gradients(self._hf, prepared, STEPS)
                seconds = time.perf_counter() - began
            results[name] = Scores(scores.double()[slice(*prepared.user)].numpy(), seconds, facts)
        return results

    def close(self) -> None:
        """Lets go of the copy with the rules."""
        self._relevance_model = None


def integrated_gradients(
    hf: HFModel, prepared: Prepared, steps: int
) -> tuple[Tensor, dict[str, float]]:
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


def attn_lrp(model: Any, prepared: Prepared) -> tuple[Tensor, dict[str, float]]:
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
