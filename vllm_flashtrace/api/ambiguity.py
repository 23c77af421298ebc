"""Whether a regular expression can take a backtracking matcher exponential time.

Invariant: the answer errs on the side of yes; a pattern found unambiguous has no loop in which one
text can be read along two paths.

The check builds the position automaton of the pattern (Glushkov's construction: one state per
character that the pattern consumes). A matcher can be exponential only if some state returns to
itself by two different paths that read the same text: Weber and Seidl, "On the degree of ambiguity
of finite automata" (1991). That is so when two nested loops make the same transition, or when two
copies of the automaton leave a state together, separate, and come back to it together.
"""

from __future__ import annotations

import re._constants as sre  # type: ignore[import-not-found]
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from vllm_flashtrace.api.parsed_pattern import (
    REPEATS,
    TooComplexError,
    accepts,
    expanded_size,
    sample_alphabet,
)

_MAX_STATES = 512
_MAX_STEPS = 250_000
_MAX_COPIES = 3
_MAX_FIXED_COPIES = 128
_MAX_EXPANDED = 10_000  # A compiler may write nested counted repeats out in full.

Pair = tuple[int, int]
Graph = dict[Pair, set[Pair]]


def is_ambiguous(parsed: Any, *, ignore_case: bool = False) -> bool:
    """Analyses a parsed pattern.

    Args:
        parsed: What the standard library's regular expression parser returns.
        ignore_case: Whether letters match both cases.

    Raises:
        TooComplexError: The pattern is beyond what this check handles.
    """
    if expanded_size(parsed) > _MAX_EXPANDED:
        raise TooComplexError("repeats too many times")
    automaton = _Automaton(sample_alphabet(parsed), ignore_case)
    automaton.build(parsed)
    return automaton.ambiguous_loop or automaton.reads_a_loop_twice()


@dataclass(frozen=True, slots=True)
class _Fragment:
    """Part of a pattern: states it can begin and end in, and whether it can match ``""``."""

    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    nullable: bool = True


