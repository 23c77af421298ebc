"""The plan of a trace: which tokens are prefilled, explained and followed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.generated import ParsedOutput
from vllm_flashtrace.text.plan import plan_targets, plan_trace

QUESTION = [{"role": "user", "content": "The secret code is 4821. Which code is it?"}]
TURNS = [
    {"role": "user", "content": "Which code is it?"},
    {"role": "assistant", "content": "The secret code"},
    {"role": "user", "content": "Answer step by step"},
]
THOUGHT = "<think>step by step</think>The code is 4821."


def parse(**options):
    """A request on the paper's defaults, which skip and shift nothing."""
    return parse_flashtrace_field({"preset": "paper", **options}, RequestLimits())


@pytest.fixture
def plan(byte_level, render):
    """Plans a completion; ``settings`` are `plan_trace`'s own."""

    def run(completion, settings=None, **options):
        arguments = {"render": render, **(settings or {})}
        return plan_trace(parse(**options), completion, byte_level, **arguments)

    return run


def texts(plan, positions):
    return "".join(
        plan.generated.full.token(p - plan.prompt_length)
        if p >= plan.prompt_length
        else plan.prompt.token(p)
        for p in positions
    )


def followed(plan):
    """Positions that the recursion follows, read from what it asks for after an even hop 0."""
    plan.recursion.next_weights()
    plan.recursion.add(torch.ones(len(plan.token_ids)))
    weights = plan.recursion.next_weights()
    return [] if weights is None else weights.positions.tolist()


def refusal(plan, *arguments, **options):
    with pytest.raises(TraceError) as error:
        plan(*arguments, **options)
    return error.value


def test_tokens_end_with_the_last_target_position(plan, chat):
    completion = chat(QUESTION, "The code is 4821. The cat sat.")
    found = plan(completion, target={"text": "4821"})
    assert found.token_ids == completion.token_ids[: found.target.last + 1]
    assert found.prompt_length == len(completion.prompt_token_ids)
    assert texts(found, found.target.positions.tolist()).strip() == "4821"
    assert len(found.input_mask) == len(found.token_ids)
    assert len(found.generated) == len(completion.generated_token_ids)


def test_default_explains_the_answer_and_follows_the_reasoning(plan, chat):
    found = plan(chat(QUESTION, THOUGHT))
    assert texts(found, found.target.positions.tolist()) == "The code is 4821."
    assert found.target_text == "The code is 4821."
    assert texts(found, followed(found)) == "step by step"


def test_spans_count_generated_tokens(plan, chat):
    found = plan(chat(QUESTION, "The cat sat"), target={"tokens": [[0, 1], [2, 3]]})
    assert found.target_spans == [(0, 1), (2, 3)]
    assert found.target.spans == [
        (found.prompt_length, found.prompt_length + 1),
        (found.prompt_length + 2, found.prompt_length + 3),
    ]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ({"text": "482"}, "482"),
        ({"regex": r"code is (\d\d)"}, "48"),
        ("generated", THOUGHT),
        ({"weights": {"0": 0.5}}, None),
    ],
)
def test_target_text_is_what_was_asked_for(plan, chat, target, text):
    found = plan(chat(QUESTION, THOUGHT), target=target)
    assert found.target_text == (found.generated.full.token(0) if text is None else text)


def test_nothing_set_apart_follows_what_leads_up_to_the_target(plan, chat):
    found = plan(chat(QUESTION, "The cat sat, so 4821."), target={"text": "4821"})
    before = texts(found, followed(found))
    assert before.startswith("The cat sat,")
    assert "4821" not in before


def test_output_without_reasoning_follows_nothing(plan, chat):
    found = plan(chat(QUESTION, "The cat sat."))
    assert followed(found) == []
    assert found.recursion.result().remaining_mass == 0


