"""Does an answer that the model really gave lead back to the sentences that it came from?

Questions whose answers share no word with their sources (`benchmarks.faithfulness.paraphrased`)
are answered by the model, and right answers are kept. Every method ranks the sentences of the
context. Printed are, the first two with 95 % bootstrap intervals,

- ``found``: of the sentences that the answer rests on, the share among as many best ones;
- ``LDS``: Spearman's correlation, over random ablations that keep each sentence with probability
  1/2, of the response's log-probability and the sum of the kept sentences' scores;
- ``drop@k``: the log-probability (nats) that the response loses without the k best sentences.

A sentence that is left out is cut out of the text. Finished work is kept in a file beside the
output, and the same command goes on from there. The baseline ``embedding`` is there if the package
``wordllama`` is. With ``--wide`` our two presets and the methods without a model explain more
answers than the others; with ``--examples 0`` they alone run.

    python -m benchmarks.faithfulness.own_answers [--model FOLDER] --json OUT [--preset quick]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.faithfulness.__main__ import as_text, environment
from benchmarks.faithfulness.attention import AttentionFamily, PackageFamily
from benchmarks.faithfulness.baselines import ReagentFamily, SimpleFamily
from benchmarks.faithfulness.engine import EngineResource
from benchmarks.faithfulness.example import Example, Prepared, prepare
from benchmarks.faithfulness.gradients import GradientFamily
from benchmarks.faithfulness.hf import HFModel
from benchmarks.faithfulness.own_methods import (
    CutFamily,
    LogitDirectionFamily,
    OwnFamily,
    WordFamily,
    attention_by_sentence,
)
from benchmarks.faithfulness.own_summary import (
    DEFAULTS,
    DROPS,
    SHOWN,
    draw,
    pooled,
    summarise,
    tables,
    widely,
)
from benchmarks.faithfulness.paraphrased import TASKS, Question, make_question
from benchmarks.faithfulness.run import Resources, Row, WorkFile, attribute
from benchmarks.faithfulness.tasks import prompt_ids

THINK = "Think in one or two short sentences. Then write 'Answer:' and the number."
ANSWER = "Answer:"
_BATCH = 16
_ATTEMPTS = 3
"""Questions asked for each right answer that is wanted, at most."""
LONGEST_ANSWER = 96
REFERENCE_ABLATIONS = 64
TRAINING_ABLATIONS = 8
"""Of each answer that weights of heads are learned from: many answers teach more than many each."""
KEEP_PROBABILITY = 0.5

CHEAP = (OwnFamily, WordFamily, SimpleFamily)
COSTLY = (CutFamily,)
OFFLINE = (AttentionFamily, LogitDirectionFamily, PackageFamily, GradientFamily, ReagentFamily)
"""Families that run the model in Hugging Face transformers, once the engine is gone."""
OURS = [
    "flashtrace-k0",
    "flashtrace-k1",
    "flashtrace-auto",
    "flashtrace-k0-skip",
    "flashtrace-k1-skip",
    "flashtrace-auto-skip",
    "flashtrace-k0-predicting",
    "flashtrace-auto-predicting",
    DEFAULTS,
    "flashtrace-auto-predicting-surprise",
    "flashtrace-auto-surprise-skip",
]
THROUGH = ["flashtrace-auto-through", "flashtrace-auto-predicting-through"]
"""Twice as dear, and no better; on few examples."""
WORDS = ["overlap", "question-overlap", "bm25", "random", "recency"]
if importlib.util.find_spec("wordllama") is not None:
    WORDS.append("embedding")
WIDE = ["flashtrace-k1", DEFAULTS, *WORDS]
"""The paper's formula, our defaults, and what no model is asked for; on the most examples."""
COST = {"loo-sentence": "left_out", "contextcite": "ablated", "contextcite-128": "offline"}
"""Methods that ask the model many times, and the option that says for how many examples."""
HF = [
    "logit-direction",
    "ifr-per-token",
    "attention-mean",
    "value-norm",
    "flashtrace-package",
    "attn-lrp",
    "alti-rollout",
    "attention-gradient",
]
DROPPED = [
    "flashtrace-k1",
    DEFAULTS,
    "loo-sentence",
    "contextcite",
    "bm25",
    "random",
]
"""Methods whose best sentences are taken out."""

