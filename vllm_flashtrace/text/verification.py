"""Verification: how much less likely a target is without the parts of the prompt that score best.

An attribution says what a target's information flowed from, not what would have been without it.
Here parts of the client's texts are taken out of the prompt, each alone and all together, and the
target's tokens are scored again behind what is left. What was generated before the target stays as
it is.

A prompt without a part is made as the prompt was: the client's texts without the characters, the
request's own template, the model's tokenizer. It counts only if the same way gives exactly the
prompt's tokens where nothing is taken out, and if the rendered text lacks these characters and
nothing else; otherwise the entry has a reason in place of numbers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from vllm_flashtrace.api.response import Verdict
from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.base.records import Completion, ScoredText, ScoreReport, Span
from vllm_flashtrace.text.citations import evidence
from vllm_flashtrace.text.plan import TracePlan
from vllm_flashtrace.text.prompt_texts import (
    MessageText,
    Render,
    rendered,
    replaced_texts,
)
from vllm_flashtrace.text.sentences import contents, sentences
from vllm_flashtrace.text.sources import PromptSource

SUPPORTED_NATS, SUPPORTED_NATS_PER_TOKEN = math.log(10), 0.1
WEAK_NATS, WEAK_NATS_PER_TOKEN = math.log(2), 0.03

_NO_UNITS = "the prompt has no text of the client whose place is known"
_NOT_THE_CLIENTS = "it stands in no message: the chat template writes it"

_REASONING_STAYS = (
    "no verdict: the reasoning before the target stays, and may be what it was taken from"
)


def verdict_of(drop: float, tokens: int) -> Verdict:
    """What a fall of a target's log-probability says.

    Args:
        drop: By how many nats it falls.
        tokens: How many tokens the target has.
    """
    if drop >= max(SUPPORTED_NATS, SUPPORTED_NATS_PER_TOKEN * tokens):
        return "supported"
    return "weak" if drop >= max(WEAK_NATS, WEAK_NATS_PER_TOKEN * tokens) else "unsupported"


class TextRange(NamedTuple):
    """Characters ``[start, end)`` of a message's content, of a part of it, or of a plain prompt."""

    message: int
    part: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the prompt that is taken out as a whole.

    Attributes:
        fields: What the response says of it.
        ranges: Where it lies in the client's texts; empty where it is in none of them.
    """

    fields: Mapping[str, Any]
    ranges: tuple[TextRange, ...]


def best_units(plan: TracePlan, count: int) -> list[Unit]:
    """What scores best, after the plan has been run: sources by their evidence, or sentences.

    Args:
        plan: The plan; its sources, where the request has any, come in place of sentences, which
            are ranked by their mean.
        count: Most units.
    """
    scores = plan.recursion.result().scores[: plan.prompt_length].tolist()
    if plan.sources is not None:
        ranked = ((evidence(source, scores), i) for i, source in enumerate(plan.sources))
        best = sorted((-known, i) for known, i in ranked if known > 0)[:count]
        return [_source_unit(plan.sources[i], i, scores) for _, i in best]
    found = sentences(plan.prompt_map, plan.completion, scores)
    found = sorted((one for one in found if one["mean"] > 0), key=lambda one: -one["mean"])
    return [
        Unit(one, (TextRange(one["message"], one.get("part"), one["start"], one["end"]),))
        for one in found[:count]
    ]


def _source_unit(source: PromptSource, index: int, scores: Sequence[float]) -> Unit:
    entry = source.scored(index, scores)
    fields = {name: value for name, value in entry.items() if name != "sentences"}
    key, span = source.source.key, source.source.span
    return Unit(fields, () if key is None else (TextRange(*key, *span),))


class CannotRemoveError(Exception):
    """The text is the reason that an entry has in place of numbers."""


_Removal: TypeAlias = frozenset[TextRange]


@dataclass(slots=True)
class _Text:
    """A prompt without some parts: what is scored behind it, or why it cannot be.

    Attributes:
        prompt_token_ids: The prompt without them.
        reason: Why there is none.
        plans: Indices of the plans whose targets are scored.
    """

    prompt_token_ids: list[int] | None
    reason: str
    plans: list[int]


class Verification:
    """The texts to be scored for the targets of one completion, and what their scores say.

    Attributes:
        texts: What is to be scored; the first is the text as it was generated.
    """

    texts: list[ScoredText]

    def __init__(
        self,
        plans: Sequence[TracePlan],
        tokenizer: Any,
        *,
        render: Render | None = None,
        max_requests: int = 128,
    ) -> None:
        """Makes the texts; those that are the same for several targets once.

        Args:
            plans: The plans, all of which have been run.
            tokenizer: The model's tokenizer.
            render: Renders messages exactly as the completion's were.
            max_requests: Most texts.
        """
        self._plans = plans
        self._units = [best_units(plan, plan.request.verify) for plan in plans]
        self._prompt = _Prompt(plans[0].completion, tokenizer, render)
        self._made: dict[_Removal, _Text] = {}
        self._places: dict[_Removal, int] = {}
        self.texts = []
        whole = _Text(list(plans[0].completion.prompt_token_ids), "", list(range(len(plans))))
        wanted = [(_removal(units), index) for index, units in enumerate(self._units)]
        for rank in range(plans[0].request.verify):
            wanted += [
                (_removal([units[rank]]), index)
                for index, units in enumerate(self._units)
                if rank < len(units)
            ]
        for removal, index in wanted:
            if not removal:
                continue
            made = self._made.get(removal)
            if made is None:
                made = self._made[removal] = self._without(removal, max_requests)
            if index not in made.plans:
                made.plans.append(index)
        if any(made.prompt_token_ids is not None for made in self._made.values()):
            self._made = {frozenset(): whole, **self._made}
            self._add_texts()

    def _without(self, removal: _Removal, max_requests: int) -> _Text:
        if 1 + sum(made.prompt_token_ids is not None for made in self._made.values()) >= (
            max_requests
        ):
            reason = f"the server scores at most {max_requests} texts (max_verify_requests)"
            return _Text(None, reason, [])
        try:
            return _Text(self._prompt.without(removal), "", [])
        except CannotRemoveError as error:
            return _Text(None, str(error), [])

    def _add_texts(self) -> None:
        generated = self._plans[0].completion.generated_token_ids
        for removal, made in self._made.items():
            if made.prompt_token_ids is None:
                continue
            self._places[removal] = len(self.texts)
            length = len(made.prompt_token_ids)
            positions = sorted({length + i for plan in made.plans for i in self._target(plan)})
            token_ids = [*made.prompt_token_ids, *generated][: positions[-1] + 1]
            self.texts.append(ScoredText(token_ids, positions))

    def _target(self, index: int) -> list[int]:
        """The target's tokens, counted from the first generated one."""
        return [i for span in self._plans[index].target_spans for i in range(*span)]

    def results(
        self, reports: Sequence[ScoreReport | FlashTraceError], weights: str | None = None
    ) -> list[dict[str, Any]]:
        """The ``verification`` of each target.

        Args:
            reports: Of each text, in their order, or why there is none.
            weights: What the model's weights were when the targets were attributed.
        """
        return [self._result(index, reports, weights) for index in range(len(self._plans))]

    def _result(
        self, index: int, reports: Sequence[ScoreReport | FlashTraceError], weights: str | None
    ) -> dict[str, Any]:
        units = self._units[index]
        if not units:
            return {"reason": _NO_UNITS}
        tokens = len(self._target(index))

        def log_prob(removal: _Removal) -> float:
            return self._log_prob(index, removal, reports, weights)

        data: dict[str, Any] = {"target_tokens": tokens}
        whole: float | None = None
        reason = ""
        if self.texts:
            try:
                whole = log_prob(frozenset())
                data["log_prob"] = whole
            except CannotRemoveError as error:
                reason = f"the target could not be scored: {error}"

        def entry(removed: Sequence[Unit]) -> dict[str, Any]:
            if not all(unit.ranges for unit in removed):
                return {"reason": _NOT_THE_CLIENTS}
            if reason:
                return {"reason": reason}
            try:
                drop = (whole or 0.0) - log_prob(_removal(removed))
            except CannotRemoveError as error:
                return {"reason": str(error)}
            verdict = verdict_of(drop, tokens)
            if verdict != "supported" and self._plans[index].after_reasoning:
                return {"log_prob_drop": drop, "reason": _REASONING_STAYS}
            return {"log_prob_drop": drop, "verdict": verdict}

        data["removed"] = [{**unit.fields, **entry([unit])} for unit in units]
        together = entry(units)
        if "verdict" in together:
            data["verdict"] = together["verdict"]
        data["together"] = together
        return data

    def _log_prob(
        self,
        index: int,
        removal: _Removal,
        reports: Sequence[ScoreReport | FlashTraceError],
        weights: str | None,
    ) -> float:
        """Sum of the log-probabilities of a target's tokens; raises CannotRemoveError."""
        made = self._made[removal]
        if made.prompt_token_ids is None:
            raise CannotRemoveError(made.reason)
        place = self._places[removal]
        report, text = reports[place], self.texts[place]
        if isinstance(report, FlashTraceError):
            raise CannotRemoveError(f"{report.code}: {report.message}")
        if weights is not None and report.weights != weights:
            raise CannotRemoveError("weights_changed: the model's weights have changed")
        known = dict(zip(text.positions, report.log_probs.double().tolist(), strict=True))
        length = len(made.prompt_token_ids)
        return math.fsum(known[length + i] for i in self._target(index))


