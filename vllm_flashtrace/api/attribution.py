"""The object a client works with: one completion and the prompt tokens it came from.

An :class:`Attribution` is a read-only view of the ``flashtrace`` object that a server or an engine
made; nothing here computes scores, and what it derives from them are sums. Reading a response
loads neither torch nor vLLM.
"""

from __future__ import annotations

import base64
import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from vllm_flashtrace.api.response import OBJECT, TokenScore
from vllm_flashtrace.base.errors import TraceError

if TYPE_CHECKING:
    from captum.attr import LLMAttributionResult
    from inseq import FeatureAttributionOutput
    from pandas import DataFrame
    from rich.console import RenderableType
    from torch import Tensor

__all__ = ["Attribution", "MassBalance", "TokenScore"]

_FIELD = "flashtrace"
_TOKEN_SCORES = TypeAdapter(list[TokenScore])
_COMPLETE_TOLERANCE = 1e-4
# Half of a character outside the basic plane, which a token or a truncated text may end in. UTF-8
# has no form for it.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class MassBalance:
    """Where the target's whole attribution mass went; the four parts add up to 1.

    Attributes:
        input: Share on prompt tokens: the sum of all scores.
        reasoning: Share still on tokens that recursion follows, after the last hop.
        target: Share on generated tokens that recursion does not follow, the target among them.
        skipped: Share on tokens skipped on request.
    """

    input: float
    reasoning: float
    target: float
    skipped: float

    @classmethod
    def from_hops(cls, hops: Sequence[Mapping[str, Any]]) -> MassBalance:
        """Adds up the hops, each weighted by what all earlier ones left on reasoning.

        Args:
            hops: ``input_mass``, ``reasoning_mass`` and ``target_mass`` per hop, as shares of that
                hop's total; what they lack to 1 is skipped mass.

        Raises:
            ValueError: There are no hops.
        """
        if not hops:
            raise ValueError("this attribution carries no mass per hop")
        weight, to_input, to_target = 1.0, 0.0, 0.0
        for hop in hops:
            to_input += weight * hop["input_mass"]
            to_target += weight * hop["target_mass"]
            weight *= hop["reasoning_mass"]
        return cls(to_input, weight, to_target, max(0.0, 1.0 - to_input - to_target - weight))


