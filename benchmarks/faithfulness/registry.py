"""Which class offers which method, without importing any of them.

Invariant: a method's name belongs to exactly one family, and a family's module is imported only
when one of its methods is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.faithfulness.method import Family

_HERE = "benchmarks.faithfulness"


@dataclass(frozen=True)
class FamilyEntry:
    """Where a family is and what it offers.

    Attributes:
        target: ``"module:Class"``; the class is constructed with the shared resources alone.
        names: Its methods.
        needs: The shared resources it uses, of ``"engine"`` and ``"hf"``.
    """

    target: str
    names: tuple[str, ...]
    needs: frozenset[str] = frozenset()


FAMILIES = (
    FamilyEntry(
        f"{_HERE}.ours:OursFamily",
        (
            "flashtrace-k0",
            "flashtrace-k1",
            "flashtrace-k2",
            "flashtrace-k3",
            "flashtrace-auto",
            "flashtrace-k1-closure",
            "flashtrace-k2-closure",
            "flashtrace-k1-predicting",
            "flashtrace-k1-skip",
            "flashtrace-k0-skip",
            "flashtrace-auto-skip",
            "flashtrace-k1-drop-sink",
            "flashtrace-k1-prune50",
            "flashtrace-k1-exact",
        ),
        frozenset({"engine"}),
    ),
    FamilyEntry(
        f"{_HERE}.hf_attention:AttentionFamily",
        (
            "ifr-per-token",
            "token-rollout",
            "cage",
            "attention-mean",
            "attention-rollout",
            "value-norm",
        ),
        frozenset({"hf"}),
    ),
    FamilyEntry(f"{_HERE}.package:PackageFamily", ("flashtrace-package",), frozenset({"hf"})),
    FamilyEntry(
        f"{_HERE}.hf_gradients:GradientFamily",
        ("integrated-gradients", "attn-lrp"),
        frozenset({"hf"}),
    ),
    FamilyEntry(f"{_HERE}.hf_clp:ClpFamily", ("clp-sentence",), frozenset({"hf"})),
    FamilyEntry(
        f"{_HERE}.ablation:AblationFamily",
        ("loo-token", "loo-sentence", "contextcite"),
        frozenset({"engine"}),
    ),
    FamilyEntry(f"{_HERE}.simple:SimpleFamily", ("random", "recency", "overlap")),
)

METHODS = tuple(name for entry in FAMILIES for name in entry.names)


def entries_of(names: Collection[str]) -> list[FamilyEntry]:
    """The families that offer these methods, in the order of the registry.

    Raises:
        ValueError: A name belongs to no family.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; known are {', '.join(METHODS)}")
    return [entry for entry in FAMILIES if not set(entry.names).isdisjoint(names)]


def load(entry: FamilyEntry, resources: Any) -> Family:
    """Imports a family and constructs it.

    Args:
        entry: Of `FAMILIES`.
        resources: See `benchmarks.faithfulness.resources.Resources`.
    """
    module, _, name = entry.target.partition(":")
    family: Family = getattr(importlib.import_module(module), name)(resources)
    return family


def families(names: Iterable[str], resources: Any) -> dict[FamilyEntry, Family]:
    """The families of these methods, constructed."""
    return {entry: load(entry, resources) for entry in entries_of(list(names))}
