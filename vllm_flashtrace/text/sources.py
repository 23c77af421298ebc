"""Sources: the documents, tool results and marked texts that an answer may have been taken from.

A source is a range of a message's content, or a document that the chat template writes into the
prompt. Which ranges are meant is known before anything is generated; which tokens they have, once
the prompt is there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from vllm_flashtrace.api.checks import shown
from vllm_flashtrace.api.patterns import all_matches
from vllm_flashtrace.api.request import (
    FlashTraceRequest,
    MarkedSource,
    RequestLimits,
    SeparatedSources,
)
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion, Document, Span
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.prompt_map import PromptMap
from vllm_flashtrace.text.prompt_texts import (
    LocatedText,
    MessageText,
    Render,
    escapes,
    forced_positions,
    rendered,
)
from vllm_flashtrace.text.sentences import Key, contents, scored_sentences

_FIELD = "flashtrace.sources"
_REGEX_SECONDS = 0.25
TOOL_ROLES = ("tool", "function")
"""Roles of messages that hold what a tool returned."""
# Where a document of a chat request has its text, by the custom of chat templates.
_TEXT_KEYS = ("text", "contents", "content", "snippet", "data")


def chat_documents(documents: Sequence[Mapping[str, str]] | None) -> list[Document]:
    """The documents of a chat request, which its template writes into the prompt.

    Args:
        documents: As the request has them: the text under ``text``, ``contents``, ``content``,
            ``snippet`` or ``data``, and a ``title``, ``url`` and ``id`` (or ``doc_id``) if any.
    """
    found: list[Document] = []
    known: set[str] = set()
    for index, document in enumerate(documents or ()):
        texts = [document[key] for key in _TEXT_KEYS if document.get(key, "").strip()]
        if not texts:
            continue
        name = document.get("id") or document.get("doc_id") or f"document-{index}"
        name = name if name not in known else f"document-{index}"
        known.add(name)
        title, url = document.get("title"), document.get("url")
        found.append(Document(name, texts[0], "document", title or None, url or None))
    return found


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a request.

    Attributes:
        id: Its name, unlike those of the request's other sources.
        text: Its text.
        kind: What it is.
        title: Its title, if it has one.
        url: Its URL, if it has one.
        key: Message and content part that it stands in; None where the template writes it.
        span: Its characters in there.
        blocks: Where in its text each of its blocks begins.
    """

    id: str
    text: str
    kind: Literal["marked", "document", "search_result", "tool"]
    title: str | None = None
    url: str | None = None
    key: Key | None = None
    span: Span = (0, 0)
    blocks: tuple[int, ...] = (0,)

    def to_dict(self) -> dict[str, Any]:
        """The fields that name it in a response."""
        named: dict[str, Any] = {
            "id": self.id,
            "kind": self.kind,
            "title": self.title,
            "url": self.url,
        }
        if self.key is not None:
            message, part = self.key
            named |= {"message": message, "part": part, "start": self.span[0], "end": self.span[1]}
        return {name: value for name, value in named.items() if value is not None}


def find_sources(request: FlashTraceRequest, completion: Completion) -> list[Source]:
    """The sources of a request, in the order that it gives them.

    Args:
        request: The client's options.
        completion: The completion, or what is known of it before it is generated: its prompt text
            or messages and its documents.

    Raises:
        InvalidRequestError: ``source_not_found``, ``sources_overlap``, ``regex_timeout``, or there
            are too many.
    """
    if request.sources is None:
        return []
    texts = {(text.message, text.part): text.text for text in contents(completion)}
    if request.sources == "auto":
        found = list(_documents(completion, texts))
        found += _tool_results(completion, texts, {source.key for source in found})
    elif isinstance(request.sources, SeparatedSources):
        found = _separated(request.sources, texts, _last_of_user(completion))
    else:
        found = _marked(request.sources, texts)
    most = RequestLimits().max_sources
    if len(found) > most:
        raise InvalidRequestError(
            _FIELD, f"{_FIELD}: the request has {len(found)} sources; at most {most} are scored"
        )
    _refuse_overlap(found)
    return found


