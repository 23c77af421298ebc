"""The shapes that are timed: one layer of models in use, with inputs like those of real text.

Invariant: keys and values are drawn at random, since no kernel's time depends on them but that of
`proximity`, whose column sums are scaled so that a stated share of the pairs of a token and a head
needs more than the eight nearest coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_timing import Cost
from vllm_flashtrace.kernels import Accumulators, AttentionForm, PagedRows, RowSegment

FAR_SHARE = 0.02
"""Share of pairs that needs more than the nearest coordinates; on real text 1 to 3 in a hundred."""

_NEAREST = 8
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one layer: query heads H, key/value heads G, head size d, hidden size D."""

    name: str
    heads: int
    groups: int
    head_dim: int
    hidden: int


SHAPES = (
    Shape("8B", 32, 8, 128, 4096),  # Qwen3-8B and Llama-3.1-8B, which are the same here.
    Shape("70B, TP 8", 8, 1, 128, 8192),
)
CONTEXTS = (4096, 16384, 65536)
ROWS = (32, 1024, 8192)
TINY_SHAPES = (Shape("tiny", 4, 2, 16, 48),)
TINY_CONTEXTS, TINY_ROWS = (48,), (4, 32)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """bfloat16 tensors of one layer whose last tokens are target rows.

    Attributes:
        shape: The model.
        context: Tokens N.
        count: Target rows R, the last of the context.
        query: ``[R, H, d]``.
        cache: ``[blocks, G, block_size, 2d]``, keys, then values.
        rows: The target rows.
        form: Plain causal attention.
    """

    shape: Shape
    context: int
    count: int
    query: Tensor
    cache: Tensor
    rows: PagedRows
    form: AttentionForm

    @classmethod
    def draw(cls, shape: Shape, context: int, count: int, device: torch.device) -> Layer:
        """Random keys, values and queries in blocks that lie in no order."""
        blocks = -(-context // _BLOCK_SIZE)
        size = (blocks, shape.groups, _BLOCK_SIZE, 2 * shape.head_dim)
        query = torch.randn(count, shape.heads, shape.head_dim, device=device).bfloat16()
        cache = torch.randn(size, device=device, dtype=torch.bfloat16)
        segment = RowSegment(
            torch.arange(count),
            torch.arange(context - count, context),
            torch.full((count,), 1 / count),
            torch.randperm(blocks).int().to(device),
            Accumulators(
                torch.zeros(1, shape.heads, context, device=device),
                torch.zeros(1, shape.hidden, device=device),
                torch.zeros(1, shape.hidden, device=device),
            ),
        )
        rows = PagedRows.build([segment], shape.heads, shape.groups, device)
        return cls(shape, context, count, query, cache, rows, AttentionForm(shape.head_dim**-0.5))

    @property
    def keys(self) -> Tensor:
        """``[blocks, G, block_size, d]``."""
        return self.cache[..., : self.shape.head_dim]

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self.cache[..., self.shape.head_dim :]

    @property
    def pairs(self) -> int:
        """Visible pairs of a row and a key, counted exactly."""
        return self.count * (self.context - self.count) + self.count * (self.count + 1) // 2

    def attention_cost(self, passes: int) -> Cost:
        """Of so many passes, each a product of queries with all visible keys."""
        shape = self.shape
        vectors = self.count * shape.heads + self.context * shape.groups
        numbers = self.count * shape.heads + (shape.heads * self.context if passes > 1 else 0)
        return Cost(
            passes * 2.0 * shape.head_dim * shape.heads * self.pairs,
            passes * 2.0 * vectors * shape.head_dim + 4.0 * numbers,
            float(passes * shape.heads * self.pairs),
        )

    def whole_attention_cost(self) -> Cost:
        """Of attention itself: logits and outputs, with queries, keys, values and outputs."""
        vectors = self.count * self.shape.heads + self.context * self.shape.groups
        once = self.attention_cost(1)
        return Cost(2 * once.flops, 2 * 2.0 * vectors * self.shape.head_dim, once.exponentials)

    def row_sums_cost(self) -> Cost:
        """Of one weighted sum over the rows of a bfloat16 stream."""
        return Cost(2.0 * self.count * self.shape.hidden, 2.0 * self.count * self.shape.hidden)


@dataclass(frozen=True, slots=True, eq=False)
class ProximityInputs:
    """Arguments of `kernels.proximity` for a layer.

    Attributes:
        column_sums: float32 ``[H, N]``, log-normal over tokens (sigma 2), each head scaled so that
            the reach ``c |v|`` of `FAR_SHARE` of its tokens exceeds its ninth nearest coordinate.
        weight: bfloat16 ``[D, H*d]``, normal.
        norms: float32 ``[H, D]``.
        stream: float32 ``[D]``, normal.
        far_share: Share of pairs that do exceed it, as counted.
    """

    column_sums: Tensor
    weight: Tensor
    norms: Tensor
    stream: Tensor
    far_share: float

    @classmethod
    def draw(cls, layer: Layer) -> ProximityInputs:
        """Draws them for the values in a layer's cache."""
        shape, device = layer.shape, layer.cache.device
        width = shape.heads * shape.head_dim
        weight = (torch.randn(shape.hidden, width, device=device) * width**-0.5).bfloat16()
        norms = weight.float().unflatten(1, (shape.heads, -1)).norm(dim=2).t().contiguous()
        stream = torch.randn(shape.hidden, device=device)
        table = layer.rows.segments[0].block_table.long()
        lengths = layer.values.float().norm(dim=3)[table].transpose(0, 1).flatten(1)
        lengths = lengths[:, : layer.context].repeat_interleave(shape.heads // shape.groups, 0)
        sums = torch.randn(shape.heads, layer.context, device=device).mul_(2).exp_()
        ninth = (stream.abs() / norms).kthvalue(_NEAREST + 1, dim=1).values[:, None]
        reach = (sums * lengths).sort(dim=1, descending=True).values
        sums *= ninth / reach[:, int(FAR_SHARE * layer.context), None]
        far = (sums * lengths > ninth).float().mean()
        return cls(sums, weight, norms, stream, float(far))

    def cost(self, layer: Layer) -> Cost:
        """Eight coordinates and the total for every pair, all coordinates for those that need it.

        An `exact_fraction` below 1 leaves some of these out; its floor is the same.
        """
        shape, pairs = layer.shape, layer.shape.heads * layer.context
        near = 2.0 * shape.head_dim * (1 + _NEAREST) * pairs
        far = 2.0 * shape.head_dim * shape.hidden * self.far_share * pairs
        numbers = pairs + layer.context + self.norms.numel() + self.stream.numel()
        values = layer.context * shape.groups * shape.head_dim
        return Cost(near + far, 2.0 * (values + self.weight.numel()) + 4.0 * numbers)
