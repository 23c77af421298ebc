from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion
from openai.types.responses import Response
from rich.console import Console

from vllm_flashtrace import Attribution, TraceError
from vllm_flashtrace.api.attribution import MassBalance
from vllm_flashtrace.api.terminal import render_terminal

WORDS = ["<s>", "The", " code", " is", " 73", "06", ".", " Code", "?"]
SCORES = [0.2, 0.0, 0.05, 0.05, 0.15, 0.25, 0.0, 0.1, 0.0]


def flashtrace(**extra: Any) -> dict[str, Any]:
    """One message after a template token, with a score for every token."""
    rows: list[dict[str, Any]] = []
    position = 0
    for index, (word, score) in enumerate(zip(WORDS, SCORES, strict=True)):
        row = {"index": index, "token": word, "token_id": 10 + index, "score": score}
        if index:
            row |= {"message": 0, "start": position, "end": position + len(word)}
            position += len(word)
        rows.append(row)
    data: dict[str, Any] = {
        "id": "ft-7",
        "object": "flashtrace.attribution",
        "status": "completed",
        "target": {"text": "7306", "tokens": [[2, 4]]},
        "scores": rows,
        "prompt_tokens": len(rows),
        "remaining_mass": 0.1,
        "hops": [
            {"hop": 0, "input_mass": 0.6, "reasoning_mass": 0.4, "target_mass": 0.0},
            {"hop": 1, "input_mass": 0.5, "reasoning_mass": 0.25, "target_mass": 0.125},
        ],
    }
    return data | extra


def failed(status: str = "failed") -> dict[str, Any]:
    error = {"code": "target_not_found", "message": "no 'x' in the generated text"}
    return {"id": "ft-8", "object": "flashtrace.attribution", "status": status, "error": error}


def chat_response(*choices: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": i, "finish_reason": "stop", **c} for i, c in enumerate(choices)],
    }


def chat_choice(content: str, **message: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content, **message}, "logprobs": None}