def _documents(completion: Completion, texts: dict[Key, str]) -> Iterator[Source]:
    given = [document for document in completion.documents if not document.by_template]
    places = _places(texts, [document.text for document in given])
    for document in completion.documents:
        place = None if document.by_template else next(places)
        if place is None and not document.by_template:
            raise _not_found(f"{_FIELD}: the text of document {shown(document.id)}", document.text)
        kind: Any = document.kind
        named = Source(
            document.id,
            document.text,
            kind,
            document.title,
            document.url,
            blocks=document.blocks,
        )
        if place is not None:
            key, start = place
            named = replace(named, key=key, span=(start, start + len(document.text)))
        yield named


def _tool_results(
    completion: Completion, texts: dict[Key, str], with_documents: Collection[Key | None]
) -> Iterator[Source]:
    """What tools returned, except for results that documents are in."""
    messages = completion.messages or ()
    taken = {document.id for document in completion.documents}
    parts = Counter(message for message, _ in texts)
    for key, text in texts.items():
        message = messages[key[0]] if messages else {}
        if message.get("role") not in TOOL_ROLES or key in with_documents:
            continue
        given = message.get("tool_call_id")
        name = given if isinstance(given, str) and given else f"message-{key[0]}"
        if parts[key[0]] > 1:
            name = f"{name}#{key[1]}"
        while name in taken:
            name += "'"
        taken.add(name)
        title = message.get("name")
        title = title if isinstance(title, str) else None
        yield Source(name, text, "tool", title, None, key, (0, len(text)))


def _marked(marks: Sequence[MarkedSource], texts: dict[Key, str]) -> list[Source]:
    # Equal texts take their places in the order of the marks.
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, mark in enumerate(marks):
        if mark.text is not None:
            alike[mark.text, mark.message, mark.part].append(index)
    places: dict[int, tuple[Key, Span]] = {}
    for (text, message, part), indices in alike.items():
        own = _named(texts, message, part, f"{_FIELD}[{indices[0]}]")
        found = list(_occurrences(own, text))
        name = f"{_FIELD}[{indices[0]}].text"
        if not found:
            raise _not_found(name, text, own)
        if len(found) != len(indices):
            raise InvalidRequestError(
                name,
                f"{name} {shown(text)} occurs {len(found)} times, and {len(indices)} of the "
                "sources have it; give each its message and span",
                code="source_not_found",
            )
        for index, (key, start) in zip(indices, found, strict=True):
            places[index] = key, (start, start + len(text))
    for index, mark in enumerate(marks):
        if index not in places:
            places[index] = _place(mark, texts, f"{_FIELD}[{index}]")
    return [
        Source(mark.id, texts[key][slice(*span)], "marked", mark.title, mark.url, key, span)
        for index, mark in enumerate(marks)
        for key, span in [places[index]]
    ]


def _place(mark: MarkedSource, texts: dict[Key, str], name: str) -> tuple[Key, Span]:
    """The place of a source that is not given by its text."""
    own = _named(texts, mark.message, mark.part, name)
    if len(own) > 1:
        raise InvalidRequestError(
            f"{name}.part",
            f"{name}: the content of message {mark.message} has {len(own)} parts; give its part",
            code="source_not_found",
        )
    [(key, text)] = own.items()
    span = mark.span or (0, len(text))
    if span[1] > len(text):
        raise InvalidRequestError(
            f"{name}.span",
            f"{name}.span goes beyond the {len(text)} characters of the content, got {list(span)}",
            code="source_not_found",
        )
    return key, span


def _named(
    texts: dict[Key, str], message: int | None, part: int | None, name: str
) -> dict[Key, str]:
    """The texts that a source may stand in."""
    own = {
        key: text
        for key, text in texts.items()
        if message in (None, key[0]) and (part is None or part == key[1])
    }
    if not own and texts:
        param = f"{name}.{'message' if part is None else 'part'}"
        where = f"message {message}" if part is None else f"message {message}, part {part}"
        raise InvalidRequestError(
            param, f"{param}: there is no text in {where}", code="source_not_found"
        )
    if not own:
        raise InvalidRequestError(
            name, f"{name}: the prompt was not given as text", code="source_not_found"
        )
    return own


