"""Looks for faster tiles than the kernels have.

Invariant: a tile counts only if its result is that of the tile in use, and the tile in use is back
in its place afterwards. One number of a tile is changed at a time, as long as that helps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Forms, Layer, Proximities, Shape, Stopwatch, forms_on

_TOLERANCE = 1e-3
_GAIN = 0.99
"""A tile is better if it takes less than this share of the time."""

_SMALLEST, _LARGEST = 16, 256
_CHOICES = {"warps": (4, 8), "stages": (1, 2, 3, 4), "registers": (None, 128, 168)}

Row = dict[str, Any]


def tune(
    layers: list[tuple[Shape, int, int]], device: torch.device, repeats: int, limit_seconds: float
) -> Iterator[Row]:
    """Tunes every kernel that has tiles, on each shape, context and number of rows.

    Args:
        layers: Shapes, contexts and rows.
        device: Where to.
        repeats: Timed calls of each tile.
        limit_seconds: Time for all, shared out evenly; a search that was cut short says so.
    """
    end = time.perf_counter() + limit_seconds
    stopwatch, forms = Stopwatch(device, repeats), forms_on(device)
    for number, (shape, context, count) in enumerate(layers):
        layer = Layer.draw(shape, context, count, device)
        kernels = _kernels(forms, layer)
        for done, (module, call) in enumerate(kernels):
            # What one search leaves over goes to those that follow.
            left = len(kernels) * (len(layers) - number) - done
            seconds = max(0.0, end - time.perf_counter()) / left
            key = _key_of(module, call)
            found = _search(module, key, call, stopwatch, seconds)
            name = module.__name__.rsplit(".", 1)[1]
            place = {"kernel": name, "layer": shape.name, "context": context, "rows": count}
            yield {**place, "key": str(key), **found}


_Kernel = tuple[ModuleType, Callable[[], Tensor]]


def _kernels(forms: Forms, layer: Layer) -> list[_Kernel]:
    """Modules with tiles, and calls that take one of them."""
    from vllm_flashtrace.kernels import triton_column_sums, triton_lse, triton_proximity

    inputs = layer.inputs
    first = forms.first_pass(inputs)
    sums = inputs.rows.segments[0].sums.column_sums

    def second_pass() -> Tensor:
        sums.zero_()
        forms.second_pass(inputs, 0, first)
        return sums

    proximities = partial(Proximities(layer).compute, forms)
    return [
        (triton_lse, lambda: forms.lse(inputs)),
        (triton_column_sums, second_pass),
        (triton_proximity, proximities),
    ]


class _Recording(dict[Any, Any]):
    """Tiles that remember which was taken last."""

    taken: Any = None

    def __getitem__(self, key: Any) -> Any:
        self.taken = key
        return super().__getitem__(key)


def _key_of(module: ModuleType, call: Callable[[], Tensor]) -> Any:
    """The key of the tile that a call takes."""
    tiles = module._TILES
    module._TILES = recording = _Recording(tiles)
    try:
        call()
    finally:
        module._TILES = tiles
    return recording.taken


def _search(
    module: ModuleType, key: Any, call: Callable[[], Tensor], stopwatch: Stopwatch, seconds: float
) -> Row:
    tiles = module._TILES
    used = tiles[key]
    expected = call().clone()
    default_ms = best_ms = stopwatch.measure(call)[0]
    best, tried, refused = used, {used}, []
    deadline = time.perf_counter() + seconds
    try:
        improved = True
        while improved:
            improved = False
            for tile in _neighbours(best):
                # One other tile is tried in any case.
                if tile in tried or (len(tried) > 1 and time.perf_counter() > deadline):
                    continue
                tried.add(tile)
                tiles[key] = tile
                try:
                    agrees = _agree(call(), expected)
                    ms = stopwatch.measure(call)[0] if agrees else float("inf")
                except Exception as error:  # Too much shared memory, or too many registers.
                    stopwatch.wait()  # Raises if the device is lost.
                    refused.append([tuple(tile), f"{type(error).__name__}: {error}"[:120]])
                    continue
                if not agrees:
                    refused.append([tuple(tile), "gives another result"])
                if ms < _GAIN * best_ms:
                    best, best_ms, improved = tile, ms, True
    finally:
        tiles[key] = used
    return {
        "default": used._asdict(),
        "default_ms": default_ms,
        "best": best._asdict(),
        "best_ms": best_ms,
        "tried": len(tried),
        "refused": refused,
        "complete": time.perf_counter() < deadline,
    }


def _neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one number."""
    for name, value in tile._asdict().items():
        for choice in _CHOICES[name] if name in _CHOICES else (value // 2, value * 2):
            if name in _CHOICES or _SMALLEST <= choice <= _LARGEST:
                yield tile._replace(**{name: choice})


def _agree(ours: Tensor, expected: Tensor) -> bool:
    difference = (ours - expected).abs().max()
    return bool(difference <= _TOLERANCE * expected.abs().max())
