"""The explained model in Hugging Face transformers, and one recorded forward pass of it.

Whatever a method does here leaves the model as it was: parameters never carry gradients, hooks and
attention implementations last as long as one call, and rules that change the backward pass go on a
copy.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.faithfulness.example import MethodFailed, Prepared

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


class OutputProjection(NamedTuple):
    """``W_O`` of one layer by heads: float32 ``[H, d, D]``, and its columns' norms ``[H, D]``."""

    weight: Tensor
    column_norms: Tensor


@dataclass(frozen=True)
class LayerRecord:
    """What one decoder layer computed for ``N`` tokens, float32.

    Attributes:
        attention: ``[H, N, N]``, attention weights.
        before: ``[N, D]``, the residual stream entering the attention block.
        after: ``[N, D]``, the residual stream after attention has been added.
        values: ``[N, G, d]``, value vectors with their bias.
        projection: ``W_O`` of the layer.
    """

    attention: Tensor
    before: Tensor
    after: Tensor
    values: Tensor
    projection: OutputProjection


@dataclass(frozen=True)
class RecordedForward:
    """One forward pass of the decoder layers, and what it cost."""

    layers: tuple[LayerRecord, ...]
    seconds: float


@torch.no_grad()
def record_forward(
    model: Any, token_ids: Sequence[int], projections: Sequence[OutputProjection]
) -> RecordedForward:
    """Runs a model that stores its attention weights (``attn_implementation="eager"``).

    Args:
        model: A causal language model with ``q/k/v/o_proj`` attention.
        token_ids: ``[N]``.
        projections: ``W_O`` of each layer.
    """
    layers = model.model.layers
    with _recording(layers) as taken:
        began = time.perf_counter()
        model.model(input_ids=torch.tensor([token_ids]), use_cache=False)
        seconds = time.perf_counter() - began
    records = (
        LayerRecord(
            attention=found["attention"],
            before=found["before"],
            after=found["before"] + found["added"],
            values=_by_head(found["values"], layer.self_attn.head_dim),
            projection=projection,
        )
        for found, layer, projection in zip(taken, layers, projections, strict=True)
    )
    return RecordedForward(tuple(records), seconds)


@contextmanager
def _recording(layers: Any) -> Iterator[list[dict[str, Tensor]]]:
    taken: list[dict[str, Tensor]] = [{} for _ in layers]
    hooks = []
    for layer, found in zip(layers, taken, strict=True):
        hooks += [
            layer.register_forward_pre_hook(_take_input(found), with_kwargs=True),
            layer.self_attn.v_proj.register_forward_hook(_take_values(found)),
            layer.self_attn.register_forward_hook(_take_attention(found)),
        ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _by_head(values: Tensor, head_dim: int) -> Tensor:
    """``[N, G * d]`` as ``[N, G, d]`` that lies in memory as ``[G, N, d]``, as the maths likes."""
    return values.view(len(values), -1, head_dim).transpose(0, 1).contiguous().transpose(0, 1)


def _take_input(found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, args: Any, kwargs: Any) -> None:
        found["before"] = (args[0] if args else kwargs["hidden_states"])[0].float()

    return hook


def _take_values(found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        found["values"] = output[0].float()

    return hook


def _take_attention(found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, __: Any, output: Any) -> None:
        found["added"], found["attention"] = output[0][0].float(), output[1][0].float()

    return hook
