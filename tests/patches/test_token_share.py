"""The share of a step that traces may take: its arithmetic, and vLLM's schedulers under it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches.scheduler_share import MIN_CHUNK, TokenShare
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal

BUDGET = 128
SHARE = 32  # a quarter


@settings(deadline=None)
@given(
    share=st.floats(0.001, 1.0),
    budget=st.integers(1, 8192),
    wanted=st.lists(st.integers(1, 9000), min_size=1, max_size=8),
)
def test_grants_stay_within_the_share_and_always_make_progress(
    share: float, budget: int, wanted: list[int]
) -> None:
    tokens = TokenShare(share, budget)
    left = list(wanted)
    for _ in range(sum(wanted) + 1):
        if not left:
            break
        tokens.begin_step(capped=True)
        granted = []
        for want in left:
            had_room = tokens.has_room
            granted.append(tokens.grant(want))
            assert 0 <= granted[-1] <= want
            assert granted[-1] > 0 or not had_room
            assert granted[-1] in (0, want) or granted[-1] >= min(MIN_CHUNK, tokens.size)
        assert sum(granted) <= tokens.size
        assert granted[0] > 0
        left = [want - got for want, got in zip(left, granted, strict=True) if want > got]
    assert not left


def test_an_uncapped_step_grants_everything() -> None:
    tokens = TokenShare(0.1, 100)
    assert [tokens.grant(90), tokens.grant(90), tokens.has_room] == [90, 90, True]
    tokens.begin_step(capped=True)
    assert [tokens.grant(90), tokens.has_room] == [10, False]
    tokens.begin_step(capped=False)
    assert tokens.grant(90) == 90


def test_a_prefill_that_may_not_be_split_is_admitted_whole_and_alone() -> None:
    tokens = TokenShare(0.1, 100, may_split=False)
    tokens.begin_step(capped=True)
    assert tokens.has_room
    assert tokens.grant(70) == 70
    assert not tokens.has_room
    tokens.begin_step(capped=True)
    assert tokens.grant(5) == 5
    assert not tokens.has_room


class Steps:
    """A vLLM scheduler whose model runs nowhere: every finished prefill or decode gives a token."""

    _ids = itertools.count()

    def __init__(self, config: Any, *, blocks: int = 1000, share: float = 0.25) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config.additional_config = {"flashtrace": {"trace_token_share": share}}
        config.cache_config.num_gpu_blocks = blocks
        block_size = config.cache_config.block_size
        spec = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            log_stats=False,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._ahead: list[Any] = []
        self._async = config.scheduler_config.async_scheduling
        self.traces: set[str] = set()

    def add(self, prompt: int, new_tokens: int = 1, *, trace: bool = False) -> str:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        extra = None
        if trace:
            weights = TargetWeights.from_spans([(prompt - 1, prompt)])
            extra = {EXTRA_ARGS_KEY: seal(TraceSpec.create(weights, prompt, exact_fraction=1.0))}
        number = next(self._ids)
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, extra_args=extra)
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=[number * 7 + i for i in range(prompt)],
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._hasher,
        )
        if trace:
            self.traces.add(request.request_id)
        self.scheduler.add_request(request)
        return request.request_id

    def step(self) -> dict[str, int]:
        """Schedules one step; with asynchronous scheduling its outcome comes one step later."""
        output = self.scheduler.schedule()
        self._ahead.append((output, self._sampled(output)))
        while len(self._ahead) > self._async:
            self._finish(*self._ahead.pop(0))
        return dict(output.num_scheduled_tokens)

    def drain(self) -> None:
        while self._ahead:
            self._finish(*self._ahead.pop(0))

    def _sampled(self, output: Any) -> list[str]:
        requests = self.scheduler.requests
        # After schedule(), num_computed_tokens includes this step.
        return [
            req_id
            for req_id in output.num_scheduled_tokens
            if requests[req_id].num_computed_tokens >= requests[req_id].num_tokens
        ]

    def _finish(self, output: Any, sampled: list[str]) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={req_id: i for i, req_id in enumerate(ids)},
                sampled_token_ids=[[5] if req_id in sampled else [] for req_id in ids],
            ),
        )

    def of_traces(self, scheduled: dict[str, int]) -> int:
        return sum(count for req_id, count in scheduled.items() if req_id in self.traces)


@pytest.fixture(scope="module")
def make(smollm2_folder: Path) -> Callable[..., Steps]:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flashtrace import patches

    patches.apply_all()

    def make(*, share: float = 0.25, blocks: int = 1000, **engine: Any) -> Steps:
        options = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": BUDGET}
        args = EngineArgs(model=str(smollm2_folder), **{**options, **engine})
        return Steps(args.create_engine_config(), blocks=blocks, share=share)

    return make


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_decoding_goes_on_beside_a_capped_trace(
    make: Callable[..., Steps], asynchronous: bool
) -> None:
    steps = make(async_scheduling=asynchronous)
    decoding = [steps.add(10, 200) for _ in range(4)]
    for _ in range(2):
        steps.step()
    trace = steps.add(1000, trace=True)
    chunks = []
    while trace in steps.scheduler.requests:
        scheduled = steps.step()
        assert all(scheduled.get(req_id) == 1 for req_id in decoding)
        chunks.append(scheduled.get(trace, 0))
    assert [chunk for chunk in chunks if chunk] == [SHARE] * 31 + [1000 - 31 * SHARE]


def test_a_trace_alone_and_several_alone_are_not_capped(
    make: Callable[..., Steps], asynchronous: bool
) -> None:
    steps = make(async_scheduling=asynchronous)
    first = steps.add(300, trace=True)
    assert steps.step() == {first: BUDGET}
    second = steps.add(20, trace=True)
    assert steps.step() == {first: BUDGET}
    assert steps.step() == {first: 44, second: 20}


def test_waiting_requests_pass_a_trace_that_has_no_share_left(make: Callable[..., Steps]) -> None:
    steps = make()
    traces = [steps.add(500, trace=True) for _ in range(3)]
    prompt = steps.add(90, 2)
    assert steps.step() == {traces[0]: SHARE, prompt: 90}
    assert steps.step() == {traces[0]: SHARE, prompt: 1}
    assert steps.step() == {traces[0]: BUDGET}  # the other one has finished
    late = steps.add(50, 50)
    assert steps.step() == {traces[0]: SHARE, late: 50}
    order = []
    while set(traces) & set(steps.scheduler.requests):
        order += [req_id for req_id in steps.step() if req_id in traces]
    assert list(dict.fromkeys(order)) == traces


def test_traces_share_a_step_but_not_in_slivers(make: Callable[..., Steps]) -> None:
    steps = make()
    steps.add(5, 50)
    steps.step()
    short, long = steps.add(10, trace=True), steps.add(100, trace=True)
    last = steps.add(100, trace=True)
    scheduled = steps.step()
    assert (scheduled[short], scheduled[long], last in scheduled) == (10, SHARE - 10, False)
    rest = 100 - (SHARE - 10)
    while rest > SHARE:
        assert steps.step()[long] == SHARE
        rest -= SHARE
    scheduled = steps.step()
    assert scheduled[long] == rest == 14
    assert scheduled[last] == SHARE - 14


def test_a_share_of_one_token_still_makes_progress(make: Callable[..., Steps]) -> None:
    steps = make(share=0.001)
    steps.add(5, 400)
    trace = steps.add(40, trace=True)
    counts = []
    while trace in steps.scheduler.requests:
        counts.append(steps.step().get(trace, 0))
    assert counts == [1] * 40


def test_a_last_token_with_places_for_drafts_is_not_cut(make: Callable[..., Steps]) -> None:
    """vLLM adds them beside requests that decode, and ends the engine if they are missing."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    steps = make(share=0.001, speculative_config=ngram)
    decoding = steps.add(5, 50)
    steps.step()
    trace = steps.add(1, trace=True)
    assert steps.step() == {decoding: 1, trace: 4}