def output_text(text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": "m",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }


class TestFromResponse:
    def test_openai_chat_choice(self) -> None:
        raw = chat_response({**chat_choice("It is 7306."), "flashtrace": flashtrace()})
        answer = ChatCompletion.model_validate(raw)
        attribution = Attribution.from_response(answer.choices[0])
        assert (attribution.id, attribution.text) == ("ft-7", "It is 7306.")
        assert attribution.top(1)[0].token == "06"

    def test_accumulated_stream_keeps_it_in_the_message(self) -> None:
        raw = chat_response(chat_choice("It is 7306.", flashtrace=flashtrace()))
        choice = ChatCompletion.model_validate(raw).choices[0]
        assert Attribution.from_response(choice).text == "It is 7306."
        assert Attribution.from_response(choice.message).text == "It is 7306."

    def test_completion_choice(self) -> None:
        choice = {"index": 0, "text": " 7306", "finish_reason": "stop", "flashtrace": flashtrace()}
        raw = {"id": "c", "object": "text_completion", "created": 0, "model": "m"}
        answer = Completion.model_validate(raw | {"choices": [choice | {"logprobs": None}]})
        assert Attribution.from_response(answer.choices[0]).text == " 7306"
        assert Attribution.from_response(answer).text == " 7306"

    def test_responses_item_and_whole_response(self) -> None:
        reasoning = {"type": "reasoning", "id": "r", "summary": []}
        item = {**output_text("It is 7306."), "flashtrace": flashtrace()}
        raw = {
            "id": "r",
            "object": "response",
            "created_at": 0,
            "model": "m",
            "output": [reasoning, item],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        response = Response.model_validate(raw)
        assert Attribution.from_response(response).text == "It is 7306."
        assert Attribution.from_response(response.output[1]).text == "It is 7306."

    @pytest.mark.parametrize(
        "shape",
        [
            lambda ft: ft,
            lambda ft: {"delta": {"flashtrace": ft}},
            lambda ft: {"flashtrace": ft, "content": None},
            lambda ft: {"choices": [{"delta": {"flashtrace": ft}}]},
        ],
        ids=["itself", "streamed-choice", "delta", "chunk"],
    )
    def test_plain_dicts(self, shape: Any) -> None:
        attribution = Attribution.from_response(shape(flashtrace()))
        assert attribution.id == "ft-7"
        assert attribution.text is None

    def test_several_choices_are_not_guessed_between(self) -> None:
        choice = {**chat_choice("a"), "flashtrace": flashtrace()}
        with pytest.raises(ValueError, match="2 attributions"):
            Attribution.from_response(chat_response(choice, choice))

    @pytest.mark.parametrize(
        "nothing", [chat_response(chat_choice("hi")), {}, {"flashtrace": None}]
    )
    def test_without_an_attribution(self, nothing: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="no attribution"):
            Attribution.from_response(nothing)

    def test_something_else_entirely(self) -> None:
        with pytest.raises(ValueError, match="in a int"):
            Attribution.from_response(3)

    def test_object_without_a_status(self) -> None:
        with pytest.raises(ValueError, match="status"):
            Attribution({"scores": []})


class TestReading:
    def test_top_is_sorted_and_ties_are_in_prompt_order(self) -> None:
        top = Attribution(flashtrace()).top(6)
        assert [score.index for score in top] == [5, 0, 4, 7, 2, 3]
        assert Attribution(flashtrace()).top(0) == []
        assert len(Attribution(flashtrace()).top(100)) == len(WORDS)

    def test_top_refuses_a_negative_number(self) -> None:
        with pytest.raises(ValueError, match="-1"):
            Attribution(flashtrace()).top(-1)

    def test_share_of_a_span_counts_overlapping_tokens_in_full(self) -> None:
        attribution = Attribution(flashtrace())
        assert attribution.share(11, 16) == pytest.approx(0.4 / 0.8)
        assert attribution.share(15, 16) == pytest.approx(0.25 / 0.8)
        assert attribution.share(13, 15) == pytest.approx(0.4 / 0.8)
        assert attribution.share_of_text("is 7306") == pytest.approx(0.45 / 0.8)

    @pytest.mark.parametrize(
        "span", [(3, 3), (5, 2), (-1, 4), (900, 901)], ids=["empty", "reversed", "below", "beyond"]
    )
    def test_share_refuses_spans_that_cover_nothing(self, span: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=r"span|covers"):
            Attribution(flashtrace()).share(*span)

    def test_share_refuses_another_message(self) -> None:
        with pytest.raises(ValueError, match="message 1"):
            Attribution(flashtrace()).share(0, 3, message=1)

    @pytest.mark.parametrize("text", ["", "absent", "ode"], ids=["empty", "absent", "twice"])
    def test_share_of_text_wants_one_occurrence(self, text: str) -> None:
        with pytest.raises(ValueError, match="not once"):
            Attribution(flashtrace()).share_of_text(text)

    def test_share_refuses_incomplete_scores(self) -> None:
        data = flashtrace()
        data["scores"] = data["scores"][4:6]
        attribution = Attribution(data)
        assert not attribution.is_complete
        with pytest.raises(ValueError, match="top_k"):
            attribution.share(0, 3)

    def test_plain_prompt_tokens_count_as_message_0(self) -> None:
        data = flashtrace()
        for row in data["scores"]:
            row.pop("message", None)
        assert Attribution(data).share(11, 16) == pytest.approx(0.5)

    def test_input_mass_is_the_sum_of_the_scores(self) -> None:
        attribution = Attribution(flashtrace())
        assert attribution.input_mass == pytest.approx(sum(SCORES))
        assert attribution.mass.input == pytest.approx(sum(SCORES))
        assert attribution.remaining_mass == pytest.approx(attribution.mass.reasoning)

    @given(st.lists(st.tuples(*[st.floats(0, 1)] * 4).filter(lambda p: sum(p) > 1e-6), min_size=1))
    def test_mass_balance_adds_up(self, hops: list[tuple[float, ...]]) -> None:
        names = ("input_mass", "reasoning_mass", "target_mass", "skipped_mass")
        rows = [dict(zip(names, (p / sum(row) for p in row), strict=True)) for row in hops]
        mass = MassBalance.from_hops(rows)
        parts = (mass.input, mass.reasoning, mass.target, mass.skipped)
        assert math.isclose(sum(parts), 1.0, abs_tol=1e-9)
        assert all(part >= 0.0 for part in parts)
        assert mass.reasoning == pytest.approx(math.prod(row["reasoning_mass"] for row in rows))

    @pytest.mark.parametrize("status", ["failed", "skipped"])
    def test_scores_of_a_trace_without_result_raise(self, status: str) -> None:
        attribution = Attribution(failed(status), text="It is 7306.")
        assert (attribution.status, attribution.text) == (status, "It is 7306.")
        assert attribution.error == failed()["error"]
        for read in (lambda: attribution.scores, lambda: attribution.share(0, 1)):
            with pytest.raises(TraceError, match="no 'x'") as caught:
                read()
            assert caught.value.code == "target_not_found"

    def test_queued(self) -> None:
        attribution = Attribution({"id": "ft-9", "status": "queued"})
        assert attribution.error is None
        with pytest.raises(TraceError, match="ft-9 is queued"):
            attribution.scores  # noqa: B018

    @pytest.mark.parametrize(
        ("data", "reasons"),
        [
            (failed("failed"), ("failed", "target_not_found", "no 'x' in the generated text")),
            (failed("skipped"), ("skipped", "target_not_found", "no 'x' in the generated text")),
            ({"id": "ft-9", "status": "queued"}, ("queued",)),
        ],
    )
    def test_without_result_top_is_empty_and_every_display_says_why(
        self, data: dict[str, Any], reasons: tuple[str, ...]
    ) -> None:
        attribution = Attribution(data, text="")
        assert attribution.top() == attribution.top(0) == []
        with pytest.raises(ValueError, match="-1"):
            attribution.top(-1)
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(render_terminal(attribution))
        html = unescape(attribution.to_html())
        for shown in (repr(attribution), str(attribution), console.export_text(), html):
            assert all(reason in shown for reason in reasons)

    def test_top_of_a_result_without_scores_is_empty(self) -> None:
        attribution = Attribution(flashtrace(scores=[]))
        assert attribution.top() == []
        assert "7306" in repr(attribution)
        assert "7306" in attribution.to_html()

    def test_keys_of_another_version_are_kept(self) -> None:
        data = flashtrace(new={"deep": [1]}, status="completed")
        data["scores"][1] |= {"part": 2, "new": "x"}
        data["hops"][0]["new"] = 1
        attribution = Attribution(data)
        assert attribution.scores[1].part == 2
        assert attribution.scores[1].model_extra == {"new": "x"}
        assert attribution.hops[0]["new"] == 1
        assert attribution.to_dict() == data
        assert attribution.auto_stopped is None
        assert Attribution(flashtrace(auto_stopped="max_hops")).auto_stopped == "max_hops"

    def test_a_score_is_a_record(self) -> None:
        first, second = Attribution(flashtrace()).scores[:2]
        assert first != second
        assert len({first, second, first}) == 2
        with pytest.raises(ValueError, match="frozen"):
            first.score = 1.0  # type: ignore[misc]

    def test_reading_a_response_loads_neither_torch_nor_vllm(self) -> None:
        program = (
            "import json, sys\n"
            "from vllm_flashtrace import Attribution\n"
            "attribution = Attribution.from_response(json.loads(sys.stdin.read()))\n"
            "attribution.top(), attribution.to_html(), repr(attribution)\n"
            "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(chat_response({**chat_choice("7306"), "flashtrace": flashtrace()})),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "[]\n"

    def test_the_data_is_not_shared_with_the_caller(self) -> None:
        data = flashtrace()
        attribution = Attribution(data)
        attribution.to_dict()["scores"].clear()
        data["scores"].clear()
        assert len(attribution.scores) == len(WORDS)


class TestWriting:
    def test_json_round_trip(self, tmp_path: Path) -> None:
        attribution = Attribution(flashtrace(tokens=WORDS), text="Der Schlüssel: 7306 ✓")
        document = attribution.to_json(tmp_path / "a.json")
        assert (tmp_path / "a.json").read_text("utf-8") == document
        again = Attribution.from_response(json.loads(document))
        assert again.to_dict() == attribution.to_dict()
        assert again.text == "Der Schlüssel: 7306 ✓"

    def test_lone_surrogates_can_be_written(self, tmp_path: Path) -> None:
        attribution = Attribution(flashtrace(), text="half \ud83d")
        attribution.to_json(tmp_path / "a.json")
        attribution.to_html(tmp_path / "a.html")
        assert json.loads((tmp_path / "a.json").read_text("utf-8"))["text"] == "half \ud83d"

    def test_html(self, tmp_path: Path) -> None:
        attribution = Attribution(flashtrace(), text="It is 7306.")
        page = attribution.to_html(tmp_path / "a.html")
        assert (tmp_path / "a.html").read_text("utf-8") == page
        assert page.startswith("<!DOCTYPE html>")
        assert "<html" not in attribution._repr_html_()

    def test_repr_is_one_line(self) -> None:
        shown = repr(Attribution(flashtrace()))
        assert "'7306'" in shown
        assert "'06' 0.250" in shown
        assert "target_not_found" in repr(Attribution(failed()))
        assert "\n" not in shown