def _removal(units: Sequence[Unit]) -> _Removal:
    return frozenset(one for unit in units for one in unit.ranges)


class _Prompt:
    """A completion's prompt as text, from which parts of the client's texts can be taken out."""

    def __init__(self, completion: Completion, tokenizer: Any, render: Render | None) -> None:
        self._completion = completion
        self._tokenizer = tokenizer
        self._render = render
        self._sources = {(text.message, text.part): text for text in contents(completion)}
        self._special: bool | None = None
        self._whole = ""
        self._refusal: str | None = None
        try:
            self._whole = self._rendered({})
            self._prove()
        except CannotRemoveError as error:
            self._refusal = str(error)

    def without(self, removal: _Removal) -> list[int]:
        """Token ids of the prompt without characters.

        Raises:
            CannotRemoveError: It cannot be told, or would lack other text too.
        """
        if self._refusal is not None:
            raise CannotRemoveError(self._refusal)
        spans: dict[tuple[int, int | None], list[Span]] = defaultdict(list)
        for message, part, start, end in sorted(removal, key=_in_order):
            spans[message, part].append((start, end))
        changes: dict[MessageText, str] = {}
        text = self._whole
        for key, ranges in spans.items():
            source = self._sources.get(key)
            if source is None:
                raise CannotRemoveError("it lies in no text of the client")
            for cut in reversed(_joined(source.text, ranges)):  # The first ones stay in place.
                before = changes.get(source, source.text)
                changes[source] = before[: cut[0]] + before[cut[1] :]
                shorter = self._rendered(changes)
                if not _lacks_only(text, shorter, before[slice(*cut)]):
                    raise CannotRemoveError(
                        "the chat template writes more than this in another way without it"
                    )
                text = shorter
        token_ids = self._tokens(text, bool(self._special))
        if not token_ids:  # The first generated token would stand behind nothing.
            raise CannotRemoveError("nothing is left of the prompt without it")
        return token_ids

    def _rendered(self, changes: Mapping[MessageText, str]) -> str:
        completion = self._completion
        if completion.messages is None:
            if completion.prompt_text is None:
                raise CannotRemoveError("the prompt is token ids, not text")
            return next(iter(changes.values()), completion.prompt_text)
        if self._render is None:
            raise CannotRemoveError("the prompt cannot be rendered again")
        text = rendered(self._render, replaced_texts(completion.messages, changes))
        if text is None:
            without = " without it" if changes else ""
            raise CannotRemoveError(f"the chat template does not render the messages{without}")
        return text

    def _prove(self) -> None:
        """Finds how the prompt was tokenized: with or without special tokens around it."""
        chat = self._completion.messages is not None
        prompt = list(self._completion.prompt_token_ids)
        for special in (not chat, chat):
            if self._tokens(self._whole, special) == prompt:
                self._special = special
                return
        raise CannotRemoveError("the prompt's text does not give its tokens again")

    def _tokens(self, text: str, special: bool) -> list[int]:
        # Of a batch, which lets other threads run meanwhile.
        return list(self._tokenizer([text], add_special_tokens=special)["input_ids"][0])


