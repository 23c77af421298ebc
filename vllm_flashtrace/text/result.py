"""From measured scores to the ``flashtrace`` object of a response.

The object is plain JSON made of dicts, and :mod:`vllm_flashtrace.api.response` describes its keys.
It is not made of the models there: an answer to ``top_k: null`` may hold 131,072 scores, and a
pydantic instance for each costs ten times what its dict does, on the server, and has to be turned
into a dict again. The tests hold every object that they build against the models.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from vllm_flashtrace.api.response import OBJECT
from vllm_flashtrace.base.errors import FlashTraceError, TraceError
from vllm_flashtrace.base.records import TraceUsage
from vllm_flashtrace.core.hops import HopMass, HopResult
from vllm_flashtrace.text.citations import cited, cited_source
from vllm_flashtrace.text.guard import guarded_argument, traced_in_part
from vllm_flashtrace.text.plan import TracePlan
from vllm_flashtrace.text.prompt_images import image_part, scored_image
from vllm_flashtrace.text.prompt_map import PromptMap
from vllm_flashtrace.text.sentences import sentences
from vllm_flashtrace.text.sources import PromptSource

_NAMES = ("name", "tool_call_id")


def segments(
    prompt_map: PromptMap, messages: Sequence[Mapping[str, Any]] | None, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """One entry per message with its role, names and score, and one for the rest.

    An assistant message with tool calls also has ``tool_calls``: which part of its score belongs to
    each of them, and null for a call that the template leaves out: what the model did not read has
    no influence that could be measured. The rest is the template, unless there are messages that
    could not be located: then the rest names them.

    Args:
        prompt_map: The client's messages laid over the prompt.
        messages: The client's messages, None for a plain prompt.
        scores: Score of each prompt token.
    """
    of_message: dict[int, list[float]] = defaultdict(list)
    of_call: dict[tuple[int, int], list[float]] = defaultdict(list)
    rest: list[float] = []
    for located, score in zip(prompt_map.tokens, scores, strict=True):
        if located is None or located.message in prompt_map.unlocated:
            rest.append(score)
            continue
        of_message[located.message].append(score)
        if located.tool_call is not None:
            of_call[located.message, located.tool_call].append(score)
    entries: list[dict[str, Any]] = []
    for i, role in enumerate(prompt_map.roles):
        if i in prompt_map.unlocated:
            continue
        message = messages[i] if messages is not None else {}
        names = {key: message[key] for key in _NAMES if isinstance(message.get(key), str)}
        entries.append({"message": i, "role": role, **names, "score": math.fsum(of_message[i])})
        calls = message.get("tool_calls")
        if calls and isinstance(calls, Sequence):
            entries[-1]["tool_calls"] = [
                {
                    "tool_call": n,
                    **_call_names(call),
                    "score": math.fsum(of_call[i, n]) if (i, n) in of_call else None,
                }
                for n, call in enumerate(calls)
            ]
    last: dict[str, Any] = {"role": "template", "score": math.fsum(rest)}
    if prompt_map.unlocated:
        last |= {"role": "unlocated", "unlocated_messages": sorted(prompt_map.unlocated)}
    elif not prompt_map.roles:
        last["role"] = "prompt"
    return [*entries, last]


def _call_names(call: Any) -> dict[str, str]:
    """Id and function name of a tool call, as far as the client gave them."""
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    names = {"id": call.get("id"), "name": name}
    return {key: value for key, value in names.items() if isinstance(value, str)}


# Refusals that say nothing about the trace: the same request may succeed later.
_SKIPPED = frozenset({"overloaded"})
_TOLERANCE = 1e-4


def build_result(
    plans: Sequence[TracePlan],
    usage: TraceUsage,
    trace_id: str,
    *,
    verifications: Sequence[Mapping[str, Any]] = (),
    cache_details: bool = True,
    as_tensors: bool = False,
) -> dict[str, Any]:
    """Puts the outcome of all hops into the public form.

    Args:
        plans: The plans that were run, one for each target.
        usage: What they cost.
        trace_id: Id of the attribution.
        verifications: What `Verification.results` gives; empty where nothing was verified.
        cache_details: Says how many tokens were in the prefix cache, and how many were not.
        as_tensors: Leaves ``layers`` (float32 ``[L, prompt_length]``) and the ``scores`` of hops
            (float64 ``[prompt_length]``) tensors, which take a tenth of the memory of lists, and
            the file of ``attention`` bytes.

    Raises:
        TraceError: ``mass_imbalance`` when masses do not add up to 1, ``bad_scores`` when a number
            is not finite or negative, ``no_layer_scores`` when layers were asked for but not
            measured, ``result_missing`` when sums of attention were.
    """
    first = plans[0]
    tokens = first.prompt.pieces()
    data: dict[str, Any] = {"id": trace_id, "object": OBJECT, "status": "completed"}
    results = [_target_result(plan, tokens, as_tensors) for plan in plans]
    for plan, result in zip(plans, results, strict=True):
        if (share := usage.change_shares.get(id(plan))) is not None:
            result["change_share"] = share
    for result, verification in zip(results, verifications, strict=False):
        result["verification"] = verification
        _add_verdicts(result.get("citations") or (), verification)
    if first.request.targets is None:
        data |= results[0]
    else:
        if first.request.citations is not None:
            found = [each for result in results for each in result.pop("citations")]
            data["citations"] = sorted(found, key=lambda each: (each["start"], each["end"]))
        if first.request.guard is not None:
            judged = [each for result in results if (each := result.pop("guard"))]
            if usage.coverage is not None:
                judged = [traced_in_part(each) for each in judged]
            flagged = any(each["flagged"] for each in judged)
            data["guard"] = {"flagged": flagged, "arguments": judged}
        data["targets"] = results
        data["prompt_tokens"] = first.prompt_length
    if first.request.heads:
        data["heads"] = True
    if "attention" in first.request.include:
        data["attention"] = _attention(first, usage.attention, as_tensors)
    if "tokens" in first.request.include:
        data["tokens"] = tokens
    if usage.coverage is not None:
        data["coverage"] = usage.coverage.to_dict()
    data["usage"] = _usage(usage, cache_details)
    if dropped := max(plan.dropped_target_tokens for plan in plans):
        data["usage"]["dropped_target_tokens"] = dropped
    return data


def _target_result(plan: TracePlan, tokens: Sequence[str], as_tensors: bool) -> dict[str, Any]:
    """What is said of one target."""
    result = plan.recursion.result()
    _check_balance(result)
    scores = _numbers(result.scores[: plan.prompt_length])
    listed = _listed(plan)
    parts = {
        token: image_part(image, number)
        for image in plan.completion.images
        for number, token in enumerate(image.tokens)
    }
    data: dict[str, Any] = {
        "target": _target(plan),
        "scores": [
            _score(plan, i, tokens[i], scores[i], parts.get(i))
            for i in _chosen(scores, plan.request.top_k, listed)
        ],
        **({"prompt_tokens": plan.prompt_length} if plan.request.targets is None else {}),
        "input_mass": result.input_mass,
        "remaining_mass": result.remaining_mass,
        "target_mass": result.target_mass,
        "skipped_mass": result.skipped_mass,
        "hops": [_hop(mass) for mass in result.hops],
    }
    if plan.request.scope == "content":
        listed_mass = math.fsum(scores[i] for i in listed)
        data["unlisted_mass"] = max(0.0, result.input_mass - listed_mass)
    if plan.request.hops == "auto":
        data["auto_stopped"] = _auto_stopped(plan, result)
    numbers: Callable[[Tensor], Any] = _checked if as_tensors else _numbers
    if plan.sources is not None:
        entries = [source.scored(i, scores) for i, source in enumerate(plan.sources)]
        if plan.request.citations is not None:
            data["citations"] = _citations(plan, plan.sources, entries, scores)
        data["sources"] = _with_best_sentences(entries, plan.request.top_k)
    if plan.completion.images:
        places = plan.prompt_map.images
        data["images"] = [
            scored_image(image, None if places is None else places[image.index], scores)
            for image in plan.completion.images
        ]
    if plan.request.guard is not None:
        data["guard"] = _guarded(plan, scores)
    data |= _inclusions(plan, result, scores, numbers)
    if "hops" in plan.request.include:
        for hop, hop_scores in zip(data["hops"], result.per_hop_scores, strict=True):
            hop["scores"] = numbers((hop_scores * plan.input_mask)[: plan.prompt_length])
    return data


def _guarded(plan: TracePlan, scores: Sequence[float]) -> dict[str, Any] | None:
    """What the guard says of the target; None if it is no argument of a tool call."""
    part, options = plan.part, plan.request.guard
    if options is None or part is None or part.tool_call is None or part.argument is None:
        return None
    return guarded_argument(
        part.tool_call,
        part.argument,
        options.ratio,
        plan.prompt_map,
        plan.completion.messages or (),
        plan.sources,
        scores,
    )


def _citations(
    plan: TracePlan,
    sources: Sequence[PromptSource],
    entries: Sequence[dict[str, Any]],
    scores: Sequence[float],
) -> list[dict[str, Any]]:
    """The target with its sources; nothing where it is in no one place or has none."""
    numbers = cited(sources, scores) if plan.in_answer is not None else []
    if plan.in_answer is None or not numbers:
        return []
    start, end = plan.in_answer
    named = [cited_source(sources, i, entries[i]) for i in numbers]
    return [{"start": start, "end": end, "text": plan.target_text, "sources": named}]


def _with_best_sentences(sources: list[dict[str, Any]], top_k: int | None) -> list[dict[str, Any]]:
    """The sources with those of their sentences that are among the best of all sources."""
    found = [(i, each) for i, source in enumerate(sources) for each in source["sentences"]]
    kept: list[list[dict[str, Any]]] = [[] for _ in sources]
    for at in _chosen([each["mean"] for _, each in found], top_k):
        kept[found[at][0]].append(found[at][1])
    return [{**source, "sentences": own} for source, own in zip(sources, kept, strict=True)]


def _add_verdicts(citations: Sequence[dict[str, Any]], verification: Mapping[str, Any]) -> None:
    """Tells of each cited source what taking it out has done."""
    removed = {each.get("index"): each for each in verification.get("removed", ())}
    for source in [source for each in citations for source in each["sources"]]:
        found = removed.get(source["index"], {})
        for name in ("log_prob_drop", "verdict"):
            if name in found:
                source[name] = found[name]


def _target(plan: TracePlan) -> dict[str, Any]:
    """What was explained."""
    data: dict[str, Any] = {
        "text": plan.target_text,
        "tokens": [list(span) for span in plan.target_spans],
    }
    if plan.in_answer is not None:
        data |= {"start": plan.in_answer[0], "end": plan.in_answer[1]}
    part = plan.part
    if part is not None:
        names = {"path": part.path, "tool_call": part.tool_call, "argument": part.argument}
        data |= {key: value for key, value in names.items() if value is not None}
    return data


def _usage(usage: TraceUsage, cache_details: bool) -> dict[str, Any]:
    counts = {
        "recomputed_tokens": int(usage.recomputed_tokens),
        "cached_tokens": int(usage.cached_tokens),
    }
    requests = {}
    if usage.scored_requests:
        requests["scored_requests"] = usage.scored_requests
        counts["scored_tokens"] = int(usage.scored_tokens)
        counts["scored_cached_tokens"] = int(usage.scored_cached_tokens)
    seconds = {phase: float(value) for phase, value in usage.seconds.items()}
    return {**(counts if cache_details else {}), **requests, "seconds": seconds}


def failed_result(
    trace_id: str, error: FlashTraceError, status: Literal["failed", "skipped"] | None = None
) -> dict[str, Any]:
    """The object of an attribution that has no result; by default its code decides the status."""
    if status is None:
        status = "skipped" if error.code in _SKIPPED else "failed"
    return {"id": trace_id, "object": OBJECT, "status": status, "error": error.to_dict()}


def _check_balance(result: HopResult) -> None:
    parts = (result.input_mass, result.remaining_mass, result.target_mass, result.skipped_mass)
    total = math.fsum(parts)
    if not abs(total - 1) <= _TOLERANCE:
        raise TraceError(
            "mass_imbalance", f"the masses of the attribution add up to {total}, not 1"
        )
    scored = float(result.scores.sum())
    if not abs(scored - result.input_mass) <= _TOLERANCE:
        raise TraceError(
            "mass_imbalance",
            f"the scores add up to {scored}, but the input mass is {result.input_mass}",
        )


def _checked(scores: Tensor) -> Tensor:
    if not scores.isfinite().all() or (scores < 0).any():
        raise TraceError("bad_scores", "a score is negative or not finite")
    return scores


def _numbers(scores: Tensor) -> Any:
    """The numbers of a tensor as a list, or as a list of lists."""
    return _checked(scores).tolist()


def _listed(plan: TracePlan) -> Sequence[int]:
    """Indices of the prompt tokens within the request's scope, in order; images' are within any.

    Where a message could not be located, a token of no message may be its content, and stays.
    """
    everything = range(plan.prompt_length)
    if plan.request.scope == "prompt":
        return everything
    located = plan.prompt_map
    keeps_rest = bool(located.unlocated) or not located.roles
    of_images = {token for image in plan.completion.images for token in image.tokens}
    return [
        i
        for i in everything
        if i in of_images
        or (plan.prompt.token(i).strip() and (located.tokens[i] is not None or keeps_rest))
    ]


def _chosen(
    scores: Sequence[float], top_k: int | None, listed: Sequence[int] | None = None
) -> list[int]:
    """Indices to return: all in order, or the highest above 0 first, ties in prompt order.

    Args:
        scores: What to choose from.
        top_k: The most to return; None for all.
        listed: Indices that may be returned, in order; None for all.
    """
    indices = range(len(scores)) if listed is None else listed
    if top_k is None:
        return list(indices)
    positive = [i for i in indices if scores[i] > 0]
    return sorted(positive, key=lambda i: (-scores[i], i))[:top_k]


def _score(
    plan: TracePlan, index: int, token: str, score: float, image: Mapping[str, int] | None
) -> dict[str, Any]:
    located = plan.prompt_map.tokens[index]
    place = located.to_dict() if located is not None else {}
    if image is not None and located is not None and located.part is not None:
        place = {"message": located.message, "part": located.part}
    return {
        "index": index,
        "token": token,
        "token_id": int(plan.token_ids[index]),
        "score": score,
        **place,
        **(image or {}),
    }


def _auto_stopped(plan: TracePlan, result: HopResult) -> Literal["threshold", "max_hops"]:
    """Why the recursion ended although no number of hops was asked for."""
    # Nothing is left to follow where the remaining mass is 0, whatever the threshold.
    done = result.remaining_mass < plan.auto_threshold or result.remaining_mass == 0
    return "threshold" if done else "max_hops"


def _hop(mass: HopMass) -> dict[str, Any]:
    return {
        "hop": mass.hop,
        "input_mass": mass.input_mass,
        "reasoning_mass": mass.reasoning_mass,
        "target_mass": mass.target_mass,
        "skipped_mass": mass.skipped_mass,
    }


def _inclusions(
    plan: TracePlan,
    result: HopResult,
    scores: list[float],
    numbers: Callable[[Tensor], Any],
) -> dict[str, Any]:
    """The optional parts that the request asks for."""
    include = plan.request.include
    data: dict[str, Any] = {}
    if "segments" in include:
        data["segments"] = segments(plan.prompt_map, plan.completion.messages, scores)
    if "sentences" in include:
        found = sentences(plan.prompt_map, plan.completion, scores)
        best = _chosen([entry["mean"] for entry in found], plan.request.top_k)
        data["sentences"] = [found[i] for i in best]
    if "generated" in include:
        data["generated"] = _generated(plan, result)
    if "layers" in include:
        if result.layer_scores is None:
            raise TraceError("no_layer_scores", "scores per layer were asked for but not measured")
        data["layers"] = numbers(result.layer_scores[:, : plan.prompt_length])
    return data


def _attention(plan: TracePlan, sums: Tensor | None, as_bytes: bool) -> dict[str, Any]:
    """The sums of attention as a file; nothing attends to tokens behind the last target."""
    if sums is None:
        raise TraceError("result_missing", "sums of attention were asked for but not measured")
    missing = len(plan.completion.token_ids) - sums.shape[-1]
    file = save(
        {"attention": pad(_checked(sums), (0, missing)).contiguous()},
        {"prompt_tokens": str(plan.prompt_length)},
    )
    shape = [*sums.shape[:2], sums.shape[-1] + missing]
    return {"shape": shape, "data": file if as_bytes else b64encode(file).decode()}


def _generated(plan: TracePlan, result: HopResult) -> list[dict[str, Any]]:
    """Every generated token; those behind the last target position have no influence on it.

    Hidden tokens have a score but no text and no id.
    """
    traced = _numbers(result.generated_scores[plan.prompt_length :])
    token_ids = plan.completion.generated_token_ids
    scores = [*traced, *[0.0] * (len(token_ids) - len(traced))]
    hidden = plan.generated.hidden
    rows = zip(plan.generated.full.pieces(), token_ids, scores, strict=True)
    return [
        {
            "index": i,
            **({} if i < hidden else {"token": token, "token_id": int(token_id)}),
            "score": score,
        }
        for i, (token, token_id, score) in enumerate(rows)
    ]
