"""An attribution in the forms of pandas, inseq, Captum, Langfuse, Phoenix and OpenTelemetry.

Tables and plots take the scores of tokens. The tools that watch a service take a few named numbers
for each completion, its :func:`measures`: the four masses, and the scores of sources and segments.
Only converters that build another package's objects import it, when they are called.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.api.response import TokenScore

if TYPE_CHECKING:
    from captum.attr import LLMAttributionResult
    from inseq import FeatureAttributionOutput
    from pandas import DataFrame

    from vllm_flashtrace.api.attribution import Attribution

EVALUATION_EVENT = "gen_ai.evaluation.result"

_MASSES = {
    "input_mass": "Share of the target's information flow that came from the prompt.",
    "remaining_mass": "Share that is still on the reasoning after the last hop.",
    "target_mass": "Share on generated tokens that recursion does not follow, the target included.",
    "skipped_mass": "Share on tokens that were skipped on request.",
}
_PART = "Share of the target's information flow that came from this part of the prompt."
# A role is the client's own word. Names of measures have few values and quote nobody.
_ROLES = frozenset(
    {
        "assistant",
        "developer",
        "function",
        "prompt",
        "system",
        "template",
        "tool",
        "unlocated",
        "user",
    }
)
_SOURCE = ("id", "title", "url")
_OPTIONAL_COLUMNS = ("message", "part", "start", "end", "image", "row", "column")


@dataclass(frozen=True, slots=True)
class Measure:
    """One number about one target.

    Attributes:
        name: ``flashtrace.`` and the key of a mass; ``flashtrace.source.`` and a kind, or
            ``flashtrace.segment.`` and a role.
        value: In ``[0, 1]``.
        explanation: What the number says; holds no text of a client.
        place: Index of the target where there are several, of the source and of the message.
        texts: Texts of the client: the target's, and role or names of message or source.
        key: The attribution's id and a digest of what is measured; always the same.
    """

    name: str
    value: float
    explanation: str
    place: dict[str, int]
    texts: dict[str, str]
    key: str


def measures(data: Mapping[str, Any]) -> Iterator[Measure]:
    """The measures of a completed ``flashtrace`` object.

    The masses of all targets come first, then the scores of sources and segments. A source whose
    place in the prompt is not certain has no score and no measure.
    """
    several = "targets" in data
    found = [
        (result, {"target": index} if several else {})
        for index, result in enumerate(data["targets"] if several else [data])
    ]
    for name, explanation in _MASSES.items():
        for result, place in found:
            yield _measure(data, result, name, result[name], explanation, place, {})
    for result, place in found:
        for source in result.get("sources", ()):
            if source["score"] is not None:
                at = {**place, "source": source["index"], **_picked(source, "message")}
                texts = {f"source_{key}": text for key, text in _picked(source, *_SOURCE).items()}
                name = f"source.{source['kind']}"
                yield _measure(data, result, name, source["score"], _PART, at, texts)
        for segment in result.get("segments", ()):
            at = {**place, **_picked(segment, "message")}
            role = segment["role"]
            name = f"segment.{role if role in _ROLES else 'other'}"
            texts = _picked(segment, "role", "name", "tool_call_id")
            yield _measure(data, result, name, segment["score"], _PART, at, texts)


def _picked(part: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: part[key] for key in keys if key in part}


def _measure(
    data: Mapping[str, Any],
    result: Mapping[str, Any],
    name: str,
    value: float,
    explanation: str,
    place: dict[str, int],
    texts: dict[str, str],
) -> Measure:
    # What stands in Attribution.targets knows its tokens, but not its index.
    spot = [(key, index) for key, index in place.items() if key != "target"]
    what = f"{name} {result['target']['tokens']} {spot}"
    return Measure(
        name=f"flashtrace.{name}",
        value=float(value),
        explanation=explanation,
        place=place,
        texts={"target_text": result["target"]["text"], **texts},
        key=f"{data['id']}-{_digest(what)}",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def langfuse_scores(
    data: Mapping[str, Any], trace_id: str, observation_id: str | None
) -> list[dict[str, Any]]:
    """See :meth:`Attribution.to_langfuse`."""
    of = {"trace_id": trace_id}
    if observation_id is not None:
        of["observation_id"] = observation_id
    return [
        {
            "name": measure.name,
            "value": measure.value,
            "data_type": "NUMERIC",
            "comment": measure.explanation,
            **of,
            # Offline attributions of two runs may have the same id.
            "score_id": _digest(f"{trace_id} {observation_id} {measure.key}"),
            "metadata": _metadata(data, measure),
        }
        for measure in measures(data)
    ]


def phoenix_annotations(data: Mapping[str, Any], span_id: str) -> list[dict[str, Any]]:
    """See :meth:`Attribution.to_phoenix`."""
    return [
        {
            "name": measure.name,
            "annotator_kind": "CODE",
            "span_id": span_id,
            "identifier": measure.key,
            "result": {"score": measure.value, "explanation": measure.explanation},
            "metadata": _metadata(data, measure),
        }
        for measure in measures(data)
    ]


def _metadata(data: Mapping[str, Any], measure: Measure) -> dict[str, Any]:
    return {"attribution_id": data["id"], **measure.place, **measure.texts}


def evaluation_events(
    data: Mapping[str, Any], response_id: str | None
) -> Iterator[dict[str, str | int | float]]:
    """Attributes of one ``gen_ai.evaluation.result`` event for each measure; no text of a client.

    Args:
        data: The ``flashtrace`` object of a completed attribution.
        response_id: Id of the completion, where there was one.
    """
    common = {"flashtrace.id": data["id"]}
    if response_id is not None:
        common["gen_ai.response.id"] = response_id
    for measure in measures(data):
        yield {
            "gen_ai.evaluation.name": measure.name,
            "gen_ai.evaluation.score.value": measure.value,
            "gen_ai.evaluation.explanation": measure.explanation,
            **common,
            **{f"flashtrace.{key}": index for key, index in measure.place.items()},
        }


def dataframe(targets: Sequence[Attribution], *, several: bool) -> DataFrame:
    """See :meth:`Attribution.to_dataframe`."""
    pandas = _package("pandas", "dataframe")
    rows = [(index, score) for index, part in enumerate(targets) for score in part.scores]
    columns: dict[str, list[Any]] = {"target": [index for index, _ in rows]} if several else {}
    for name in TokenScore.model_fields:
        columns[name] = [getattr(score, name) for _, score in rows]
    frame: DataFrame = pandas.DataFrame(columns)
    return frame.astype(dict.fromkeys(_OPTIONAL_COLUMNS, "Int64"))


def inseq_output(targets: Sequence[Attribution], text: str | None) -> FeatureAttributionOutput:
    """See :meth:`Attribution.to_inseq`."""
    _package("inseq", "inseq")
    import torch
    from inseq import FeatureAttributionOutput
    from inseq.data.attribution import CoarseFeatureAttributionSequenceOutput
    from inseq.utils.typing import TokenWithId

    tokens, scores = _matrix(targets)
    masses = [part.mass for part in targets]
    balances = [(mass.input, mass.reasoning, mass.target, mass.skipped) for mass in masses]
    sequence = CoarseFeatureAttributionSequenceOutput(
        source=[TokenWithId(token.token, token.token_id) for token in tokens],
        target=[TokenWithId(part.target["text"], -1) for part in targets],
        source_attributions=torch.tensor(scores).T,
        step_scores=dict(zip(_MASSES, torch.tensor(balances).T, strict=True)),
    )
    texts = {
        "input_texts": ["".join(token.token for token in tokens)],
        "generated_texts": [text if text is not None else ""],
    }
    return FeatureAttributionOutput([sequence], info={"attribution_method": "flashtrace", **texts})


def captum_result(targets: Sequence[Attribution], top_k: int | None) -> LLMAttributionResult:
    """See :meth:`Attribution.to_captum`."""
    _package("captum", "captum")
    import torch
    from captum.attr import LLMAttributionResult

    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    tokens, rows = _matrix(targets)
    scores = torch.tensor(rows)
    means = scores.mean(dim=0)
    best = means.argsort(descending=True, stable=True)[:top_k].sort().values
    return LLMAttributionResult(
        input_tokens=[tokens[i].token for i in best.tolist()],
        output_tokens=[part.target["text"] for part in targets],
        seq_attr=means[best],
        token_attr=scores[:, best],
    )


def _matrix(targets: Sequence[Attribution]) -> tuple[list[TokenScore], list[list[float]]]:
    """The prompt's tokens in order, and for each target its score on each of them.

    Each target's scores carry its whole input mass: a token that one of them lacks has none of it.
    """
    found = {score.index: score for part in targets for score in part.scores}
    tokens = [found[index] for index in sorted(found)]
    scores = []
    for part in targets:
        own = {score.index: score.score for score in part.scores}
        scores.append([own.get(token.index, 0.0) for token in tokens])
    return tokens, scores


def _package(name: str, extra: str) -> Any:
    """Imports an optional package.

    Raises:
        ImportError: It is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        message = f"this needs the package {name}: pip install 'vllm-flashtrace[{extra}]'"
        raise ImportError(message, name=name) from error
