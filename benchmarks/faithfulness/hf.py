"""The explained model in Hugging Face transformers, for baselines that an engine cannot run.

Invariant: whatever a method does here leaves the model as it was: parameters never carry gradients,
hooks and attention implementations last as long as one call, and rules that change the backward
pass go on a copy.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.hf_record import OutputProjection, RecordedForward, record_forward
from benchmarks.faithfulness.method import MethodFailed

GIB = 1 << 30


class HFModel:
    """A causal language model in eval mode with stored attentions, and its tokenizer."""

    def __init__(
        self,
        model_path: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        max_attention_gib: float = 6.0,
    ) -> None:
        """Loads the weights.

        Args:
            model_path: Folder of a model with ``q/k/v/o_proj`` attention (Llama, Qwen2, Qwen3).
            dtype: Of weights and activations.
            max_attention_gib: Most memory that the attention matrices of a forward may take.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, attn_implementation="eager", dtype=dtype
        )
        self.model.eval().requires_grad_(False)
        self._max_attention_gib = max_attention_gib
        self._latest: tuple[tuple[int, ...], RecordedForward] | None = None
        self._projections = [self._projection(layer) for layer in self.model.model.layers]

    @property
    def pad_token_id(self) -> int:
        """The token that stands for removed text."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def recorded(self, prepared: Prepared) -> RecordedForward:
        """The forward pass of an example; that of the latest example is kept.

        Raises:
            MethodFailed: The attention matrices do not fit into the memory allowed for them.
        """
        if self._latest is None or self._latest[0] != prepared.token_ids:
            self._latest = None  # before the next one takes its memory
            self.check_attention_fits(len(prepared.token_ids))
            with all_cores():
                forward = record_forward(self.model, prepared.token_ids, self._projections)
            self._latest = (prepared.token_ids, forward)
        return self._latest[1]

    def check_attention_fits(self, tokens: int) -> None:
        """Refuses lengths whose attention matrices would be too large.

        Raises:
            MethodFailed: They do not fit into the memory allowed for them.
        """
        matrices = sum(len(projection.weight) for projection in self._projections)
        needed = matrices * tokens**2 * 4 / GIB
        if needed > self._max_attention_gib:
            raise MethodFailed(
                f"attention matrices of {tokens} tokens need {needed:.1f} GiB, "
                f"allowed are {self._max_attention_gib:g} GiB"
            )

    def target_logits(
        self, token_ids: Tensor | None, prepared: Prepared, *, embeddings: Tensor | None = None
    ) -> Tensor:
        """Logits that predict the target tokens, ``[B, T, vocabulary]``.

        Args:
            token_ids: ``[B, N]``; None where embeddings are given.
            prepared: Says where the target is.
            embeddings: ``[B, N, D]`` in the place of tokens.
        """
        return target_logits(self.model, token_ids, prepared, embeddings=embeddings)

    def twin(self) -> Any:
        """A copy of the model whose modules can be changed; it shares the weights."""
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, shared)

    @contextmanager
    def fused_attention(self) -> Iterator[None]:
        """Meanwhile the model runs attention without storing it: faster, and in less memory."""
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation("eager")

    def close(self) -> None:
        """Lets go of the recorded forward pass; the weights go with the object."""
        self._latest = None

    def _projection(self, layer: Any) -> OutputProjection:
        attention = layer.self_attn
        weight = attention.o_proj.weight.detach().float()  # [D, H * d]
        heads = weight.shape[1] // attention.head_dim
        by_head = weight.view(weight.shape[0], heads, attention.head_dim).permute(1, 2, 0)
        return OutputProjection(by_head, torch.linalg.vector_norm(by_head, dim=1))


def target_logits(
    model: Any, token_ids: Tensor | None, prepared: Prepared, *, embeddings: Tensor | None = None
) -> Tensor:
    """See `HFModel.target_logits`, for any model."""
    first, end = prepared.target
    output = model.model(input_ids=token_ids, inputs_embeds=embeddings, use_cache=False)
    return model.lm_head(output.last_hidden_state[:, first - 1 : end - 1])


def all_cores() -> AbstractContextManager[None]:
    """Torch uses every core this process may run on, and what it used before afterwards."""
    return _threads(len(os.sched_getaffinity(0)))


def one_core() -> AbstractContextManager[None]:
    """The same with one core: for many small operations, which wait for each other otherwise."""
    return _threads(1)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
