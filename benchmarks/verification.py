"""Do falls of the target's log-probability tell sources from other sentences?

Answers whose sources are known (the tasks of ``benchmarks.faithfulness``) are verified with the
bundled model; each sentence that was taken out is a source or not. Prints, for each task, how many
sentences of both kinds have which verdict, and their smallest and largest falls.

    python -m benchmarks.verification [--tasks niah multihop] [--examples 8] [--length 400]
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from benchmarks.faithfulness.example import Example
from benchmarks.faithfulness.tasks import make_examples
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.models.smollm2 import prepare_smollm2

VERDICTS = ("supported", "weak", "unsupported")


def removed(ft: FlashTrace, example: Example, count: int, *, reasoning: bool) -> dict[str, Any]:
    """The verification of one example's output, with or without its reasoning in front."""
    field = {
        "verify": count,
        "skip_tokens": "punctuation",
        "target": {"text": example.output.strip()},
    }
    answer = (example.reasoning if reasoning else "") + example.output
    found = ft.attribute([{"role": "user", "content": example.prompt}], answer, field)
    if found.verification is None or "removed" not in found.verification:
        raise RuntimeError(f"{example.id} was not verified: {found.verification}")
    return found.verification


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["niah", "multihop"])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--verify", type=int, default=6)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4 * options.length}
    with FlashTrace(str(prepare_smollm2()), **engine) as ft:
        tokenizer = ft.llm.get_tokenizer()
        print("| task | reasoning | sentence | supported | weak | unsupported | falls, nats |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
        for task in options.tasks:
            examples = make_examples(
                task, options.length, options.examples, seed=options.seed, tokenizer=tokenizer
            )
            for reasoning in (False, True):
                falls: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
                for example in examples:
                    for one in removed(ft, example, options.verify, reasoning=reasoning)["removed"]:
                        source = any(one["start"] < e and one["end"] > s for s, e in example.gold)
                        falls[source].append((one["log_prob_drop"], one["verdict"]))
                for source, found in falls.items():
                    counts = Counter(verdict for _, verdict in found)
                    numbers = " | ".join(str(counts[verdict]) for verdict in VERDICTS)
                    low, high = (f(drop for drop, _ in found) for f in (min, max))
                    kept, kind = "kept" if reasoning else "none", "source" if source else "other"
                    row = f"{numbers} | {low:.1f} to {high:.1f}"
                    print(f"| {task} | {kept} | {kind} | {row} |", flush=True)


if __name__ == "__main__":
    main()