PRESETS: dict[str, dict[str, int]] = {
    "full": {"wide": 48, "examples": 24, "trained": 40, "left_out": 12, "ablated": 6, "offline": 6},
    "quick": {"wide": 6, "examples": 6, "trained": 0, "left_out": 2, "ablated": 1, "offline": 2},
}


@dataclass(frozen=True, slots=True)
class Case:
    """An example that was answered rightly.

    Attributes:
        key: Its name in the work file.
        task: Name of the task.
        number: How many right ones of its task come before it.
        prepared: In tokens; its ``sentences`` are those of the context alone.
        gold: Indices of the sentences that the answer rests on.
        question: What was asked, without the context.
    """

    key: str
    task: str
    number: int
    prepared: Prepared
    gold: frozenset[int]
    question: str


@dataclass
class OwnResources(Resources):
    """An engine without compilation: every prompt has another length, and few come twice."""

    questions: Mapping[str, str] = field(default_factory=dict)
    """What was asked, without the context, by the id of the example."""

    @cached_property
    def hf(self) -> HFModel:
        """The model in Hugging Face transformers, in float32 whatever the engine computes with."""
        return HFModel(self.model_path)

    @cached_property
    def engine(self) -> EngineResource:
        """The vLLM engine."""
        return EngineResource(self.model_path, self.dtype, self.max_model_len, enforce_eager=True)


def asked(question: Question, number: int) -> str:
    """The question and how it is to be answered; of plain ones every other in a sentence."""
    if question.think:
        return f"{question.text} {THINK}"
    text, _, brief = question.text.partition(" Answer with ")
    return f"{text} Answer with {brief}" if number % 2 == 0 else f"{text} Answer in one sentence."


def prompt_of(question: Question, number: int) -> str:
    """The user's message."""
    separator = "\n" if "=" in question.sentences[-1] else " "
    return f"{separator.join(question.sentences)}\n\n{asked(question, number)}"


def parted(text: str) -> tuple[str, str]:
    """A response as reasoning, which ends with ``Answer:``, and output."""
    at = text.rfind(ANSWER)
    if at < 0:
        return "", text
    return text[: at + len(ANSWER)], text[at + len(ANSWER) :]


def is_right(question: Question, text: str) -> bool:
    """Whether a response gives the right answer and no wrong one."""
    reasoning, output = parted(text)
    if question.think and not reasoning:
        return False

    def names(word: str) -> bool:
        pattern = rf"(?<![\w.,]){re.escape(word)}s?(?!\w|[.,]\d)"
        return re.search(pattern, plain, re.IGNORECASE) is not None

    plain = re.sub(r"(?<=\d),(?=\d{3})", "", output)
    return names(question.answer) and not any(map(names, question.wrong))


