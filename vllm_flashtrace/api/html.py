"""Attributions as HTML: a self-contained page, and a fragment for notebooks.

The output holds no script and refers to nothing outside itself. Texts come from a model or a
client: every one of them must pass jinja2's autoescape.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.heat import (
    LEVELS,
    HeatToken,
    completion_parts,
    heat_level,
    heat_scale,
    level_floor,
    name_of,
    prompt_heat,
)
from vllm_flashtrace.api.response import TokenScore

TABLE_ROWS = 20
_CONTEXT_TOKENS = 6
_SOURCES = 3
# Pictures that a browser draws and that can hold no script, as bytes and not as an address.
_PICTURE = re.compile(r"data:image/(?:png|jpeg|jpg|gif|webp|bmp);base64,[A-Za-z0-9+/=]+")
_SURROGATES = re.compile("[\ud800-\udfff]")


def render_page(attribution: Attribution) -> str:
    """A complete HTML document of one file, usable offline."""
    return _render("page.html.j2", attribution)


def render_fragment(attribution: Attribution) -> str:
    """A ``<div>`` for notebooks, whose styles apply inside it alone."""
    return _render("fragment.html.j2", attribution)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=1: f"{100.0 * share:.{digits}f} %"
    environment.filters["score"] = _format_score
    environment.filters["name"] = name_of
    return environment


def _render(name: str, attribution: Attribution) -> str:
    """Renders a template; halves of surrogate pairs, which UTF-8 cannot hold, become U+FFFD."""
    page = _environment().get_template(name).render(_context(attribution))
    return _SURROGATES.sub("\ufffd", page)


def _context(attribution: Attribution) -> dict[str, Any]:
    """Everything the templates read."""
    if attribution.status != "completed":
        lost = {"error": attribution.error, "text": attribution.text, "coverage": ""}
        return {"status": attribution.status, **lost}
    if attribution.targets != [attribution]:
        parts = [{"target": part.target, "sources": _sources(part)} for part in attribution.targets]
        cited = _cited(attribution)
        coverage = attribution.coverage_note
        return {
            "status": "several",
            "id": attribution.id,
            "parts": parts,
            "cited": cited,
            "coverage": coverage,
        }
    scale = heat_scale(attribution.scores)
    prompt = prompt_heat(attribution)
    mass = attribution.mass
    return {
        "status": attribution.status,
        "id": attribution.id,
        "coverage": attribution.coverage_note,
        "text": attribution.text,
        "target": attribution.target,
        "prompt": prompt,
        "images": _images(attribution),
        "complete": attribution.is_complete,
        "unlisted": attribution.to_dict().get("unlisted_mass"),
        "returned": len(attribution.scores),
        "completion": completion_parts(attribution),
        "generated": _generated_heat(attribution),
        "mass": [
            ("input", "Prompt", mass.input),
            ("reasoning", "Left on reasoning", mass.reasoning),
            ("target", "Target and answer", mass.target),
            ("skipped", "Skipped tokens", mass.skipped),
        ],
        "remaining_mass": attribution.remaining_mass,
        "input_mass": mass.input,
        "hops": _hop_rows(attribution),
        "auto_stopped": attribution.auto_stopped,
        "segments": attribution.segments,
        "top": [_table_row(score, mass.input, prompt) for score in attribution.top(TABLE_ROWS)],
        "legend": [(level, level_floor(level, scale)) for level in range(1, LEVELS + 1)],
        "full_heat": scale,
        "usage": attribution.usage,
    }


def _sources(attribution: Attribution) -> list[tuple[str, float]]:
    """The best sentences and their scores, or tokens where there are no sentences."""
    if attribution.sentences:
        found = [(str(s["text"]), float(s["score"])) for s in attribution.sentences]
    else:
        found = [(name_of(score), score.score) for score in attribution.top(TABLE_ROWS)]
    return found[:_SOURCES]


def _cited(attribution: Attribution) -> dict[str, Any] | None:
    """The answer in pieces, each with the numbers of its sources, and these with what is cited.

    None where nothing is cited, or the text that is known is not the one that citations count in.
    """
    pieces: list[tuple[str, list[int]]] = []
    rows: dict[int, dict[str, Any]] = {}
    text, at = attribution.text or "", 0
    for citation in attribution.citations:
        start, end = citation["start"], citation["end"]
        if start < at or text[start:end] != citation["text"]:
            return None
        numbers = [source["index"] + 1 for source in citation["sources"]]
        pieces += [(text[at:start], []), (text[start:end], numbers)]
        at = end
        for source in citation["sources"]:
            name = source.get("title") or source["id"]
            row = rows.setdefault(
                source["index"] + 1, {"name": name, "url": source.get("url"), "quotes": []}
            )
            if source["text"] not in row["quotes"]:
                row["quotes"].append(source["text"])
    return {"answer": [*pieces, (text[at:], [])], "sources": sorted(rows.items())} if rows else None


def _images(attribution: Attribution) -> list[dict[str, Any]]:
    """The images with the heat of their parts, each on a scale of its own."""
    urls = attribution.image_urls
    found = []
    for number, image in enumerate(attribution.images):
        scale = max(image["scores"], default=0.0)
        columns = int(image.get("columns") or 0)
        cells = [
            (*divmod(place, columns), score, heat_level(score, scale))
            for place, score in enumerate(image["scores"] if columns else ())
        ]
        url = urls[number] if number < len(urls) else None
        picture = url if columns and url is not None and _PICTURE.fullmatch(url) else None
        found.append({**image, "cells": cells, "columns": columns, "picture": picture})
    return found


def _hop_rows(attribution: Attribution) -> list[dict[str, float]]:
    rows, weight = [], 1.0
    for number, hop in enumerate(attribution.hops):
        parts = {name: float(hop[f"{name}_mass"]) for name in ("input", "reasoning", "target")}
        skipped = max(0.0, 1.0 - sum(parts.values()))
        rows.append({"hop": hop.get("hop", number), "weight": weight, **parts, "skipped": skipped})
        weight *= parts["reasoning"]
    return rows


def _table_row(
    score: TokenScore, input_mass: float, prompt: list[HeatToken] | None
) -> dict[str, Any]:
    before = after = ""
    if prompt is not None:
        first = max(0, score.index - _CONTEXT_TOKENS)
        before = "".join(token.text for token in prompt[first : score.index])
        after = "".join(
            token.text for token in prompt[score.index + 1 : score.index + 1 + _CONTEXT_TOKENS]
        )
    share = score.score / input_mass if input_mass > 0.0 else 0.0
    return {"score": score, "share": share, "before": before, "after": after}


def _generated_heat(attribution: Attribution) -> list[tuple[HeatToken, bool]]:
    """Generated tokens with their own heat scale and whether each is in the target."""
    entries = attribution.generated
    if not entries or not all("token" in entry and "score" in entry for entry in entries):
        return []
    spans = attribution.target.get("tokens") or []
    scale = max(float(entry["score"]) for entry in entries)
    rows = []
    for position, entry in enumerate(entries):
        index, value = int(entry.get("index", position)), float(entry["score"])
        token = HeatToken(index, str(entry["token"]), value, heat_level(value, scale))
        rows.append((token, any(start <= index < end for start, end in spans)))
    return rows


def _format_score(score: float) -> str:
    return "0" if score == 0.0 else f"{score:.2e}" if score < 1e-4 else f"{score:.4f}"
