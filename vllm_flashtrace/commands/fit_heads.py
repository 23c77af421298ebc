"""What ``vllm-flashtrace fit-heads`` does: ablates sources of answers and fits weights of heads.

Of each line of the data the answer is written, or taken as it is, and its rows' attention on every
sentence of the prompt recorded. Then each sentence is cut out of the prompt's tokens with
probability 1/2, several times, and the answer scored behind what is left. `core.head_weights`
learns from all lines which heads' attention foretells what the answer loses.
"""

from __future__ import annotations

import base64
import json
import math
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.base.records import Completion, ScoredText
from vllm_flashtrace.commands.trace_command import command_engine
from vllm_flashtrace.core.head_weights import (
    HeadExample,
    fit_head_weights,
    kept_scores,
    rank_correlation,
)
from vllm_flashtrace.offline.flashtrace import texts_of
from vllm_flashtrace.text.sentences import containing, contents, sentence_spans
from vllm_flashtrace.trace.heads_file import HeadsFile, ModelFacts

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_flashtrace.api.attribution import Attribution
    from vllm_flashtrace.offline.flashtrace import FlashTrace

Prompt = str | list[dict[str, Any]]

HELD_OUT = 5
"""One in so many tasks, or lines, is held out to measure what was learned."""
FEWEST_SOURCES = 2

_ATTENTION = {
    "target": "generated",
    "reasoning": "none",
    "rows": "predicting",
    "skip_tokens": "none",
    "hops": 0,
    "top_k": None,
    "include": ["attention", "generated"],
}
_DEFAULTS: dict[str, Any] = {"top_k": None, "include": []}


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What the command was told; see its help."""

    model: str
    out: Path
    ablations: int = 8
    ridge: float = 3.0
    seed: int = 0
    max_tokens: int = 256
    dtype: str = "auto"
    max_model_len: int | None = None
    enforce_eager: bool = True
    work: Path | None = None
    json_file: Path | None = None

    @property
    def run(self) -> dict[str, Any]:
        """What measurements depend on, besides the data."""
        own = ("model", "ablations", "seed", "max_tokens", "dtype", "max_model_len")
        return {name: getattr(self, name) for name in own}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the data.

    Attributes:
        key: Tells it from lines with other contents.
        prompt: A text, or chat messages.
        response: The answer; None where the model is to write it.
        task: Lines of one task are held out together; None for a task of its own.
    """

    key: str
    prompt: Prompt
    response: str | None
    task: str | None


def read_lines(path: Path, limit: int | None = None) -> list[Line]:
    """Reads the data, each distinct line once.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has no line, or one is malformed; the message has its number.
    """
    lines: dict[str, Line] = {}
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                line = _line(f"{path}:{number}", text)
                lines.setdefault(line.key, line)
            if limit is not None and len(lines) >= limit:
                break
    if not lines:
        raise ValueError(f"{path} has no line")
    return list(lines.values())


def _line(place: str, text: str) -> Line:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no object")
    if unknown := row.keys() - {"messages", "prompt", "response", "task"}:
        raise ValueError(f"{place} has unknown keys: {', '.join(sorted(unknown))}")
    messages, prompt = row.get("messages"), row.get("prompt")
    if (messages is None) == (prompt is None):
        raise ValueError(f"{place} needs either messages or a prompt")
    if messages is not None:
        chat = isinstance(messages, list) and messages
        if not chat or not all(
            isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages
        ):
            raise ValueError(f"{place}: messages must be a list of objects with a role")
    for name in ("prompt", "response", "task"):
        value = row.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"{place}: {name} must be a text that is not empty")
    key = sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]
    return Line(key, messages or str(prompt), row.get("response"), row.get("task"))