def answer_questions(
    options: argparse.Namespace, resources: Any, work: WorkFile, console: Console
) -> None:
    """Rows ``answer``: token ids, and whether they are right."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0)
    tokenizer = resources.tokenizer
    for task in options.tasks:
        number = 0
        right = 0
        batch = min(_BATCH, 2 * options.wide)
        while right < options.wide and number < _ATTEMPTS * options.wide:
            numbers = range(number, number + batch)
            number += batch
            missing = [n for n in numbers if work.get("answer", f"{task}/{n}") is None]
            if missing:
                questions = [
                    make_question(task, n, options.sentences, options.seed) for n in missing
                ]
                prompts = [
                    TokensPrompt(prompt_token_ids=prompt_ids(prompt_of(q, n), tokenizer))
                    for q, n in zip(questions, missing, strict=True)
                ]
                outputs = resources.engine.ft.llm.generate(prompts, sampling, use_tqdm=False)
                for n, question, output in zip(missing, questions, outputs, strict=True):
                    [answer] = output.outputs
                    ended = answer.finish_reason == "stop"
                    ids = list(answer.token_ids)[: -1 if ended else None]
                    work.add(
                        {
                            "kind": "answer",
                            "example": f"{task}/{n}",
                            "text": answer.text,
                            "token_ids": ids,
                            "right": ended and is_right(question, answer.text),
                        }
                    )
            right += sum(work.rows["answer", f"{task}/{n}"]["right"] for n in numbers)
        console.print(f"{task}: {right} right answers of {number}")


def make_cases(options: argparse.Namespace, work: WorkFile, tokenizer: Any) -> list[Case]:
    """The first right answers of each task."""
    cases: list[Case] = []
    for task in options.tasks:
        own: list[Case] = []
        for n in range(_ATTEMPTS * options.wide + _BATCH):
            row = work.get("answer", f"{task}/{n}")
            if row is not None and row["right"] and len(own) < options.wide:
                question = make_question(task, n, options.sentences, options.seed)
                case = _case(task, n, len(own), question, row, tokenizer)
                if case is not None:
                    own.append(case)
        cases += own
    return cases


def _case(
    task: str, n: int, number: int, question: Question, row: Row, tokenizer: Any
) -> Case | None:
    """None where the text of the response has other tokens than the model generated."""
    prompt = prompt_of(question, n)
    reasoning, output = parted(row["text"]) if question.think else ("", row["text"])
    starts = [prompt.index(sentence) for sentence in question.sentences]
    gold = tuple((starts[i], starts[i] + len(question.sentences[i])) for i in question.gold)
    example = Example(f"{task}/{n}", task, len(question.sentences), prompt, reasoning, output, gold)
    prepared = prepare(example, tokenizer)
    if list(prepared.token_ids[prepared.prompt_length :]) != row["token_ids"]:
        return None
    context = prepared.sentences[: len(question.sentences)]
    for (first, end), sentence in zip(context, question.sentences, strict=True):
        if "".join(prepared.texts[first:end]).strip() != sentence:
            raise RuntimeError(f"{task}/{n}: {sentence!r} is no sentence of the prompt")
    digest = hashlib.blake2b(repr(prepared.token_ids).encode(), digest_size=5).hexdigest()
    return Case(
        key=f"{task}/{n}#{digest}",
        task=task,
        number=number,
        prepared=replace(prepared, sentences=context),
        gold=frozenset(question.gold),
        question=asked(question, n),
    )


def of_first(count: int, cases: Sequence[Case]) -> list[Case]:
    """The first cases of each task, all tasks alike."""
    return sorted((case for case in cases if case.number < count), key=lambda case: case.number)


def record_attention(
    cases: Sequence[Case], resources: Any, work: WorkFile, console: Console
) -> None:
    """Rows ``attention``: of each layer and head the sum on each sentence, and the seconds."""
    pending = [case for case in cases if work.get("attention", case.key, "predicting") is None]
    for case in track(pending, "attention", console=console) if pending else ():
        sums, seconds = attention_by_sentence(resources.engine.ft, case.prepared)
        row = {"kind": "attention", "example": case.key, "method": "predicting", "seconds": seconds}
        work.add({**row, "sums": [[float(f"{x:.4g}") for x in each] for each in sums]})


def ablate(
    cases: Sequence[Case],
    resources: Any,
    work: WorkFile,
    console: Console,
    *,
    kind: str,
    count: int,
) -> None:
    """Rows ``kind``: which sentences were kept, and the response's log-probability (nats)."""
    pending = [case for case in cases if work.get(kind, case.key) is None]
    if not pending:
        return
    family = CutFamily(resources)
    for case in track(pending, kind, console=console):
        sources = len(case.prepared.sentences)
        key = zlib.crc32(case.prepared.example.id.encode())
        draw = np.random.default_rng([resources.seed + 1, key])
        kept = draw.random((count, sources)) < KEEP_PROBABILITY
        found = family.without(case.prepared, [np.flatnonzero(~row) for row in kept])
        masks = ["".join(map(str, row.astype(int))) for row in kept]
        work.add({"kind": kind, "example": case.key, "kept": masks, "logprobs": found})


