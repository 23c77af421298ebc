"""Pure parts of the serving and soak benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import httpx
import pytest

from benchmarks.existing_text import ExistingTexts
from benchmarks.load_client import (
    Request,
    RequestFailedError,
    Timing,
    arrival_times,
    is_traced,
    random_prompts,
    read_answer,
    run_load,
)
from benchmarks.load_stats import Block, latencies, percentile, percentiles_ms, token_gaps
from benchmarks.serving_rounds import trace_field
from benchmarks.serving_rows import pair_ratios
from benchmarks.soak_report import draw, slope

FIELD = {"target": "output"}
COMPLETED = {"status": "completed", "hops": [{}, {}]}


def event(data):
    return "data: " + json.dumps(data, separators=(",", ":"))


def chunk(**choice):
    return event({"choices": [{"index": 0, "finish_reason": None, **choice}]})


def usage(count):
    return event({"choices": [], "usage": {"completion_tokens": count}})


def stream(*lines):
    return [(10.0 + i, line) for i, line in enumerate([*lines, "data: [DONE]"])]


FIRST, LAST = chunk(text="a"), chunk(text="b", finish_reason="length")


def test_plain_answer():
    timing = read_answer(Request([1], 2), 9.0, stream(FIRST, LAST, usage(2)))
    assert timing == Timing(False, 9.0, (10.0, 11.0), 13.0, None, None, 2)


def test_traced_answer():
    events = stream(FIRST, LAST, chunk(text="", flashtrace=COMPLETED), usage(2))
    timing = read_answer(Request([1], 2, FIELD), 9.0, events)
    assert timing.tokens == (10.0, 11.0)
    assert timing.attributed == 12.0
    assert timing.attribution == COMPLETED


@pytest.mark.parametrize(
    ("field", "lines", "reason"),
    [
        (None, [FIRST, LAST, usage(3)], "3 tokens instead of 2"),
        (None, [FIRST, chunk(text="b", finish_reason="stop"), usage(2)], "'stop'"),
        (None, ['data: {"error": {"message": "dead"}}'], "dead"),
        (None, [FIRST, LAST, chunk(text="", flashtrace=COMPLETED), usage(2)], "nobody asked"),
        (FIELD, [FIRST, LAST, usage(2)], "no completed attribution"),
        (
            FIELD,
            [FIRST, LAST, chunk(text="", flashtrace={"status": "failed"}), usage(2)],
            "no completed attribution",
        ),
    ],
)
def test_answers_that_fail(field, lines, reason):
    with pytest.raises(RequestFailedError, match=reason):
        read_answer(Request([1], 2, field), 9.0, stream(*lines))


def test_a_stream_without_its_end_fails():
    with pytest.raises(RequestFailedError, match="ended early"):
        read_answer(Request([1], 2), 9.0, stream(FIRST)[:-1])


@pytest.mark.parametrize(("share", "traced"), [(0.0, 0), (0.1, 5), (0.5, 24), (1.0, 48)])
def test_traced_requests_are_spread_evenly(share, traced):
    chosen = [is_traced(i, share) for i in range(48)]
    assert sum(chosen) == traced
    halves = sum(chosen[:24]), sum(chosen[24:])
    assert abs(halves[0] - halves[1]) <= 1


def test_prompts_are_seeded_and_share_no_block():
    first, again = random_prompts((0, "a"), 8, 32), random_prompts((0, "a"), 8, 32)
    other = random_prompts((0, "b"), 8, 32)
    assert first == again
    assert len({tuple(prompt[:8]) for prompt in first + other}) == 16


def test_arrivals_are_a_seeded_process_of_the_given_rate():
    times = arrival_times(3, 2.0, 4000)
    assert times == arrival_times(3, 2.0, 4000)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.1)


def test_trace_fields_are_valid_for_every_length():
    from vllm_flashtrace.api.request import (
        RequestLimits,
        check_against_limit,
        parse_flashtrace_field,
    )

    for target in ("output", "two-hop"):
        for length in (2, 8, 256):
            request = parse_flashtrace_field(trace_field(target, length), RequestLimits())
            check_against_limit(request, length)
    assert trace_field("two-hop", 256)["target"] == {"tokens": [[216, 256]]}


def test_percentiles():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0
    assert percentiles_ms([]) is None
    assert percentiles_ms([0.001, 0.001]) == {"p50": 1.0, "p95": 1.0, "p99": 1.0}


def timing(traced, sent, *tokens, after=0.0):
    return Timing(
        traced, sent, tokens, tokens[-1] + after, tokens[-1] + after if traced else None, None, 2
    )


def test_latencies_of_traced_and_untraced_requests():
    timings = [timing(False, 0.0, 1.0, 1.5), timing(True, 0.0, 2.0, 2.25, after=4.0)]
    assert token_gaps(timings) == [0.5, 0.25]
    found = latencies(timings)
    assert found["untraced_itl_ms"]["p99"] == 500
    assert found["traced_itl_ms"]["p99"] == 250
    assert found["traced_e2e_ms"]["p50"] == 6250
    assert found["attribution_ms"]["p50"] == 4000
    plain = latencies(timings[:1])
    assert plain["untraced_itl_ms"] is plain["traced_e2e_ms"] is plain["attribution_ms"] is None


def test_ratios_are_taken_round_by_round():
    stock = [Block.of([timing(False, 0.0, 1.0, s)]) for s in (2.0, 4.0)]
    ours = [Block.of([timing(False, 0.0, 1.0, s)]) for s in (4.0, 4.0)]
    blocks = {"stock": stock, "plugin": ours}
    assert pair_ratios("plugin", blocks, lambda b: b.tokens_per_second) == [0.5, 1.0]


ROWS = [
    {"traces": t, "server_mb": 100.0, "engine_mb": 50.0 + 0.02 * t, "worker_mb": 9.0 * (t < 100)}
    for t in range(0, 501, 50)
]


@pytest.mark.parametrize(("role", "per_100"), [("server", 0.0), ("engine", 2.0), ("worker", 0.0)])
def test_slope_after_warm_up(role, per_100):
    fitted = slope(ROWS, role, 100)
    assert fitted.per_100 == pytest.approx(per_100, abs=1e-9)
    assert fitted.stderr == pytest.approx(0, abs=1e-9)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "soak.png"
    slopes = {role: slope(ROWS, role, 100) for role in ("server", "engine", "worker")}
    draw(ROWS, slopes, 100, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def attribute(status, code=200):
    bodies = []

    async def run():
        over = asyncio.Event()

        def answer(request):
            bodies.append(json.loads(request.content))
            if len(bodies) == 3:
                over.set()
            return httpx.Response(code, json={"status": status})

        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await texts.attribute_until(over, client)

    texts = ExistingTexts(5, 7, {"hops": 0}, "seed")
    asyncio.run(run())
    return texts, bodies


def test_existing_texts_are_new_and_attributed_until_the_load_is_over():
    texts, bodies = attribute("completed")
    assert len(texts.seconds) == len(bodies) == 3
    assert {(len(b["prompt"]), len(b["completion"])) for b in bodies} == {(5, 7)}
    assert len({tuple(b["prompt"]) for b in bodies}) == 3


@pytest.mark.parametrize(("status", "code"), [("failed", 200), ("completed", 500)])
def test_an_existing_text_that_is_not_attributed_fails(status, code):
    with pytest.raises(RequestFailedError, match="no attribution"):
        attribute(status, code)


class FakeServer:
    """Streams two tokens per request, then waits before the end; counts who left early."""

    def __init__(self):
        self.in_flight = self.most_in_flight = self.left = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self):
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        async with server:
            await self._stop.wait()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if body["prompt"] == [0]:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad")
        else:
            try:
                await self._stream(reader, writer)
            except ConnectionError:
                self.left += 1
        self.in_flight -= 1
        writer.close()

    async def _stream(self, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        writer.write(f"{FIRST}\n\n{LAST}\n\n".encode())
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), timeout=0.3)
            raise ConnectionResetError("the client closed its end")
        writer.write(f"{usage(2)}\n\ndata: [DONE]\n\n".encode())
        await writer.drain()


def test_closed_loop_keeps_its_concurrency():
    with FakeServer() as server:
        answers = run_load(
            server.url, [Request([1], 2)] * 6, concurrency=3, stagger=0.01, limit_seconds=20
        )
        assert server.most_in_flight == 3
    assert [answer.output_tokens for answer in answers] == [2] * 6


def test_open_loop_sends_at_its_times():
    with FakeServer() as server:
        answers = run_load(
            server.url, [Request([1], 2)] * 3, arrivals=[0.0, 0.3, 0.6], limit_seconds=20
        )
    sent = [answer.sent - answers[0].sent for answer in answers]
    assert sent == pytest.approx([0.0, 0.3, 0.6], abs=0.15)


def test_clients_that_leave():
    with FakeServer() as server:
        requests = [
            Request([1], 2, leave_after_events=1),
            Request([1], 2, leave_after_finish=0.0),
            Request([1], 2),
        ]
        answers = run_load(server.url, requests, concurrency=3, limit_seconds=20)
        assert server.left == 2
    assert answers[:2] == [None, None]
    assert answers[2].output_tokens == 2


def test_a_refused_request_ends_the_load():
    with FakeServer() as server, pytest.raises(RequestFailedError, match="HTTP 400: bad"):
        run_load(server.url, [Request([1], 2), Request([0], 2)], concurrency=2, limit_seconds=20)


def test_the_limit_ends_the_load():
    with FakeServer() as server, pytest.raises(TimeoutError):
        run_load(server.url, [Request([1], 2)] * 9, concurrency=1, limit_seconds=0.5)
