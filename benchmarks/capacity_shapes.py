"""Shapes of well-known models, and what follows from them: parameters, KV cache, accumulators.

Invariant: sizes come from the models' published configurations and nothing else; accumulators are
priced by the plugin's own `AccumulatorBudget`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flashtrace.trace.budget import AccumulatorBudget, ModelShape

_BFLOAT16 = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder with gated feed-forward layers, in bfloat16.

    Attributes:
        name: Of the model.
        layers: Decoder layers L.
        heads: Query heads H.
        kv_heads: Key/value heads G.
        head_dim: Size d of a head.
        hidden: Hidden size D.
        feed_forward: Inner size of a feed-forward layer.
        vocabulary: Tokens.
        tied: Whether input and output embeddings are one matrix.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices; norms and biases, below 0.1 %, are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    @property
    def head_parameters(self) -> int:
        """Of the output embedding."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.layer_parameters + (1 if self.tied else 2) * self.head_parameters

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return _BFLOAT16 * self.parameters

    @property
    def output_projection_bytes(self) -> int:
        """Of ``W_O`` in all layers."""
        return _BFLOAT16 * self.layers * self.heads * self.head_dim * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return _BFLOAT16 * 2 * self.layers * self.kv_heads * self.head_dim

    def accumulators(self, limit_bytes: int = 0, ranks: int = 1) -> AccumulatorBudget:
        """What a trace holds on each of so many tensor-parallel ranks."""
        shape = ModelShape(
            num_layers=self.layers,
            num_heads=self.heads // ranks,
            num_kv_heads=max(1, self.kv_heads // ranks),
            hidden_size=self.hidden,
        )
        return AccumulatorBudget.of_model(limit_bytes, shape)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 30, 9, 3, 64, 576, 1536, 49152, tied=True),
        Shape("Llama-3.1-8B", 32, 32, 8, 128, 4096, 14336, 128256),
        Shape("Qwen3-8B", 36, 32, 8, 128, 4096, 12288, 151936),
        Shape("Qwen3-32B", 64, 64, 8, 128, 5120, 25600, 151936),
        Shape("Llama-3.1-70B", 80, 64, 8, 128, 8192, 28672, 128256),
        Shape("Qwen2.5-72B", 80, 64, 8, 128, 8192, 29568, 152064),
    )
}
