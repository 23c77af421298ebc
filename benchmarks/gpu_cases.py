"""The cases on which the kernels are compared with float64.

Invariant: every value of every feature occurs, and features that meet in one kernel (type and head
size, heads and block size, form and segments) occur together. A case is a few numbers, so that a
failure can be run again by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import cycle
from typing import NamedTuple


class Part(NamedTuple):
    """One trace in a step: target rows at the end of a context, adjacent or with gaps."""

    rows: int
    context: int
    gaps: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One setting of everything a kernel may meet.

    Attributes:
        query: Type of queries, and of the weight and the residual if it has at least 16 bits.
        cache: Type of keys and values.
        head_dim: Head size d.
        groups: Key/value heads G.
        shared: Query heads of each.
        block_size: Tokens of a block.
        layout: ``HND`` or ``NHD``, the order of heads and slots in memory.
        window: Sliding window, or None.
        soft_cap: Logit cap, 0 for none.
        sinks: Whether heads have sinks.
        alibi: Whether heads have slopes.
        parts: The traces of the step.
        hidden: Size D of the stream.
        value_scale: Factor on cached values.
    """

    query: str = "bfloat16"
    cache: str = "bfloat16"
    head_dim: int = 128
    groups: int = 2
    shared: int = 4
    block_size: int = 16
    layout: str = "HND"
    window: int | None = None
    soft_cap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    parts: tuple[Part, ...] = (Part(70, 300), Part(5, 150))
    hidden: int = 512
    value_scale: float = 1.0

    @property
    def name(self) -> str:
        """What differs from the default case."""
        changed = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return " ".join(changed) or "default"

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.groups * self.shared

    @property
    def tolerance(self) -> float:
        """Largest relative error: 1e-5 where all is float32, else 1e-3."""
        return 1e-5 if self.query == self.cache == "float32" else 1e-3


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{p.rows}/{p.context}{'~' if p.gaps else ''}" for p in value)
    return str(value)


HEAD_SIZES = (64, 80, 96, 128, 192, 256)
RATIOS = (1, 4, 5, 7, 8)
BLOCK_SIZES = (16, 32, 128, 48)
_FORMS: tuple[dict[str, object], ...] = (
    {"window": 33},
    {"window": 1},
    {"soft_cap": 20.0},
    {"sinks": True},
    {"alibi": True},
    {"window": 100, "sinks": True},
    {"window": 64, "soft_cap": 20.0},
    {"soft_cap": 20.0, "alibi": True, "sinks": True, "window": 77},
)
_SEGMENTS = (
    (Part(1, 1),),
    (Part(1, 700), Part(300, 300), Part(17, 129)),
    (Part(8, 16384),),
    (Part(2048, 2048),),
    (Part(90, 600, gaps=True), Part(60, 200, gaps=True)),
    (Part(300, 5000), Part(3, 9000)),
)


def full_grid() -> list[Case]:
    """All cases, on a GPU a few minutes, most of them compilation."""
    return list(dict.fromkeys(_full()))


def _full() -> Iterator[Case]:
    base = Case()
    yield base
    ratios, sizes, layouts = cycle(RATIOS), cycle(BLOCK_SIZES), cycle(("NHD", "HND", "HND"))
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in HEAD_SIZES:
            yield replace(
                base,
                query=dtype,
                cache=dtype,
                head_dim=head_dim,
                shared=next(ratios),
                block_size=next(sizes),
                layout=next(layouts),
            )
    for query, cache in (
        ("bfloat16", "float8_e4m3fn"),
        ("float16", "float8_e5m2"),
        ("bfloat16", "float8_e5m2"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("float32", "bfloat16"),
    ):
        for head_dim, value_scale in ((64, 0.37), (96, 1.0), (128, 2.5), (256, 0.37)):
            yield replace(
                base,
                query=query,
                cache=cache,
                head_dim=head_dim,
                layout=next(layouts),
                value_scale=value_scale,
            )
    for ratio in RATIOS:
        for block_size in BLOCK_SIZES:
            layout = next(layouts)
            yield replace(base, shared=ratio, block_size=block_size, layout=layout, head_dim=64)
    for form in _FORMS:
        for dtype, parts in (("bfloat16", base.parts), ("float32", _SEGMENTS[1])):
            case = replace(base, query=dtype, cache=dtype, parts=parts, head_dim=64)
            yield replace(case, **form)
    for parts in _SEGMENTS:
        yield replace(base, parts=parts)
        yield replace(base, parts=parts, query="float32", cache="float32", head_dim=64)
        yield replace(base, parts=parts, window=200, sinks=True, layout="NHD")
    for hidden in (96, 4096, 5120):
        yield replace(base, hidden=hidden)


def small_grid() -> list[Case]:
    """A few cases that Triton's interpreter gets through in seconds."""
    small = Case(head_dim=16, shared=2, hidden=48, parts=(Part(9, 40), Part(2, 21)))
    return [
        replace(small, query="float32", cache="float32", block_size=48, shared=5, groups=1),
        replace(small, cache="float8_e4m3fn", value_scale=0.37, layout="NHD", parts=(Part(3, 30),)),
        replace(
            small,
            query="float32",
            cache="float32",
            window=7,
            soft_cap=20.0,
            sinks=True,
            alibi=True,
            parts=(Part(6, 35, gaps=True),),
        ),
    ]