def _separated(
    wanted: SeparatedSources, texts: dict[Key, str], last_of_user: int | None
) -> list[Source]:
    message = last_of_user if wanted.message is None else wanted.message
    own = _named(texts, message, wanted.part, _FIELD)
    pieces = [(key, piece) for key, text in own.items() for piece in _pieces(wanted, text)]
    known: set[str] = set()
    found = []
    for number, (key, (name, title, span)) in enumerate(pieces, start=1):
        name = str(number) if name is None else name
        if name in known:
            raise InvalidRequestError(
                f"{_FIELD}.separator",
                f"{_FIELD}.separator finds the id {shown(name)} twice",
                code="sources_overlap",
            )
        known.add(name)
        found.append(Source(name, own[key][slice(*span)], "marked", title, None, key, span))
    if not found:
        raise InvalidRequestError(
            f"{_FIELD}.separator",
            f"{_FIELD}.separator {shown(wanted.separator)} matches nothing in message {message}",
            code="source_not_found",
        )
    return found


def _pieces(wanted: SeparatedSources, text: str) -> Iterator[tuple[str | None, str | None, Span]]:
    """Id, title and characters, blanks aside, of what stands between the matches."""
    try:
        matches = list(all_matches(wanted.separator, text, seconds=_REGEX_SECONDS))
    except TimeoutError:
        raise InvalidRequestError(
            f"{_FIELD}.separator",
            f"{_FIELD}.separator {shown(wanted.separator)} took longer than {_REGEX_SECONDS} s",
            code="regex_timeout",
        ) from None
    if not matches:
        return
    headed = "id" in matches[0].re.groupindex
    edges = [*matches, None] if headed else [None, *matches, None]
    for before, after in pairwise(edges):
        start = 0 if before is None else before.end()
        end = len(text) if after is None else after.start()
        inner = text[start:end].strip()
        if not inner:
            continue
        start += len(text[start:end]) - len(text[start:end].lstrip())
        names = before.groupdict() if headed and before is not None else {}
        yield names.get("id"), names.get("title"), (start, start + len(inner))


def _last_of_user(completion: Completion) -> int | None:
    if completion.messages is None:
        return 0
    of_user = [i for i, each in enumerate(completion.messages) if each.get("role") == "user"]
    return of_user[-1] if of_user else None


def _occurrences(texts: dict[Key, str], wanted: str) -> Iterator[tuple[Key, int]]:
    for key, text in texts.items():
        at = text.find(wanted)
        while at >= 0:
            yield key, at
            at = text.find(wanted, at + len(wanted))


def _places(texts: dict[Key, str], wanted: Sequence[str]) -> Iterator[tuple[Key, int] | None]:
    """Where texts stand; those that stand there several times in the order that they come in."""
    counts = Counter(wanted)
    found = {text: list(_occurrences(texts, text)) for text in counts}
    numbers: Counter[str] = Counter()
    for text in wanted:
        certain = len(found[text]) == counts[text]
        yield found[text][numbers[text]] if certain else None
        numbers[text] += 1


def _not_found(name: str, text: str, texts: dict[Key, str] | None = None) -> InvalidRequestError:
    message = f"{name} {shown(text)} does not occur"
    near = None if texts is None else _nearest(texts, text)
    if near is not None:
        key, start, common = near
        there = texts[key][start : start + common + 20] if texts is not None else ""
        message += (
            f" in the request; the nearest text is {shown(there)} at character {start} of message "
            f"{key[0]}, the same for {common} characters"
        )
    param = name.partition(" ")[0].rstrip(":")
    return InvalidRequestError(param, message, code="source_not_found")


def _nearest(texts: dict[Key, str], wanted: str) -> tuple[Key, int, int] | None:
    """Where the longest beginning of a text stands, and how long it is; None below 8 characters."""
    best: tuple[Key, int, int] | None = None
    for key, text in texts.items():
        low, high = 0, len(wanted)
        while low < high:  # Whatever occurs, its beginnings occur.
            middle = (low + high + 1) // 2
            low, high = (middle, high) if wanted[:middle] in text else (low, middle - 1)
        if low >= 8 and (best is None or low > best[2]):
            best = key, text.find(wanted[:low]), low
    return best


def _refuse_overlap(sources: Sequence[Source]) -> None:
    placed = sorted(
        (source.key[0], source.key[1] or 0, source.span, source.id)
        for source in sources
        if source.key is not None
    )
    for (*one, (_, end), first), (*other, (start, _), second) in pairwise(placed):
        if one == other and start < end:
            raise InvalidRequestError(
                _FIELD,
                f"{_FIELD}: {shown(first)} and {shown(second)} overlap in message {one[0]}",
                code="sources_overlap",
            )