def test_without_traces_nothing_is_counted(make: Callable[..., Steps]) -> None:
    steps = make()
    prompt = steps.add(300, 2)
    assert steps.scheduler._flashtrace_traces is None
    assert steps.step() == {prompt: BUDGET}
    trace = steps.add(20, trace=True)
    assert steps.scheduler._flashtrace_traces is not None
    steps.scheduler.finish_requests([trace], _aborted())
    steps.step()
    assert steps.scheduler._flashtrace_traces is None


def test_a_fault_schedules_as_stock_and_is_logged_once(
    make: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = make()
    steps.add(5, 50)
    steps.step()

    def broken(*_: Any, **__: Any) -> int:
        raise RuntimeError("injected share")

    with monkeypatch.context() as patch:
        patch.setattr(TokenShare, "grant", broken)
        with caplog.at_level("ERROR", logger="vllm_flashtrace.patches.scheduler_share"):
            first = steps.add(200, trace=True)
            assert steps.step()[first] == BUDGET - 1
            second = steps.add(20, trace=True)
            steps.step()
    # A record is seen twice where the handler is at two loggers, as other tests may leave it.
    assert len({id(r) for r in caplog.records if "injected share" in r.message}) == 1
    assert second not in steps.scheduler.requests
    third = steps.add(200, trace=True)
    assert steps.step()[third] == SHARE


def test_a_prefill_is_not_cut_without_chunked_prefill(make: Callable[..., Steps]) -> None:
    steps = make(
        enable_chunked_prefill=False, max_num_batched_tokens=1024, enable_prefix_caching=False
    )
    decoding = steps.add(5, 50)
    steps.step()
    first, second = steps.add(700, trace=True), steps.add(100, trace=True)
    assert steps.step() == {decoding: 1, first: 700}
    assert steps.step() == {decoding: 1, second: 100}


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_any_mix_ends_within_the_share(
    make: Callable[..., Steps], asynchronous: bool, policy: str, data: st.DataObject
) -> None:
    """Few blocks, so that requests are preempted; arrivals and aborts at any time."""
    steps = make(
        async_scheduling=asynchronous,
        scheduling_policy=policy,
        block_size=16,
        blocks=data.draw(st.integers(44, 80)),
        long_prefill_token_threshold=data.draw(st.sampled_from([0, 20])),
    )
    arrivals = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 12),  # step
                st.booleans(),  # trace
                st.integers(1, 600),  # prompt
                st.integers(1, 150),  # new tokens
                st.integers(0, 30),  # aborted so many steps later; 0 for never
            ),
            max_size=12,
        )
    )
    aborts: dict[int, list[str]] = {}
    for number in itertools.count():
        for step, trace, prompt, new_tokens, abort in arrivals:
            if step == number:
                req_id = steps.add(prompt, 1 if trace else new_tokens, trace=trace)
                if abort:
                    aborts.setdefault(number + abort, []).append(req_id)
        steps.scheduler.finish_requests(aborts.get(number, []), _aborted())
        requests = set(steps.scheduler.requests)
        if not requests and number > 12:
            break
        scheduled = steps.step()
        if requests - steps.traces:
            assert steps.of_traces(scheduled) <= SHARE
        assert number < 2000, "the scheduler makes no progress"
    steps.drain()
    steps.step()
    assert steps.scheduler._flashtrace_traces is None


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED
