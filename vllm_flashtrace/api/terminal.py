"""Attributions in a terminal, drawn with rich.

Where colours are off or the output is piped, brackets mark the hot tokens instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.heat import HeatToken, completion_parts, name_of, prompt_heat

# Every shade stands out against a black and a white background, hotter ones more.
_STYLES = (
    "",
    "",
    "grey93 on #6e6450",
    "grey93 on #7a673f",
    "grey93 on #8a682b",
    "grey3 on #b0741a",
    "grey3 on #cf720c",
    "bold grey3 on #ea6404",
    "bold grey3 on #ff4a1a",
)
_WARM_LEVEL = 2
_HOT_LEVEL = 5
_CONTEXT_TOKENS = 12
_SHORTEST_GAP = 16
_ROWS_OF_SEVERAL = 3


class TerminalHeatMap:
    """A rich renderable: heat-mapped prompt, completion, top tokens and mass balance."""

    def __init__(self, attribution: Attribution, *, full: bool = False, rows: int = 10) -> None:
        """Chooses what to draw.

        Args:
            attribution: What to draw.
            full: Whether to print the whole prompt instead of the parts around hot tokens.
            rows: Length of the table of top tokens.
        """
        self.attribution = attribution
        self.full = full
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the parts from top to bottom."""
        attribution = self.attribution
        if attribution.status != "completed":
            yield Text(str(attribution), style="bold red")
            return
        if attribution.coverage is not None:
            yield Text(
                f"Traced {attribution.coverage_note}: what flows through the others is in no "
                "score.\n",
                style="bold",
            )
        if attribution.targets != [attribution]:
            for number, part in enumerate(attribution.targets, 1):
                yield Text(f"{number}  {_printable(str(part.target['text']))}", style="bold")
                yield _top_table(part, min(self.rows, _ROWS_OF_SEVERAL))
                yield Text()
            return
        coloured = console.color_system is not None and not console.no_color
        tokens = prompt_heat(attribution)
        if tokens is None:
            yield Text("Not all tokens were returned; the prompt cannot be shown.", "dim")
        else:
            yield _legend(coloured, attribution.is_complete)
            yield _heat_text(tokens, coloured, self.full)
        yield Text()
        yield _completion(attribution, coloured)
        yield Text()
        yield _top_table(attribution, self.rows)
        yield _mass_line(attribution)


def render_terminal(
    attribution: Attribution, *, full: bool = False, rows: int = 10
) -> RenderableType:
    """A renderable for ``rich.print`` or ``Console.print``; see :class:`TerminalHeatMap`."""
    return TerminalHeatMap(attribution, full=full, rows=rows)


def _legend(coloured: bool, complete: bool) -> Text:
    legend = Text("Prompt  ", style="bold")
    if coloured:
        legend.append("low ", "not bold dim")
        for style in _STYLES[2:]:
            legend.append("  ", style)
        legend.append(" high", "not bold dim")
    else:
        legend.append("[warm] [[hot]]", "not bold")
    if not complete:
        legend.append("  (not all scores were returned)", "not bold dim")
    return legend


def _heat_text(tokens: Sequence[HeatToken], coloured: bool, full: bool) -> Text:
    text = Text(overflow="fold")
    for shown, group in _grouped(tokens, full):
        if not shown:
            text.append(f" … {len(group)} tokens …", "dim italic")
        elif coloured:
            for token in group:
                style = _STYLES[token.level] or ("dim" if token.is_template else "")
                text.append(_printable(token.text), style)
        else:
            text.append("".join(_bracketed(group)))
    text.rstrip()
    return text


def _bracketed(tokens: Sequence[HeatToken]) -> Iterator[str]:
    """The tokens' text, runs of equally hot ones in brackets that leave blanks outside."""
    for depth, run in groupby(tokens, key=_bracket_depth):
        content = _printable("".join(token.text for token in run))
        body = content.strip()
        if depth and body:
            lead, _, trail = content.partition(body)
            content = f"{lead}{'[' * depth}{body}{']' * depth}{trail}"
        yield content


def _bracket_depth(token: HeatToken) -> int:
    return 2 if token.level >= _HOT_LEVEL else 1 if token.level >= _WARM_LEVEL else 0


def _grouped(tokens: Sequence[HeatToken], full: bool) -> Iterator[tuple[bool, Sequence[HeatToken]]]:
    """Splits the prompt into shown and elided stretches, in order."""
    shown = [full] * len(tokens)
    for position, token in enumerate(tokens):
        if token.level >= _WARM_LEVEL:
            first = max(0, position - _CONTEXT_TOKENS)
            last = min(len(tokens), position + _CONTEXT_TOKENS + 1)
            shown[first:last] = [True] * (last - first)
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and shown[end] == shown[start]:
            end += 1
        yield shown[start] or end - start < _SHORTEST_GAP, tokens[start:end]
        start = end


def _completion(attribution: Attribution, coloured: bool) -> Text:
    text = Text("Completion  ", style="bold")
    pieces = completion_parts(attribution)
    if not any(in_target for _, in_target in pieces):
        pieces.append((f"(target: {attribution.target.get('text')!r})", False))
    for piece, in_target in pieces:
        content = _printable(piece)
        if in_target and not coloured:
            content = f"[[{content}]]"
        text.append(content, "not bold underline bright_cyan" if in_target else "not bold")
    return text


def _top_table(attribution: Attribution, rows: int) -> Table:
    table = Table(title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in ("#", "token", "position", "score", "of input"):
        table.add_column(heading, justify="left" if heading == "token" else "right")
    input_mass = attribution.input_mass
    for rank, score in enumerate(attribution.top(rows), 1):
        share = score.score / input_mass if input_mass > 0.0 else 0.0
        token = Text(_printable(name_of(score)), overflow="fold")
        table.add_row(str(rank), token, str(score.index), f"{score.score:.4f}", f"{share:.1%}")
    return table


def _mass_line(attribution: Attribution) -> Text:
    mass = attribution.mass
    parts = [
        f"prompt {mass.input:.1%}",
        f"left on reasoning {mass.reasoning:.1%}",
        f"target {mass.target:.1%}",
        f"skipped {mass.skipped:.1%}",
    ]
    hops = len(attribution.hops)
    passes = f"{hops} {'pass' if hops == 1 else 'passes'}"
    if attribution.auto_stopped == "max_hops":
        passes += ", the most that the server allows"
    return Text(f"\nMass: {' · '.join(parts)} ({passes})")


def _printable(text: str) -> str:
    """Text without control characters, which could drive the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)