def drop(cases: Sequence[Case], resources: Any, work: WorkFile, console: Console) -> None:
    """Rows ``drops``: log-probability lost (nats) without the best sentences of each method."""
    pending = []
    for case in cases:
        for name in DROPPED:
            row = work.get("scores", case.key, name)
            known = row is None or "values" not in row or work.get("drops", case.key, name)
            if not known:
                pending.append((case, name, np.array(row["values"])))
    if not pending:
        return
    family = CutFamily(resources)
    for case, name, values in track(pending, "drops", console=console):
        order = np.argsort(-pooled(case, values)[SHOWN], kind="stable")
        whole, *without = family.without(
            case.prepared, [np.array([], dtype=int), *(order[:k] for k in DROPS)]
        )
        lost = [whole - value for value in without]
        work.add({"kind": "drops", "example": case.key, "method": name, "lost": lost})


def run(options: argparse.Namespace, resources: Any, console: Console) -> dict[str, Any]:
    """All stages; those that are done in the work file cost nothing."""
    config = (Path(resources.model_path) / "config.json").read_bytes()
    fingerprint = {
        "model": hashlib.blake2b(config, digest_size=8).hexdigest(),
        "dtype": resources.dtype,
        "seed": resources.seed,
        "sentences": options.sentences,
    }
    with closing(WorkFile(options.json.with_suffix(".work.jsonl"), fingerprint)) as work:
        resources.max_model_len = 512 + 48 * options.sentences
        options.wide = max(options.wide, options.examples)
        answer_questions(options, resources, work, console)
        cases = make_cases(options, work, resources.tokenizer)
        resources.questions = {case.prepared.example.id: case.question for case in cases}
        rest = (resources, work, console)
        attribute(cases, lambda case: WIDE, *rest, CHEAP)
        some = of_first(options.examples, cases)
        attribute(some, lambda case: OURS, *rest, CHEAP)
        attribute(of_first(options.ablated, cases), lambda case: THROUGH, *rest, CHEAP)
        taught = of_first(options.trained, cases)
        record_attention(of_first(max(options.examples, options.trained), cases), *rest)
        ablate(taught, *rest, kind="training", count=TRAINING_ABLATIONS)
        for name, limit in COST.items():
            first = of_first(getattr(options, limit), cases)
            attribute(first, lambda case, name=name: [name], *rest, COSTLY)
        ablated = of_first(options.ablated, cases)
        ablate(ablated, *rest, kind="ablations", count=REFERENCE_ABLATIONS)
        drop(ablated, *rest)
        resources.close("engine")
        if options.offline:
            attribute(of_first(options.offline, cases), lambda case: HF, *rest, OFFLINE)
            resources.close("hf")
        facts = {"model": Path(resources.model_path).name, **environment(resources)}
        return summarise(some, cases, options, work, facts) | {"wide": widely(cases, WIDE, work)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faithfulness.own_answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder of a model; by default SmolLM2-135M-Instruct")
    add("--preset", choices=sorted(PRESETS), default="full")
    add("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    add("--wide", type=int, help="right answers of each task, for the cheapest methods")
    add("--examples", type=int, help="of them for all cheap methods")
    add("--trained", type=int, help="of them to learn weights of heads from")
    add("--left-out", type=int, help="of them for leave-one-out")
    add("--ablated", type=int, help="of them for ContextCite, LDS and drops")
    add("--offline", type=int, help="of them for methods in Hugging Face transformers; 0 for none")
    add("--sentences", type=int, default=12, help="of each context")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--seed", type=int, default=0)
    add("--json", type=Path, required=True)
    add("--figure", type=Path, help="PNG of quality against seconds")
    options = parser.parse_args(arguments)
    for key, value in PRESETS[options.preset].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    from vllm_flashtrace.base.process import end_engine_with_this_process
    from vllm_flashtrace.models import prepare_smollm2
    from vllm_flashtrace.offline.engine import engine_log

    end_engine_with_this_process()
    console = Console(width=None if sys.stdout.isatty() else 140)
    resources = OwnResources(options.model or prepare_smollm2(), options.dtype, options.seed)
    with engine_log(), closing(resources):
        result = run(options, resources, console)
    print(tables(result))
    options.json.write_text(as_text(result), encoding="utf-8")
    if options.figure is not None:
        draw(result, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
