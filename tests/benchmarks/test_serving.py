"""The load client against a server of its own, and the serving family's figures and tables."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from benchmarks import batch_runs, deploy_runs, serving, soak, tables
from benchmarks.load import Answer, ask, is_chosen, random_prompt, send_all, two_hops
from benchmarks.mixed_load import MixedRequest, make_request, tally
from benchmarks.report import RESULTS
from benchmarks.serving import Block, Completion, RequestFailedError, Timing, Variant


def chunk(**choice: Any) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]})


USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 2}}'
FIRST, LAST = chunk(text="a"), chunk(text="b", finish_reason="length")
TRACE = chunk(text="", flashtrace={"status": "completed", "hops": [{}, {}]})
FAILED = chunk(text="", flashtrace={"status": "failed"})


def answer(*lines: str, end: str = "data: [DONE]") -> Answer:
    found = [(10.0 + i, f"{line}\n\n".encode()) for i, line in enumerate([*lines, end])]
    return Answer(9.0, 20.0, 200, chunks=found)


def timing(*tokens: float, traced: bool = False, after: float = 0.0) -> Timing:
    attributed = tokens[-1] + after if traced else None
    return Timing(traced, 0.0, tokens, tokens[-1] + after, attributed, 2)


def test_answers_are_timed_and_checked() -> None:
    assert Timing.of(Completion([1], 2), answer(FIRST, LAST, USAGE)) == Timing(
        False, 9.0, (10.0, 11.0), 13.0, None, 2
    )
    traced = Timing.of(Completion([1], 2, True), answer(FIRST, LAST, TRACE, USAGE))
    assert (traced.tokens, traced.attributed) == ((10.0, 11.0), 12.0)


@pytest.mark.parametrize(
    ("traced", "lines", "reason"),
    [
        (False, [FIRST, chunk(text="b", finish_reason="stop"), USAGE], "'stop'"),
        (False, ['data: {"error": {"message": "dead"}}'], "dead"),
        (False, [FIRST, LAST, TRACE, USAGE], "traced: False"),
        (True, [FIRST, LAST, USAGE], "traced: True; got None"),
        (True, [FIRST, LAST, FAILED, USAGE], "failed"),
    ],
)
def test_answers_that_fail(traced: bool, lines: list[str], reason: str) -> None:
    with pytest.raises(RequestFailedError, match=reason):
        Timing.of(Completion([1], 2, traced), answer(*lines))


def test_a_stream_without_its_end_fails() -> None:
    with pytest.raises(RequestFailedError, match="200"):
        Timing.of(Completion([1], 2), answer(FIRST, end=LAST))


def test_the_client_keeps_its_concurrency_leaves_and_notes_what_breaks() -> None:
    in_flight, most = 0, 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        try:
            prompt = json.loads(request.content)["prompt"]
            await asyncio.sleep(30 if prompt == [2] else 0.01)
            if prompt == [3]:
                raise httpx.ReadError("gone")
            return httpx.Response(200, text=f"{FIRST}\n\n{LAST}\n")
        finally:
            in_flight -= 1

    async def run() -> list[Answer]:
        transport = httpx.MockTransport(serve)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            left = await ask(http, Completion([2], 2, stay_seconds=0.05))
            return [left, *await send_all(http, [Completion([p], 2) for p in (1, 3, 1, 1, 1)], 3)]

    left, good, broken, *_ = asyncio.run(run())
    assert left.left and left.status is None and most == 3
    assert [line for _, line in good.lines()] == [FIRST, LAST]
    assert broken.problem == "ReadError: gone"


def test_traced_requests_are_spread_evenly_and_prompts_share_nothing() -> None:
    for share, count in ((0.0, 0), (0.1, 5), (0.5, 24), (1.0, 48)):
        assert sum(is_chosen(i, share) for i in range(48)) == count
    prompts = {tuple(random_prompt(seed, 8)) for seed in (1, 1, 2, (1, 2))}
    assert len(prompts) == 3
    assert two_hops(256)["target"] == {"tokens": [[216, 256]]}


def test_figures_compare_blocks_of_one_round() -> None:
    ours = [Block([timing(1.0, 4.0)]), Block([timing(1.0, 2.0), timing(2.0, 2.25, traced=True)])]
    blocks = {"stock": [Block([timing(1.0, 2.0)])] * 2, "plugin": ours}
    row = serving.row("plugin", blocks)
    assert row["pair_ratios"] == pytest.approx([0.5, 2 / 2.25 / (2 / 2) * 2])
    assert row["untraced_itl_ms"]["p50"] == 2000
    assert row["traced_e2e_ms"]["p99"] == 2250
    stock = serving.row("stock", blocks)
    assert stock["untraced_itl_ms"] is stock["traced_e2e_ms"] is stock["attribution_ms"] is None
    assert "| stock | 0.50 |" in tables.serving({"rows": [stock, row]})
    cap = serving.cap_row(Variant("plugin", "1"), blocks)
    assert cap["untraced_longest_gap_ms"] == 3000
    assert "| plugin |" in tables.cap({"cap": [cap]})


def test_quick_options_stand_unless_others_are_given() -> None:
    options = serving.parse(["--quick", "--concurrency", "2"])
    assert (options.requests, options.concurrency, options.eager) == (12, 2, True)


def test_mixed_requests_check_their_answers() -> None:
    assert make_request(3, 1) == make_request(3, 1)
    assert len({make_request(index, 0).kind for index in range(300)}) > 20
    trace = {"object": "flashtrace.attribution", "id": "ft-1", "status": "completed"}
    body = {"choices": [{"index": 0, "finish_reason": "stop", "flashtrace": trace}]}

    def taken(traces: int, text: str) -> MixedRequest:
        request = MixedRequest("chat", {"n": 1}, traces)
        request.take(Answer(0.0, status=200, chunks=[(0.0, text.encode())]))
        return request

    good, missing = taken(1, json.dumps(body)), taken(2, json.dumps(body))
    assert not good.fault and missing.fault == "1 attributions for 2"
    assert taken(0, '{"choices": []}').fault == "the answer is not whole"
    rows = tally([good, missing])
    assert rows[-1] == {"kind": "all", "requests": 2, "completed": 2, "faults": 1}


def test_soak_slopes_and_picture(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    report = json.loads((RESULTS / "soak.json").read_text())
    report["slopes"] = {role: soak.slope(report["rows"], role, 100) for role in soak.ROLES}
    for role, found in report["slopes"].items():
        assert found["per_100"] == pytest.approx(report["slope_mb_per_100"][role])
        assert found["stderr"] == pytest.approx(report["slope_stderr_mb_per_100"][role])
    soak.draw(report, 100, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_batches_are_compared_by_what_counts() -> None:
    def record(score: float, text: str, own: str) -> dict[str, Any]:
        choice = {"text": text, "flashtrace": {"scores": [{"score": score}]}}
        return {"response": {"request_id": own, "body": {"choices": [choice]}}, "error": None}

    one = {"a": record(0.5, "x", "1")}
    assert batch_runs.difference(one, {"a": record(0.25, "x", "2")}) == (0, 0.5)
    assert batch_runs.difference(one, {"a": record(0.5, "y", "2")}) == (1, 0.0)
    assert batch_runs.difference(one, {}) == (1, float("inf"))


def test_deploy_table() -> None:
    load = {"requests": 300, "completed": 298, "failed": {"replica_lost": 2}, "deferred": 50}
    load |= {"failed_elsewhere": 0, "deferred_found": 50, "requests_per_second": 1.9}
    drained = {"of_these_completed": 10, "unfinished_when_it_left": 10}
    table = deploy_runs.table({"killed": {**load, "replacement_seconds": 44.0}, "drained": drained})
    assert "| 300 | 298 | 2 replica_lost | 0 | 50 of 50 | 10 of 10 | 1.90 | 44.0 |" in table