def check_written(
    sources: Iterable[Source], messages: Sequence[Mapping[str, Any]] | None, render: Render | None
) -> None:
    """Refuses documents that the chat template does not write into the prompt.

    Args:
        sources: The sources of a request.
        messages: Its messages.
        render: Renders messages as its prompt is; without a rendering nothing is refused.

    Raises:
        InvalidRequestError: ``source_not_found``.
    """
    documents = [source for source in sources if source.key is None]
    prompt = rendered(render, messages) if documents and messages and render else None
    for source in documents:
        if prompt is not None and _written(source.text, prompt) is None:
            raise InvalidRequestError(
                "documents",
                f"documents: the chat template does not write the text of {shown(source.id)} into "
                "the prompt, so the model does not read it; put it into a message",
                code="source_not_found",
            )


def _written(text: str, prompt: str) -> str | None:
    """The form in which a prompt holds the text of a document."""
    quoted = (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    forms = (text, text.strip(), *quoted)
    return next((form for form in forms if form.strip() and form in prompt), None)


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A source and its prompt tokens.

    Attributes:
        source: The source.
        tokens: Position of each token, with its first character and end in the source's text;
            None where its place in the prompt is not certain.
    """

    source: Source
    tokens: list[tuple[int, int, int]] | None

    def scored(self, index: int, scores: Sequence[float]) -> dict[str, Any]:
        """The entry of a response.

        Args:
            index: Number of the source.
            scores: Score of each prompt token.
        """
        named = {"index": index, **self.source.to_dict()}
        if not self.tokens:
            return {**named, "tokens": 0, "score": None, "mean": None, "sentences": []}
        located = [(start, end, scores[token]) for token, start, end in self.tokens]
        score = sum(each for _, _, each in located)
        return {
            **named,
            "tokens": len(located),
            "score": score,
            "mean": score / len(located),
            "sentences": scored_sentences(self.source.text, located, self.source.span[0]),
        }


def locate_sources(
    sources: Sequence[Source], prompt_map: PromptMap, prompt: TokenText
) -> list[PromptSource]:
    """Finds the prompt tokens of the sources.

    A token at the edge of two belongs to the one that its first character other than a blank lies
    in.

    Args:
        sources: Sources that do not overlap.
        prompt_map: The client's messages laid over the prompt.
        prompt: The decoded prompt.
    """
    found: dict[int, list[tuple[int, int, int]]] = {}
    by_key: dict[Key, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        if source.key is not None and source.key[0] not in prompt_map.unlocated:
            by_key[source.key].append(number)
            found[number] = []
    for own in by_key.values():
        own.sort(key=lambda number: sources[number].span)
    starts = {key: [sources[i].span[0] for i in own] for key, own in by_key.items()}
    for token, located in enumerate(prompt_map.tokens):
        if located is None or located.start is None or located.end is None:
            continue
        key = located.message, located.part
        if key not in by_key:
            continue
        text = prompt.token(token)
        blanks = len(text) - len(text.lstrip())
        anchor = min(located.start + blanks, max(located.end - 1, located.start))
        at = bisect_right(starts[key], anchor) - 1
        if at < 0 or anchor >= sources[by_key[key][at]].span[1]:
            continue
        number = by_key[key][at]
        first, last = sources[number].span
        inside = max(located.start, first) - first, min(located.end, last) - first
        found[number].append((token, *inside))
    _add_documents(found, sources, prompt)
    return [PromptSource(source, found.get(number)) for number, source in enumerate(sources)]


def _add_documents(
    found: dict[int, list[tuple[int, int, int]]], sources: Sequence[Source], prompt: TokenText
) -> None:
    written = {
        number: form
        for number, source in enumerate(sources)
        if source.key is None and (form := _written(source.text, prompt.text)) is not None
    }
    places = forced_positions(prompt.text, list(written.values()))
    for (number, form), at in zip(written.items(), places, strict=True):
        if at is None:
            continue
        text = sources[number].text
        origins = escapes(MessageText(0, None, text), form)
        offset = 0 if origins else text.find(form)
        place = LocatedText(MessageText(0, None, text), at, at + len(form), offset, origins)
        found[number] = [
            (token, *place.original(*span)) for token, span in prompt.covering(at, at + len(form))
        ]