@pytest.mark.parametrize("empty", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_empty_thinking_block_leaves_the_answer_to_follow(plan, chat, empty):
    found = plan(chat(QUESTION, f"{empty}The cat sat, so 4821."), target={"text": "4821"})
    assert texts(found, followed(found)).startswith("The cat")


def test_parser_without_finding_leaves_the_answer_to_follow(plan, chat):
    completion = chat(QUESTION, "The cat sat, so 4821.")
    settings = {"reasoning_parser": lambda text, ids: ParsedOutput()}
    found = plan(completion, settings, target={"text": "4821"})
    assert texts(found, followed(found)).startswith("The cat sat")


def test_reasoning_none_follows_nothing(plan, chat):
    found = plan(chat(QUESTION, THOUGHT), reasoning="none", target={"text": "4821"})
    assert followed(found) == []


def test_reasoning_behind_the_target_is_dropped(plan, chat):
    completion = chat(QUESTION, "<think>step one, step two</think>The code")
    found = plan(completion, target={"text": "one"})
    last = max(followed(found))
    assert last <= found.target.last
    assert "two" not in texts(found, followed(found))


def test_reasoning_that_is_explained_is_still_followed(plan, chat):
    found = plan(chat(QUESTION, THOUGHT), target="generated")
    assert texts(found, followed(found)) == "step by step"


def test_recursion_over_everything_generated(plan, chat):
    completion = chat(QUESTION, THOUGHT)
    length = len(completion.generated_token_ids)
    found = plan(completion, recurse_over="generated", target={"tokens": [[0, length]]})
    first = found.prompt_length
    assert followed(found) == list(range(first, first + length - 1))  # without the final EOS


def test_stop_text_is_not_followed(plan, chat):
    completion = chat(QUESTION, "The cat STOP", text="The cat", eos=False)
    length = len(completion.generated_token_ids)
    found = plan(completion, recurse_over="generated", target={"tokens": [[0, length]]})
    assert texts(found, followed(found)).rstrip() == "The cat"


def test_recursion_over_earlier_assistant_turns(plan, chat):
    found = plan(chat(TURNS, "The code is 4821."), recurse_over="assistant")
    positions = followed(found)
    prompt = [p for p in positions if p < found.prompt_length]
    assert texts(found, prompt) == "The secret code"
    assert texts(found, [p for p in positions if p >= found.prompt_length]) == "The code is 4821."
    assert not found.input_mask[positions].any()


def test_assistant_turn_that_cannot_be_located_is_refused(plan, chat):
    turns = [TURNS[0], {"role": "assistant", "content": "user"}, TURNS[2]]
    completion = chat(turns, "The code")
    error = refusal(plan, completion, {"render": None}, recurse_over="assistant")
    assert error.code == "assistant_not_located"
    assert "message 1" in error.message
    assert plan(completion, recurse_over="assistant").prompt_map.unlocated == frozenset()


def test_plain_prompt_has_no_assistant_turns(plan, byte_level):
    completion = Completion(
        byte_level.encode("The code is"), byte_level.encode(" 4821"), " 4821", "The code is"
    )
    positions = followed(plan(completion, recurse_over="assistant"))
    assert positions
    assert min(positions) >= 3


def test_skipped_tokens_are_neither_explained_nor_credited(plan, chat):
    found = plan(chat(QUESTION, "The code, 4821."), skip_tokens="punctuation")
    explained = texts(found, found.recursion.next_weights().positions.tolist())
    assert "," not in explained
    assert "4821" in explained
    dots = [i for i in range(found.prompt_length) if found.prompt.token(i).strip() in ("", ".")]
    assert dots
    assert not found.input_mask[dots].any()


def test_target_of_skipped_tokens_only_is_refused(plan, chat):
    completion = chat(QUESTION, "The code, 4821.")
    error = refusal(plan, completion, target={"text": ","}, skip_tokens=[","])
    assert error.code == "empty_target"
    assert "skip_tokens" in error.message


def test_target_of_punctuation_only_is_explained(plan, chat):
    completion = chat(QUESTION, "The code, 4821.")
    found = plan(completion, target={"text": ","}, skip_tokens="punctuation")
    assert texts(found, found.recursion.next_weights().positions.tolist()) == ","
    inside = [i for i in range(found.prompt_length) if found.prompt.token(i).strip() in ("", ".")]
    assert inside and not found.input_mask[inside].any()


def test_nothing_generated_is_refused(plan, chat):
    completion = dataclasses.replace(chat(QUESTION, "x"), generated_token_ids=[], text="")
    assert refusal(plan, completion).code == "empty_completion"


def test_only_thoughts_have_no_output(plan, chat):
    assert refusal(plan, chat(QUESTION, "<think>step by step")).code == "empty_target"


def test_target_beyond_the_context_is_dropped_and_counted(plan, chat):
    completion = chat(QUESTION, "The code is 4821.", eos=False)
    whole = plan(completion)
    limit = whole.target.last  # one token too few
    found = plan(completion, {"max_trace_tokens": limit})
    assert len(found.token_ids) == limit
    assert found.dropped_target_tokens == 1
    assert whole.dropped_target_tokens == 0
    assert whole.target_text == found.target_text + texts(whole, [whole.target.last])
    assert plan(completion, {"max_trace_tokens": limit + 1}).token_ids == whole.token_ids


def test_a_row_that_chose_the_last_token_of_the_context_is_within_it(plan, chat):
    completion = chat(QUESTION, "The code is 4821.", eos=False)
    last = plan(completion).target.last
    limit = {"max_trace_tokens": last}
    found = plan(completion, limit, rows="predicting")
    assert (found.dropped_target_tokens, found.target.last) == (0, last)
    assert int(found.recursion.next_weights().last) == last - 1
    assert plan(completion, limit, rows="predicting", verify=1).dropped_target_tokens == 1
    less = {"max_trace_tokens": last - 1}
    assert plan(completion, less, rows="predicting").dropped_target_tokens == 1


@pytest.mark.parametrize("answer", ["?!", "?! ..."])
def test_an_answer_of_punctuation_is_explained_in_parts_too(chat, byte_level, render, answer):
    request = parse(targets="sentences", skip_tokens="punctuation")
    found = plan_targets(request, chat(QUESTION, answer), byte_level, render=render)
    assert found and all(part.recursion.next_weights() is not None for part in found)
    with pytest.raises(TraceError, match="no token of the answer"):
        request = parse(targets="sentences", skip_tokens=["?!", "...", "?", "!", "."])
        plan_targets(request, chat(QUESTION, answer), byte_level, render=render)
    words = chat(QUESTION, f"{answer} The code is 4821.")
    whole = plan_targets(parse(targets="sentences", skip_tokens="punctuation"), words, byte_level)
    assert all("code" in part.target_text for part in whole)


def test_context_that_ends_before_the_target_is_refused(plan, chat):
    completion = chat(QUESTION, "The code is 4821.")
    settings = {"max_trace_tokens": len(completion.prompt_token_ids)}
    assert refusal(plan, completion, settings).code == "target_beyond_context"


def test_number_of_hops(plan, chat):
    def run(found):
        hops = 0
        while found.recursion.next_weights() is not None:
            found.recursion.add(torch.ones(len(found.token_ids)))
            hops += 1
        return hops

    completion = chat(QUESTION, THOUGHT)
    assert run(plan(completion, hops=0)) == 1
    assert run(plan(completion, hops=3)) == 4
    assert run(plan(completion, {"auto_threshold": 1.0}, hops="auto")) == 1
    assert run(plan(completion, {"auto_threshold": 0.0, "max_hops": 5}, hops="auto")) == 6


def test_tags_hidden_from_the_client_are_found(byte_level, plan):
    """Tags that are special tokens do not show in the client's text."""
    byte_level = type(byte_level)(tokenizer_object=byte_level.backend_tokenizer)
    byte_level.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = byte_level.encode(THOUGHT + "<|im_end|>", add_special_tokens=False)
    assert len(byte_level.encode("<think>", add_special_tokens=False)) == 1
    shown = byte_level.decode(ids, skip_special_tokens=True)
    assert shown == "step by stepThe code is 4821."
    completion = Completion(byte_level.encode("Which code?"), ids, shown)
    found = plan_trace(parse(), completion, byte_level)
    assert texts(found, found.target.positions.tolist()) == "The code is 4821."
    assert texts(found, followed(found)) == "step by step"
    everything = plan_trace(parse(target="generated"), completion, byte_level)
    assert everything.target_text == shown


def test_tag_that_repeats_the_end_of_the_prompt_is_no_reasoning(plan, byte_level):
    generated = "<think>step by step</think>4821"
    completion = Completion(
        byte_level.encode("Which code? <think>\n"), byte_level.encode(generated), generated
    )
    found = plan(completion)
    assert texts(found, followed(found)) == "step by step"


def test_weight_of_zero_beyond_the_text_is_refused(plan, chat):
    error = refusal(plan, chat(QUESTION, "The code"), target={"weights": {"0": 1, "99": 0}})
    assert error.code == "span_out_of_range"