class Attribution:
    """One completion and the prompt tokens it came from.

    Where the trace is queued, failed or skipped, ``status`` and ``error`` say so, ``top`` is empty,
    and all other readings of the result raise a :class:`TraceError`. Where the request had several
    targets, each of ``targets`` is to be read, and readings of one result raise a ``ValueError``.

    Attributes:
        text: The completion's text, None where the response did not hold it.
        prompt_tokens: Text of every prompt token, None where they were not asked for.
        image_urls: The prompt's images as data URLs, in their order, for `to_html`; None for one
            that is not known, and empty where none is. They are in no dict and no JSON.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        text: str | None = None,
        prompt_tokens: Sequence[str] | None = None,
        image_urls: Sequence[str | None] = (),
    ) -> None:
        """Wraps one ``flashtrace`` object.

        Args:
            data: The object as the server sends it. It is copied.
            text: The completion's text, if known.
            prompt_tokens: Text of every prompt token; read from ``data["tokens"]`` if None.
            image_urls: The prompt's images as data URLs.

        Raises:
            ValueError: ``data`` is no attribution object.
        """
        if not isinstance(data, Mapping) or "status" not in data:
            raise ValueError("not a flashtrace attribution object: it has no 'status'")
        self._data: dict[str, Any] = copy.deepcopy(dict(data))
        self.text: str | None = text if text is not None else self._data.get("text")
        tokens = prompt_tokens if prompt_tokens is not None else self._data.get("tokens")
        self.prompt_tokens: list[str] | None = None if tokens is None else list(tokens)
        self.image_urls: list[str | None] = list(image_urls)

    @classmethod
    def from_response(cls, response: Any) -> Attribution:
        """Finds the attribution in what an OpenAI client returned.

        Args:
            response: A choice, a final or accumulated stream message, a delta, a whole response
                with one choice or one output text, the ``flashtrace`` object itself, or any of
                these as a plain dict.

        Returns:
            The attribution. A failed, skipped or queued one is returned too; see ``status``.

        Raises:
            ValueError: There is no attribution in ``response``, or there are several.
        """
        data, text = find_attribution(response)
        return cls(data, text=text)

    @property
    def id(self) -> str | None:
        """The attribution's id."""
        return self._data.get("id")

    @property
    def status(self) -> str:
        """``completed``, ``queued``, ``running``, ``failed`` or ``skipped``."""
        return str(self._data["status"])

    @property
    def error(self) -> dict[str, Any] | None:
        """``{"code", "message"}`` of a failed or skipped trace, else None."""
        return self._data.get("error")

    @cached_property
    def scores(self) -> list[TokenScore]:
        """The scores returned, in the order they came.

        A plain prompt has no messages; its located tokens count as message 0.

        Raises:
            TraceError: The trace has no result.
        """
        rows = [
            {**row, "message": 0}
            if row.get("message") is None and row.get("start") is not None
            else row
            for row in self._result()["scores"]
        ]
        return _TOKEN_SCORES.validate_python(rows)

    @cached_property
    def targets(self) -> list[Attribution]:
        """One attribution for each part of the answer, where the request had ``targets``.

        Where it had one target this is the attribution itself, so that a loop serves both.

        Raises:
            TraceError: The trace has no result.
        """
        found = self._completed().get("targets")
        if found is None:
            return [self]
        # The prompt's tokens are handed on beside it, not copied with it for each part.
        own = ("targets", "tokens")
        shared = {key: value for key, value in self._data.items() if key not in own}
        return [
            Attribution(
                {**shared, **part},
                text=self.text,
                prompt_tokens=self.prompt_tokens,
                image_urls=self.image_urls,
            )
            for part in found
        ]

    @property
    def remaining_mass(self) -> float:
        """Mass still on reasoning after the last hop, as the tracer reported it.

        Raises:
            TraceError: The trace has no result.
        """
        return float(self._result()["remaining_mass"])

    @property
    def target(self) -> dict[str, Any]:
        """The explained span: ``{"text", "tokens"}``, tokens counted from the first generated one.

        Raises:
            TraceError: The trace has no result.
        """
        return dict(self._result()["target"])

    @property
    def hops(self) -> list[dict[str, Any]]:
        """Mass per hop, each relative to that hop's own total."""
        return list(self._result().get("hops") or [])

    @property
    def auto_stopped(self) -> str | None:
        """Why ``hops: "auto"`` ended, ``threshold`` or ``max_hops``; None for a number of hops."""
        return self._result().get("auto_stopped")

    @property
    def segments(self) -> list[dict[str, Any]]:
        """Score per message, if asked for."""
        return list(self._result().get("segments") or [])

    @property
    def sentences(self) -> list[dict[str, Any]]:
        """Score per sentence of the prompt, the highest mean first, if asked for."""
        return list(self._result().get("sentences") or [])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Score per source, in the order of the request, if it has sources."""
        return list(self._result().get("sources") or [])

    @property
    def images(self) -> list[dict[str, Any]]:
        """Score per image of the prompt, and of its parts, in the order of the messages."""
        return list(self._result().get("images") or [])

    @property
    def citations(self) -> list[dict[str, Any]]:
        """The parts of the answer that have sources, with these, if asked for."""
        return list(self._completed().get("citations") or [])

    @property
    def verification(self) -> dict[str, Any] | None:
        """What becomes of the target without the parts that score best; None if not asked for."""
        found = self._result().get("verification")
        return None if found is None else dict(found)

    @property
    def guard(self) -> dict[str, Any] | None:
        """What the guard says of the arguments of the tool calls, if asked for."""
        found: dict[str, Any] | None = self._completed().get("guard")
        return found

    @property
    def generated(self) -> list[dict[str, Any]]:
        """Scores on generated tokens, if asked for."""
        return list(self._result().get("generated") or [])

    @cached_property
    def attention(self) -> Tensor:
        """How much the target attends to every token, float16 ``[layers, heads, tokens]``.

        Of token ``j`` it is ``sum_i w_i alpha_ij`` over the target's tokens ``i``, whose weights
        ``w_i`` sum to 1. The prompt's tokens come first, the generated ones follow.

        Raises:
            TraceError: The trace has no result.
            ValueError: The request did not include 'attention', or it was deferred and the file is
                to be fetched by itself.
        """
        data = (self._completed().get("attention") or {}).get("data")
        if data is None:
            where = "GET /v1/attributions/{id}/attention gives those of a deferred attribution"
            raise ValueError(f"there are no sums of attention in this response; {where}")
        from safetensors.torch import load

        return load(base64.b64decode(data))["attention"]

    @property
    def coverage(self) -> dict[str, Any] | None:
        """Which layers the scores are of; None where all layers of the model were traced."""
        found = self._completed().get("coverage")
        return None if found is None else dict(found)

    @property
    def usage(self) -> dict[str, Any]:
        """What the trace cost."""
        return dict(self._completed().get("usage") or {})

    @cached_property
    def mass(self) -> MassBalance:
        """Where all of the mass went, over all hops.

        Raises:
            TraceError: The trace has no result.
        """
        return MassBalance.from_hops(self.hops)

    @property
    def input_mass(self) -> float:
        """Share of the mass on prompt tokens: the sum of the scores of all of them.

        Raises:
            TraceError: The trace has no result.
        """
        if self._prompt_length() == len(self.scores):
            return math.fsum(score.score for score in self.scores)
        return self.mass.input

    @property
    def is_complete(self) -> bool:
        """Whether ``scores`` carry the whole input mass (``top_k: null``, or nothing cut off).

        Raises:
            TraceError: The trace has no result.
        """
        length = self._prompt_length()
        if length is not None and length == len(self.scores):
            return True
        total = math.fsum(score.score for score in self.scores)
        return abs(total - self.mass.input) <= _COMPLETE_TOLERANCE * max(total, 1e-9)

    def top(self, k: int = 10) -> list[TokenScore]:
        """The ``k`` highest-scored tokens, highest first, ties in prompt order.

        Empty where the trace has no result, so that a loop over answers needs no check; ``status``
        and ``error`` say why, and so does every display of the attribution.

        Raises:
            ValueError: ``k`` is negative.
        """
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        if self.status != "completed":
            return []
        return sorted(self.scores, key=lambda score: (-score.score, score.index))[:k]

    def share(self, start: int, end: int, message: int = 0) -> float:
        """Part of the input mass on a character span of the prompt.

        Args:
            start: First character within the message (or the plain prompt).
            end: One past the last character. A token overlapping the span counts in full.
            message: Index of the client's message; 0 for a plain prompt.

        Returns:
            A number in ``[0, 1]``; 0 if the whole input mass is 0.

        Raises:
            TraceError: The trace has no result.
            ValueError: The span is empty or covers no token, or the scores are only the top k.
        """
        self._require_complete()
        return share_of_span(self.scores, start, end, message)

    def share_of_text(self, text: str) -> float:
        """Part of the input mass on a passage that occurs once in the client's messages.

        Raises:
            TraceError: The trace has no result.
            ValueError: The passage is empty, does not occur, occurs more than once, or the scores
                are only the top k.
        """
        self._require_complete()
        message, start = find_once(self.scores, text)
        return share_of_span(self.scores, start, start + len(text), message)

    def to_dict(self) -> dict[str, Any]:
        """The ``flashtrace`` object, with ``text`` and ``tokens`` added where known."""
        data = copy.deepcopy(self._data)
        if self.text is not None:
            data["text"] = self.text
        if self.prompt_tokens is not None:
            data["tokens"] = list(self.prompt_tokens)
        return data

    def to_json(self, path: str | Path | None = None) -> str:
        """``to_dict`` as JSON text, also written to ``path`` if one is given.

        ``Attribution.from_response(json.loads(text))`` reads it back.
        """
        document = json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n"
        document = _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", document)
        if path is not None:
            Path(path).write_text(document, "utf-8")
        return document

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page with the heat-map, also written to ``path`` if one is given."""
        from vllm_flashtrace.api.html import render_page

        page = render_page(self)
        if path is not None:
            Path(path).write_text(page, "utf-8")
        return page

    def to_dataframe(self) -> DataFrame:
        """One row for each returned score, with the keys of a score as columns.

        ``message``, ``part``, ``start`` and ``end`` are ``Int64`` and may be missing. Where there
        are several targets, the column ``target`` has the index of the row's.

        Raises:
            TraceError: The trace has no result.
            ImportError: pandas is not installed (extra ``dataframe``).
        """
        from vllm_flashtrace.api.converters import dataframe

        return dataframe(self.targets, several=self._has_several)

    def to_inseq(self) -> FeatureAttributionOutput:
        """An output of inseq with one sequence, for its ``show`` and ``save``.

        The source are the prompt's tokens and the target is one column for each target, named by
        its text, with id -1. ``source_attributions`` (float32 ``[source, targets]``) holds the
        scores, ``step_scores`` the four masses of each target.

        Raises:
            TraceError: The trace has no result.
            ValueError: The scores are only the top k.
            ImportError: inseq is not installed (extra ``inseq``).
        """
        from vllm_flashtrace.api.converters import inseq_output

        return inseq_output(self._complete_targets(), self.text)

    def to_captum(self, top_k: int | None = None) -> LLMAttributionResult:
        """A result of Captum, for its ``plot_token_attr`` and ``plot_seq_attr``.

        ``token_attr`` (float32 ``[targets, tokens]``) has one row for each target, whose text
        stands as its output token; ``seq_attr`` (``[tokens]``) is the mean of the rows.

        Args:
            top_k: Keep the tokens with the highest mean only, in the order of the prompt. Captum's
                plots are 130 pixels wide for each token, which Matplotlib draws for some 500.

        Raises:
            TraceError: The trace has no result.
            ValueError: The scores are only the top k, or ``top_k`` is less than 1.
            ImportError: Captum is not installed (extra ``captum``).
        """
        from vllm_flashtrace.api.converters import captum_result

        return captum_result(self._complete_targets(), top_k)

    def to_langfuse(self, trace_id: str, observation_id: str | None = None) -> list[dict[str, Any]]:
        """Scores for ``Langfuse.create_score(**score)``: masses, and sources and segments if any.

        Scores sent again replace the earlier ones, since their ids stay the same. ``metadata`` has
        the target's text and what tells source or message.

        Args:
            trace_id: Langfuse's id of the trace that the completion belongs to.
            observation_id: Its id of the generation there.

        Raises:
            TraceError: The trace has no result.
        """
        from vllm_flashtrace.api.converters import langfuse_scores

        return langfuse_scores(self._completed(), trace_id, observation_id)

    def to_phoenix(self, span_id: str) -> list[dict[str, Any]]:
        """Annotations for ``phoenix.client.Client().spans.log_span_annotations``, as scores are.

        Args:
            span_id: OpenTelemetry's id of the completion's span, 16 hexadecimal digits.

        Raises:
            TraceError: The trace has no result.
        """
        from vllm_flashtrace.api.converters import phoenix_annotations

        return phoenix_annotations(self._completed(), span_id)

    def to_opentelemetry(self, response_id: str | None = None) -> list[dict[str, Any]]:
        """Attributes of ``gen_ai.evaluation.result`` events, one for each score; without texts.

        A server with tracing on has these events in its own span of the attribution.

        Args:
            response_id: The completion's id, for events that are no part of its own span.

        Raises:
            TraceError: The trace has no result.
        """
        from vllm_flashtrace.api.converters import evaluation_events

        return list(evaluation_events(self._completed(), response_id))

    def _repr_html_(self) -> str:
        from vllm_flashtrace.api.html import render_fragment

        return render_fragment(self)

    def __rich__(self) -> RenderableType:
        from vllm_flashtrace.api.terminal import render_terminal

        return render_terminal(self)

    def __str__(self) -> str:
        if self.status != "completed":
            return f"Attribution({self._no_result_reason()})"
        partly = f", {self.coverage_note}" if self.coverage else ""
        if self._has_several:
            return f"Attribution({len(self.targets)} targets{partly})"
        top = ", ".join(f"{score.token!r} {score.score:.3f}" for score in self.top(3))
        target = repr(self.target["text"])
        return f"Attribution(target={target}, input {self.input_mass:.1%}{partly}: {top})"

    __repr__ = __str__

    @property
    def coverage_note(self) -> str:
        """`coverage` in a few words; empty where all layers of the model were traced.

        Of several targets the smallest ``change_share`` counts.
        """
        found = self.coverage
        if found is None:
            return ""
        shares = [part._data.get("change_share") for part in self.targets]
        known = [share for share in shares if share is not None]
        least = f", {min(known):.0%} of what mixing tokens changes" if known else ""
        return f"through {len(found['layers'])} of {found['model_layers']} layers only{least}"

    @property
    def _has_several(self) -> bool:
        return self.status == "completed" and "targets" in self._data

    def _result(self) -> dict[str, Any]:
        """The data of a completed trace of one target."""
        if self._has_several:
            raise ValueError(
                f"this attribution has {len(self.targets)} targets; read each of .targets"
            )
        return self._completed()

    def _completed(self) -> dict[str, Any]:
        """The data of a completed trace."""
        if self.status != "completed":
            code = (self.error or {}).get("code", self.status)
            raise TraceError(str(code), self._no_result_reason())
        return self._data

    def _no_result_reason(self) -> str:
        reason = f"the trace {self.id or ''} is {self.status}".replace("  ", " ")
        if self.error:
            reason += f" ({self.error.get('code')}: {self.error.get('message')})"
        return reason

    def _prompt_length(self) -> int | None:
        if self.prompt_tokens is not None:
            return len(self.prompt_tokens)
        return self._data.get("prompt_tokens")

    def _complete_targets(self) -> list[Attribution]:
        for part in self.targets:
            part._require_complete()
        return self.targets

    def _require_complete(self) -> None:
        if not self.is_complete:
            raise ValueError(
                f"only {len(self.scores)} scores were returned; ask for all of them with "
                "flashtrace={'top_k': None, 'scope': 'prompt'}"
            )