def _in_order(one: TextRange) -> tuple[int, int, int, int]:
    return one.message, -1 if one.part is None else one.part, one.start, one.end


def _joined(text: str, spans: Sequence[Span]) -> list[Span]:
    """Ranges to cut, in order: those with blanks alone between them in one, blanks closed up.

    Of the blanks on both sides of a range, the side with fewer line breaks goes with it (of equal
    ones those behind it), so that one separator is left where there was one; at an end of the text
    both that end's blanks and the separator do.
    """
    joined: list[Span] = []
    for start, end in spans:
        if joined and not text[joined[-1][1] : start].strip():
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return [_with_blanks(text, *span) for span in joined]


def _with_blanks(text: str, start: int, end: int) -> Span:
    before = text[:start][len(text[:start].rstrip()) :]
    behind = text[end:][: len(text[end:]) - len(text[end:].lstrip())]
    if len(before) == start:
        return start, end + len(behind)
    if end + len(behind) == len(text):
        return start - len(before), end
    if not before or not behind:
        return start, end
    if before.count("\n") < behind.count("\n"):
        return start - len(before), end
    return start, end + len(behind)


def _lacks_only(before: str, after: str, removed: str) -> bool:
    """Whether a rendering is another one without one piece, which holds `removed` and blanks."""
    gone = len(before) - len(after)
    if gone < 0:
        return False
    same = _common_length(before, after)
    if before[same + gone :] != after[same:]:
        return False
    # Where the texts around it are alike, another piece of the same letters may be found.
    letters = len(_letters(before[same : same + gone]))
    return any(letters == len(_letters(form)) for form in _forms(removed))


def _forms(text: str) -> list[str]:
    """A text as templates write it: as it is, or as JSON."""
    return [text, *(json.dumps(text, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))]


def _letters(text: str) -> str:
    return "".join(text.split())


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
