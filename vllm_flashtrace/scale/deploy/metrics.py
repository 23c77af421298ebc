"""One page of metrics for all replicas.

Invariant: no sample of a replica is lost or changed but for the label that names the replica, so
that counters never go back because another replica answers.
"""

from __future__ import annotations

from collections.abc import Mapping

LABEL = "replica"


def merge(pages: Mapping[str, str]) -> str:
    """Merges Prometheus text pages.

    Args:
        pages: Text by name of the replica.

    Returns:
        One page; every sample has a ``replica`` label.
    """
    families: dict[str, list[str]] = {}
    comments: dict[str, list[str]] = {}
    for replica, text in pages.items():
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                known = comments.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line and not line.startswith("#"):
                families.setdefault(family, []).append(_labelled(line, replica))
    lines = []
    for family in {**comments, **families}:
        lines += [*comments.get(family, ()), *families.get(family, ())]
    return "".join(f"{line}\n" for line in lines)


def _labelled(line: str, replica: str) -> str:
    label = f'{LABEL}="{replica}"'
    name, brace, rest = line.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"