def run_fit(lines: Sequence[Line], options: FitOptions, console: Console | None = None) -> None:
    """Measures the lines on an engine of its own, fits, and writes and prints what came of it.

    Raises:
        FlashTraceError: The engine did not start, or cannot trace the model.
        OSError: A file cannot be written.
        ValueError: The work file is of another run, or nothing can be learned.
    """
    from rich.console import Console

    began = time.monotonic()
    console = console or Console(highlight=False)
    engine_args: dict[str, Any] = {
        "dtype": options.dtype,
        "disable_log_stats": True,
        "enforce_eager": options.enforce_eager,
    }
    if options.max_model_len is not None:
        engine_args["max_model_len"] = options.max_model_len
    work = Work(options.work, options.run)
    with command_engine(options.model, **engine_args) as ft:
        model = ModelFacts.of(ft.llm.llm_engine.vllm_config)
        rows = measure_lines(ft, lines, options, work, console)
    report = fit(lines, rows, model, options)
    report["seconds"] = time.monotonic() - began
    show(report, console)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


class Work:
    """Rows of lines that are measured, in a file, so that a run can go on where it was stopped."""

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        """Reads what is there; a last line that was cut off counts for nothing.

        Args:
            path: The file; None to remember rows only as long as the process lives.
            run: What rows depend on.

        Raises:
            OSError: The file cannot be read or written.
            ValueError: It is no such file, or of another run; the message says in what.
        """
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if not path.exists() or not path.stat().st_size:
            self._append({"run": dict(run)})
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            first, *rows = map(json.loads, whole.splitlines())
            earlier = first["run"]
            self.rows = {row["line"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no work file of fit-heads: {error!r}") from None
        if other := sorted(k for k in {*earlier, *run} if earlier.get(k) != run.get(k)):
            raise ValueError(f"{path} is of another run (other {', '.join(other)})")
        if len(whole) < len(text):
            os.truncate(path, len(whole))

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps the row of a line."""
        self.rows[key] = {"line": key, **row}
        self._append(self.rows[key])

    def _append(self, row: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def measure_lines(
    ft: FlashTrace, lines: Sequence[Line], options: FitOptions, work: Work, console: Console
) -> Mapping[str, Mapping[str, Any]]:
    """The rows of all lines, by their keys; see `Work`."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for line in progress.track(lines, description="ablating"):
            if line.key not in work.rows:
                try:
                    row = _measured(ft, line, options)
                except UnusableLineError as error:
                    row = {"skipped": str(error)}
                except FlashTraceError as error:
                    row = {"skipped": error.code}
                work.add(line.key, row)
    return work.rows


class UnusableLineError(Exception):
    """A line from which nothing can be learned; the text is the reason."""


def _measured(ft: FlashTrace, line: Line, options: FitOptions) -> dict[str, Any]:
    """One line's attention, ablations and log-probabilities.

    Raises:
        FlashTraceError: It cannot be traced or scored.
        UnusableLineError: There is nothing to be learned of it.
    """
    found = _explained(ft, line, options)
    prompt_ids = [score.token_id for score in found.scores]
    response_ids = [token["token_id"] for token in found.to_dict()["generated"]]
    if (
        len(prompt_ids) + len(response_ids)
        >= ft.llm.llm_engine.vllm_config.model_config.max_model_len
    ):
        raise UnusableLineError("too long")
    sources = sources_of(line.prompt, found)
    if len(sources) < FEWEST_SOURCES:
        raise UnusableLineError(f"fewer than {FEWEST_SOURCES} sentences")
    usual = _completed(ft.attribute(line.prompt, response_ids, _DEFAULTS))
    if [score.token_id for score in usual.scores] != prompt_ids:
        raise UnusableLineError("the prompt's text gives other tokens than the engine had")
    sums = found.attention.float()
    kept = draw_ablations(len(sources), options.ablations, f"{options.seed}:{line.key}")
    return {
        "attention": _encoded(torch.stack([sums[..., tokens].sum(-1) for tokens in sources])),
        "shape": [len(sources), *sums.shape[:2]],
        "kept": ["".join(map(str, mask)) for mask in kept],
        "logprobs": _log_probs(ft, prompt_ids, response_ids, sources, kept),
        "default": [math.fsum(usual.scores[i].score for i in tokens) for tokens in sources],
    }


def _explained(ft: FlashTrace, line: Line, options: FitOptions) -> Attribution:
    """The line's answer with its attention."""
    from jinja2 import TemplateError
    from vllm.exceptions import VLLMValidationError

    try:
        if line.response is not None:
            return _completed(ft.attribute(line.prompt, line.response, _ATTENTION))
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
        [found] = ft.generate([line.prompt], params, _ATTENTION)
        return _completed(found)
    except (ValueError, TemplateError, VLLMValidationError) as error:
        too_long = "maximum context length" in str(error)
        raise UnusableLineError("too long" if too_long else "refused by the engine") from error


def _completed(found: Attribution) -> Attribution:
    if found.status != "completed":
        code = str((found.error or {}).get("code"))
        raise UnusableLineError("too long" if code == "target_beyond_context" else code)
    return found


def sources_of(prompt: Prompt, found: Attribution) -> list[list[int]]:
    """The prompt's tokens in each sentence of the user's messages, or of a plain prompt.

    Args:
        prompt: The prompt as it was given.
        found: Its attribution, with one score for each token of the prompt.
    """
    roles = ["user"] if isinstance(prompt, str) else [one["role"] for one in prompt]
    texts = {
        (one.message, one.part): (one.text, [start for start, _ in sentence_spans(one.text)])
        for one in contents(Completion((), (), "", **texts_of(prompt)))
        if roles[one.message] == "user"
    }
    tokens: dict[tuple[int, int | None, int], list[int]] = defaultdict(list)
    for score in found.scores:
        if score.message is None or score.start is None or score.end is None:
            continue
        if (known := texts.get((score.message, score.part))) is not None:
            text, starts = known
            number = containing(starts, text, score.start, score.end)
            tokens[score.message, score.part, number].append(score.index)
    return list(tokens.values())


def draw_ablations(sources: int, count: int, seed: str) -> list[list[int]]:
    """Which sources each ablation keeps, each with probability 1/2, but never none of them."""
    draw = random.Random(seed)
    kept: list[list[int]] = []
    while len(kept) < count:
        mask = [draw.getrandbits(1) for _ in range(sources)]
        if any(mask):
            kept.append(mask)
    return kept


def _log_probs(
    ft: FlashTrace,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    sources: Sequence[Sequence[int]],
    kept: Sequence[Sequence[int]],
) -> list[float]:
    """Log-probability of the response, in nats, behind what each ablation keeps of the prompt."""
    from vllm_flashtrace.offline.jobs import score_texts
    from vllm_flashtrace.trace.hop import EngineContext

    texts = []
    for mask in kept:
        gone = {i for keeps, own in zip(mask, sources, strict=True) if not keeps for i in own}
        left = [token for i, token in enumerate(prompt_ids) if i not in gone]
        positions = range(len(left), len(left) + len(response_ids))
        texts.append(ScoredText([*left, *response_ids], list(positions)))
    places = ft.config.concurrent_traces(ft.llm.llm_engine.vllm_config)
    reports = score_texts(ft.llm, texts, [EngineContext()] * len(texts), places)
    found = []
    for report in reports:
        if isinstance(report, FlashTraceError):
            raise report
        found.append(math.fsum(report.log_probs.double().tolist()))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """A line that can be learned from, and the default attribution's score of each source."""

    group: str
    example: HeadExample
    usual: Tensor


def _decoded(line: Line, row: Mapping[str, Any]) -> _Measured:
    values = torch.frombuffer(bytearray(base64.b64decode(row["attention"])), dtype=torch.float32)
    kept = torch.tensor([[float(c) for c in mask] for mask in row["kept"]])
    logprobs = torch.tensor(row["logprobs"], dtype=torch.float64)
    example = HeadExample(values.view(row["shape"]), kept, logprobs)
    group = line.key if line.task is None else f"task {line.task}"
    return _Measured(group, example, torch.tensor(row["default"], dtype=torch.float64))


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.float().contiguous().numpy().tobytes()).decode()


def fit(
    lines: Sequence[Line],
    rows: Mapping[str, Mapping[str, Any]],
    model: ModelFacts,
    options: FitOptions,
) -> dict[str, Any]:
    """Fits the weights on all lines, writes the file, and says how good they are.

    Args:
        lines: The data.
        rows: What was measured, by the lines' keys.
        model: The model.
        options: The command's.

    Raises:
        OSError: The file cannot be written.
        ValueError: Nothing can be learned.
    """
    skipped = Counter(rows[line.key]["skipped"] for line in lines if "skipped" in rows[line.key])
    measured = [_decoded(line, row) for line in lines if "skipped" not in (row := rows[line.key])]
    if not measured:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        raise ValueError(f"none of {len(lines)} lines can be used: {counts}")
    began = time.monotonic()
    weights = fit_head_weights([one.example for one in measured], options.ridge)
    seconds = time.monotonic() - began
    held_out = _held_out(measured, options)
    ablations = sum(len(one.example.logprobs) for one in measured)
    learned = None if held_out is None else held_out["learned"]
    HeadsFile(weights, model, len(measured), ablations, learned).write(options.out)
    return {
        "out": str(options.out),
        "bytes": options.out.stat().st_size,
        "model": asdict(model),
        "lines": len(lines),
        "examples": len(measured),
        "skipped": dict(skipped),
        "ablations": ablations,
        "ridge": options.ridge,
        "heads_with_weight": int((weights > 0).sum()),
        "fit_seconds": seconds,
        "held_out": held_out,
    }


def _held_out(measured: Sequence[_Measured], options: FitOptions) -> dict[str, Any] | None:
    """Mean rank correlations on what is held out; None where there is too little of it."""
    groups = sorted({one.group for one in measured})
    random.Random(options.seed).shuffle(groups)
    held = set(groups[: -(-len(groups) // HELD_OUT)])
    training = [one.example for one in measured if one.group not in held]
    tested = [one for one in measured if one.group in held]
    if not training:
        return None
    try:
        weights = fit_head_weights(training, options.ridge).double()
    except ValueError:  # Too few of them; all together had something to learn from.
        return None
    correlations: dict[str, list[float]] = defaultdict(list)
    for one in tested:
        attention = one.example.attention.double()
        scores = {
            "learned": (attention * weights).sum((1, 2)),
            "equal": attention.sum((1, 2)),
            "default": one.usual,
        }
        for name, own in scores.items():
            foreseen = kept_scores(own, one.example.kept)
            correlations[name].append(rank_correlation(foreseen, one.example.logprobs))
    means = {name: math.fsum(own) / len(own) for name, own in correlations.items()}
    return {"training": len(training), "examples": len(tested), **means}


_ROWS = {
    "learned": "learned weights of heads",
    "equal": "equal weights of heads",
    "default": "default attribution",
}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the report."""
    for line in _sentences(report):
        console.print(line, soft_wrap=True)
    held_out = report["held_out"]
    if held_out is None:
        console.print("nothing was held out: there are too few tasks or lines", soft_wrap=True)
        return
    from rich.table import Table

    table = Table("held out", "rank correlation")
    table.columns[1].justify = "right"
    for name, label in _ROWS.items():
        table.add_row(label, f"{held_out[name]:.2f}")
    console.print(table)
    console.print(
        f"of the log-probability and the scores of what is kept, over the ablations of each of "
        f"{held_out['examples']} examples; weights of the other {held_out['training']}",
        soft_wrap=True,
    )


def _sentences(report: Mapping[str, Any]) -> Iterator[str]:
    model = report["model"]
    yield (
        f"{report['out']}: {report['bytes']:,} bytes, {report['heads_with_weight']} of "
        f"{model['layers'] * model['heads']} heads have a weight"
    )
    yield (
        f"{report['examples']} of {report['lines']} lines, {report['ablations']} ablations; "
        f"{report['seconds']:.1f} s, of which the fit took {report['fit_seconds']:.2f} s"
    )
    for reason, count in sorted(report["skipped"].items(), key=lambda one: -one[1]):
        yield f"{count} skipped: {reason}"
