"""The groups of the KV cache that hold traced layers, and whether they keep what a trace needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker.layers import TracedLayer

# Those whose caches free the blocks that no later token sees.
_FREEING_SPECS = (ChunkedLocalAttentionSpec, SlidingWindowSpec)


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """Where the KV cache keeps the traced layers: in groups, each with block tables of its own.

    Attributes:
        numbers: The groups that hold any of them, as the runner counts groups.
        places: Of each layer, the place of its group in ``numbers``.
        names: Names of the layers in vLLM's forward context.
    """

    numbers: tuple[int, ...]
    places: tuple[int, ...]
    names: frozenset[str]

    def layers(self, place: int) -> list[int]:
        """Indices of the layers of one group."""
        return [layer for layer, where in enumerate(self.places) if where == place]


def cache_groups(config: KVCacheConfig, layers: Sequence[TracedLayer]) -> CacheGroups:
    """Finds the groups of the KV cache that hold the layers.

    A group of layers with a sliding window, or with chunks, forgets tokens behind it; those that a
    trace needs are kept for it, see `patches.kept_blocks`.

    Raises:
        UnsupportedModelError: A cache may forget what a trace needs, or does not hold a layer.
    """
    number_of = {}
    for number, group in enumerate(config.kv_cache_groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            number_of[name] = number, specs.get(name, group.kv_cache_spec)
    for layer in layers:
        if layer.name not in number_of:
            raise UnsupportedModelError(f"the KV cache does not hold {layer.name}")
        spec = number_of[layer.name][1]
        if getattr(spec, "non_causal", False):
            raise UnsupportedModelError("traces are supported with causal attention only")
        if type(spec) not in (FullAttentionSpec, MLAAttentionSpec, *_FREEING_SPECS):
            raise UnsupportedModelError(
                f"traces are not supported with a {type(spec).__name__}: its cache does not keep "
                "every token"
            )
    numbers = sorted({number_of[layer.name][0] for layer in layers})
    places = tuple(numbers.index(number_of[layer.name][0]) for layer in layers)
    return CacheGroups(tuple(numbers), places, frozenset(layer.name for layer in layers))


def keeps_blocks(config: KVCacheConfig, tokens: int) -> bool:
    """Whether the KV cache has room for all blocks of a request, also those that others free.

    The scheduler and its workers ask this of the same configuration: the one keeps the blocks of a
    trace, the others trace it, or neither does.

    Args:
        config: The KV cache's.
        tokens: Tokens of the request; places for drafts take up to one more block.
    """
    groups = config.kv_cache_groups
    if not any(type(group.kv_cache_spec) in _FREEING_SPECS for group in groups):
        return True
    blocks = sum(-(-tokens // group.kv_cache_spec.block_size) + 1 for group in groups)
    return blocks < config.num_blocks  # Block 0 stays empty.