def find_attribution(response: Any) -> tuple[dict[str, Any], str | None]:
    """Finds the one attribution in a response, choice, message, delta, output item or itself.

    Args:
        response: A mapping, or an object with pydantic's ``model_dump`` (the OpenAI client's).

    Returns:
        The ``flashtrace`` object, and the completion's text where the response has it.

    Raises:
        ValueError: There is none, or there are several.
    """
    node = _as_dict(response)
    if node is None:
        raise ValueError(f"cannot look for an attribution in a {type(response).__name__}")
    if node.get("object") == OBJECT:
        return node, node.get("text")
    found = _search(node)
    if not found:
        raise ValueError(
            "no attribution in this response; was the request sent with a 'flashtrace' field "
            "to a server with the plugin on?"
        )
    if len(found) > 1:
        raise ValueError(f"{len(found)} attributions in this response; pass one choice or item")
    return found[0]


def _search(node: dict[str, Any]) -> list[tuple[dict[str, Any], str | None]]:
    """All attributions in a whole response (``choices``/``output``) or in one part of it."""
    parts = node.get("choices") or node.get("output")
    if isinstance(parts, list):
        return [hit for part in parts if isinstance(part, Mapping) for hit in _search(dict(part))]
    holders = [node, node.get("message"), node.get("delta")]
    for holder in holders:
        if isinstance(holder, Mapping) and isinstance(holder.get(_FIELD), Mapping):
            return [(dict(holder[_FIELD]), _text(node))]
    return []