@dataclass(slots=True)
class _Automaton:
    """States and transitions of a pattern.

    Attributes:
        alphabet: Sample characters.
        ignore_case: Whether letters match both cases.
        masks: Characters of each state, one bit per sample.
        known_masks: The same by parsed item; repeats use an item many times.
        follow: States that may come next.
        empty_choices: How many parts can match ``""`` in two ways; inside a loop that doubles the
            number of paths at every turn without any state of its own.
        ambiguous_loop: Whether two loops, or a loop and such a part, were found nested.
    """

    alphabet: str
    ignore_case: bool
    masks: list[int] = field(default_factory=list)
    known_masks: dict[str, int] = field(default_factory=dict)
    follow: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    empty_choices: int = 0
    ambiguous_loop: bool = False

    def build(self, items: Any) -> _Fragment:
        """Adds a sequence of parsed items."""
        result = _Fragment()
        for op, value in items:
            result = self._join(result, self._build_item(op, value))
        return result

    def _build_item(self, op: Any, value: Any) -> _Fragment:
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return self._state(self._mask(op, value))
        if op is sre.BRANCH:
            return self._union([self.build(branch) for branch in value[1]])
        if op is sre.SUBPATTERN:
            return self.build(value[3])
        if op in REPEATS:
            return self._repeat(*value)
        if op is sre.ATOMIC_GROUP:
            return self.build(value)
        if op in (sre.ASSERT, sre.ASSERT_NOT):
            self.build(value[1])  # Its own loops count; around it, it consumes nothing.
            return _Fragment()
        if op is sre.GROUPREF:
            anything = self._state((1 << len(self.alphabet)) - 1)
            return self._loop(anything, self.empty_choices, nullable=True)
        if op is sre.GROUPREF_EXISTS:
            _, yes, no = value
            return self._union([self.build(yes), _Fragment() if no is None else self.build(no)])
        if op is sre.AT:
            return _Fragment()
        raise TooComplexError(f"uses {op}, which is not supported")

    def _state(self, mask: int) -> _Fragment:
        if len(self.masks) >= _MAX_STATES:
            raise TooComplexError("is too large")
        self.masks.append(mask)
        one = frozenset([len(self.masks) - 1])
        return _Fragment(one, one, nullable=False)

    def _join(self, left: _Fragment, right: _Fragment) -> _Fragment:
        for state in left.last:
            self.follow[state] |= right.first
        return _Fragment(
            left.first | right.first if left.nullable else left.first,
            left.last | right.last if right.nullable else right.last,
            left.nullable and right.nullable,
        )

    def _union(self, branches: list[_Fragment]) -> _Fragment:
        self.empty_choices += sum(branch.nullable for branch in branches) > 1
        return _Fragment(
            frozenset().union(*(branch.first for branch in branches)),
            frozenset().union(*(branch.last for branch in branches)),
            any(branch.nullable for branch in branches),
        )

    def _loop(self, body: _Fragment, choices_before: int, *, nullable: bool) -> _Fragment:
        self.ambiguous_loop |= self.empty_choices > choices_before
        for state in body.last:
            self.ambiguous_loop |= not self.follow[state].isdisjoint(body.first)
            self.follow[state] |= body.first
        self.empty_choices += nullable and body.nullable
        return _Fragment(body.first, body.last, nullable or body.nullable)

    def _repeat(self, low: int, high: Any, body: Any) -> _Fragment:
        shortest, longest = body.getwidth()
        if (
            high == sre.MAXREPEAT
            or (shortest != longest and high > _MAX_COPIES)
            or (shortest == longest and high * longest > _MAX_FIXED_COPIES)
        ):
            before = self.empty_choices
            return self._loop(self.build(body), before, nullable=low == 0)
        copies = [self.build(body) for _ in range(high if longest else min(high, 1))]
        # Nested as in x(x(x)?)?, which reads a text along one path where x?x?x? has several.
        optional = _Fragment()
        for one in reversed(copies[low:]):
            self.empty_choices += one.nullable
            joined = self._join(one, optional)
            optional = _Fragment(joined.first, joined.last, nullable=True)
        result = _Fragment()
        for one in [*copies[:low], optional]:
            result = self._join(result, one)
        return result

    def _mask(self, op: Any, value: Any) -> int:
        item = repr((op, value))
        if item not in self.known_masks:
            self.known_masks[item] = self._new_mask(op, value)
        return self.known_masks[item]

    def _new_mask(self, op: Any, value: Any) -> int:
        mask = 0
        for bit, character in enumerate(self.alphabet):
            cases = {character}
            if self.ignore_case:
                cases |= {c for c in (character.lower(), character.upper()) if len(c) == 1}
            if any(accepts(op, value, c) for c in cases):
                mask |= 1 << bit
        return mask

    def reads_a_loop_twice(self) -> bool:
        """Whether a state returns to itself by two different paths over the same text."""
        graph: Graph = {}
        pending: list[Pair] = [(state, state) for state in range(len(self.masks))]
        steps = 0
        while pending:
            pair = pending.pop()
            if pair in graph:
                continue
            left, right = (self.follow[state] for state in pair)
            steps += len(left) * len(right)
            if steps > _MAX_STEPS:
                raise TooComplexError("is too complex to check")
            # Unordered pairs suffice: exchanging the copies changes no path back to a pair (s, s).
            graph[pair] = {
                (a, b) if a < b else (b, a)
                for a in left
                for b in right
                if self.masks[a] & self.masks[b]
            }
            pending += graph[pair]
        return any(
            any(a == b for a, b in component) and any(a != b for a, b in component)
            for component in _components(graph)
        )


def _components(graph: Graph) -> list[list[Pair]]:
    """Strongly connected components (Kosaraju's two passes, without recursion)."""
    order: list[Pair] = []
    seen: set[Pair] = set()
    for root in graph:
        stack = [(root, iter(graph[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            node, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(graph[following])))
    backward: dict[Pair, list[Pair]] = defaultdict(list)
    for node, successor_set in graph.items():
        for successor in successor_set:
            backward[successor].append(node)
    components: list[list[Pair]] = []
    assigned: set[Pair] = set()
    for root in reversed(order):
        component, pending = [], [root]
        while pending:
            node = pending.pop()
            if node not in assigned:
                assigned.add(node)
                component.append(node)
                pending += backward[node]
        if component:
            components.append(component)
    return components
