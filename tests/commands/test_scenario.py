from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vllm_flashtrace.commands.demo import ANSWER, FACT, FILLER, QUESTION, build_scenario
from vllm_flashtrace.models import prepare_smollm2


@given(st.integers(0, 40), st.floats(0.0, 1.0))
def test_the_span_is_the_fact_and_the_answer_occurs_nowhere_else(
    repeats: int, depth: float
) -> None:
    scenario = build_scenario(repeats, depth)
    content = scenario.messages[-1]["content"]
    assert content[scenario.fact_start : scenario.fact_end] == scenario.fact == FACT
    assert content.count(ANSWER) == 1 and ANSWER in FACT
    assert content.count(FILLER) == repeats
    assert content.endswith(QUESTION)


def test_depth_moves_the_fact() -> None:
    starts = [build_scenario(20, depth).fact_start for depth in (0.0, 0.5, 1.0)]
    assert starts == [0, 10 * (len(FILLER) + 1), 20 * (len(FILLER) + 1)]


@pytest.mark.parametrize(("repeats", "depth"), [(-1, 0.5), (3, -0.1), (3, 1.1)])
def test_impossible_places_are_refused(repeats: int, depth: float) -> None:
    with pytest.raises(ValueError, match="need repeats"):
        build_scenario(repeats, depth)


def test_the_fact_is_a_small_part_of_a_long_prompt() -> None:
    tokenizer = Tokenizer.from_file(str(prepare_smollm2() / "tokenizer.json"))
    scenario = build_scenario()
    encoding = tokenizer.encode(scenario.messages[-1]["content"], add_special_tokens=False)
    in_fact = [s < scenario.fact_end and e > scenario.fact_start for s, e in encoding.offsets]
    assert len(in_fact) >= 300
    assert sum(in_fact) / len(in_fact) < 0.06