def _text(node: Mapping[str, Any]) -> str | None:
    """The text a choice, message, delta or output item carries."""
    for holder in (node.get("message"), node.get("delta"), node):
        if not isinstance(holder, Mapping):
            continue
        for key in ("content", "text"):
            value = holder.get(key)
            if isinstance(value, str):
                return value
            if isinstance(value, list):
                texts = [part.get("text") for part in value if isinstance(part, Mapping)]
                return "".join(text for text in texts if isinstance(text, str))
    return None


def _as_dict(response: Any) -> dict[str, Any] | None:
    if isinstance(response, Mapping):
        return dict(response)
    if hasattr(response, "model_dump"):
        dumped = response.model_dump()
        return dumped if isinstance(dumped, dict) else None
    return None


def share_of_span(scores: Sequence[TokenScore], start: int, end: int, message: int) -> float:
    """Part of the scores' sum that lies on characters ``[start, end)`` of one message.

    A token overlapping the span counts in full.

    Raises:
        ValueError: The span is empty or no token overlaps it.
    """
    if not 0 <= start < end:
        raise ValueError(f"the span must satisfy 0 <= start < end, got [{start}, {end})")
    inside = [
        score.score
        for score in scores
        if score.message == message
        and score.start is not None
        and score.end is not None
        and score.start < end
        and score.end > start
    ]
    if not inside:
        raise ValueError(f"no prompt token covers [{start}, {end}) of message {message}")
    total = math.fsum(score.score for score in scores)
    return math.fsum(inside) / total if total else 0.0


def find_once(scores: Sequence[TokenScore], text: str) -> tuple[int, int]:
    """Finds a passage of the client's messages from the located tokens alone.

    Returns:
        Message index and first character.

    Raises:
        ValueError: The passage is empty or does not occur exactly once.
    """
    places = []
    for message, content in _spelled_messages(scores).items():
        start = content.find(text)
        while text and start >= 0:
            places.append((message, start))
            start = content.find(text, start + 1)
    if len(places) != 1:
        raise ValueError(f"{text!r} occurs {len(places)} times in the prompt, not once")
    return places[0]


def _spelled_messages(scores: Sequence[TokenScore]) -> dict[int, str]:
    """The messages as far as located tokens spell them out; gaps become NUL characters."""
    characters: dict[int, dict[int, str]] = {}
    for score in scores:
        if score.message is None or score.start is None or score.end is None:
            continue
        if len(score.token) == score.end - score.start:
            spelled = characters.setdefault(score.message, {})
            spelled.update(enumerate(score.token, score.start))
    return {
        message: "".join(spelled.get(i, "\0") for i in range(max(spelled) + 1))
        for message, spelled in characters.items()
        if spelled
    }
