"""The demo: a question whose answer is hidden in a long context, and where it was found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.terminal import TerminalHeatMap
from vllm_flashtrace.base.errors import CommandError, FlashTraceError, in_one_line
from vllm_flashtrace.commands.trace_command import command_engine
from vllm_flashtrace.models import prepare_smollm2

DEFAULT_HTML = Path("flashtrace-demo.html")

# A start in seconds on a small machine matters more here than speed: no compilation, and a cache
# that holds one conversation several times over (46 KB per token in float32).
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 512 * 2**20,
    "enforce_eager": True,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
_MAX_ANSWER_TOKENS = 32


def run_demo(
    html_path: Path = DEFAULT_HTML,
    *,
    full: bool = False,
    console: Console | None = None,
    prepare: Callable[[], Path] = prepare_smollm2,
    ask: Callable[[Path, Scenario], Attribution] | None = None,
) -> int:
    """Runs the demo and prints its result.

    The last line on standard output is the fact's share of the input mass. It appears only for a
    correct answer whose trace completed; anything else ends with one line on standard error.

    Args:
        html_path: Where the heat-map page is written.
        full: Whether to print the whole prompt.
        console: Where results go; standard output if None.
        prepare: Returns the model folder.
        ask: Answers and attributes; a vLLM engine started for this one question if None.

    Returns:
        Exit code: 0 if the model answered correctly and its answer was attributed, else 1.
    """
    console = console or Console()
    scenario = build_scenario()
    try:
        folder = prepare()
        _progress("Starting vLLM and asking the model (about a minute on two CPU cores) …")
        attribution = (ask or ask_vllm)(folder, scenario)
        if scenario.answer not in (attribution.text or ""):
            return _fail(f"the model answered {attribution.text!r}, not {scenario.answer!r}")
        if attribution.status != "completed":
            return _fail(str(attribution))
        share = attribution.share(scenario.fact_start, scenario.fact_end, message=0)
        attribution.to_html(html_path)
    except (FlashTraceError, CommandError, OSError, ValueError) as error:
        return _fail(in_one_line(error), *getattr(error, "__notes__", ()))
    _print_result(console, scenario, attribution, html_path, full)
    console.print(f"fact share of input mass: {share:.1%}".replace("%", " %"), highlight=False)
    return 0


def ask_vllm(folder: Path, scenario: Scenario) -> Attribution:
    """Asks the question on an engine that lives only as long as this call."""
    with command_engine(str(folder), **ENGINE_ARGS) as engine:
        from vllm import SamplingParams

        [attribution] = engine.generate(
            [scenario.messages],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=_MAX_ANSWER_TOKENS),
            flashtrace={
                # The code alone: the words around it repeat the question, and come from there.
                "target": {"text": scenario.answer},
                "top_k": None,
                "include": ["tokens", "segments", "generated"],
            },
        )
    return attribution


# The filler of the needle-in-a-haystack tasks of the RULER benchmark (arXiv 2404.06654).
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = "The secret access code for the Lisbon office is 7306."
ANSWER = "7306"
QUESTION = "What is the secret access code for the Lisbon office? Answer with the code."


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversation with a known source of its answer.

    Attributes:
        messages: OpenAI chat messages.
        fact_start: First character of the fact in the last message.
        fact_end: One past its last character.
        answer: What a correct completion contains.
    """

    messages: list[dict[str, str]]
    fact_start: int
    fact_end: int
    answer: str = ANSWER

    @property
    def fact(self) -> str:
        """The sentence that holds the answer."""
        return self.messages[-1]["content"][self.fact_start : self.fact_end]


def build_scenario(repeats: int = 20, depth: float = 0.5) -> Scenario:
    """Hides the fact, which occurs once, in filler.

    Args:
        repeats: How often the filler occurs; 20 make about 500 tokens.
        depth: Where the fact goes, 0 before all filler, 1 after it.

    Raises:
        ValueError: ``repeats`` is negative or ``depth`` is outside ``[0, 1]``.
    """
    if repeats < 0 or not 0.0 <= depth <= 1.0:
        raise ValueError(f"need repeats >= 0 and 0 <= depth <= 1, got {repeats} and {depth}")
    before = round(repeats * depth)
    sentences = [FILLER] * before + [FACT] + [FILLER] * (repeats - before)
    content = " ".join(sentences) + "\n\n" + QUESTION
    start = content.index(FACT)
    return Scenario([{"role": "user", "content": content}], start, start + len(FACT))


def _print_result(
    console: Console, scenario: Scenario, attribution: Attribution, html_path: Path, full: bool
) -> None:
    in_fact = sum(
        score.message == 0
        and score.start is not None
        and score.end is not None
        and score.start < scenario.fact_end
        and score.end > scenario.fact_start
        for score in attribution.scores
    )
    console.print(TerminalHeatMap(attribution, full=full))
    console.print(f"\nheat-map page: {html_path.resolve()}", highlight=False, soft_wrap=True)
    console.print(
        f"fact: {scenario.fact!r}, {in_fact} of {len(attribution.scores)} prompt tokens "
        f"({in_fact / len(attribution.scores):.1%})",
        highlight=False,
        soft_wrap=True,
    )


def _fail(reason: str, *notes: str) -> int:
    print(f"demo failed: {'; '.join([reason, *notes])}", file=sys.stderr, flush=True)
    return 1


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
