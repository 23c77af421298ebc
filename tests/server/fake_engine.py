"""A stand-in for vLLM's engine: everything above ``EngineClient`` in these tests is the real code.

It answers generations with scripted text and trace requests with made-up but well-formed scores.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.input_processor import InputProcessor

from vllm_flashtrace.trace.wire import (
    ModelPart,
    ScoreSpec,
    WireReport,
    sealed_spec,
    tensor_bytes,
    unseal,
)


@dataclass
class Call:
    """One ``generate`` call as the engine saw it."""

    prompt: Any
    params: Any
    request_id: str
    kwargs: dict[str, Any]
    finished: bool = False
    aborted: bool = False

    @property
    def is_trace(self) -> bool:
        return sealed_spec(self.params.extra_args) is not None


@dataclass
class FakeEngine:
    """Scripted ``EngineClient``.

    Attributes:
        answers: Text generated for choice ``i`` is ``answers[i % len(answers)]``.
        trace_gate: Trace requests wait for it.
        fail_after: Tokens after which a streamed generation raises, or None.
        before_step: Awaited with the index of each step of a streamed generation, if set.
        refusal: What the workers report about the model.
        status: What else the workers report.
        trace_scores: Makes the scores of a trace from its length.
        layers: Layers that share the scores of a trace.
        log_prob: The log-probability of each token scored in a text, or what the worker answers.
    """

    vllm_config: Any
    answers: list[str] = field(default_factory=lambda: ["The code is 4821."])
    refusal: str | None = None
    status: dict[str, Any] = field(default_factory=dict)
    trace_scores: Callable[[int], torch.Tensor] = torch.ones
    layers: int = 2
    traced: tuple[int, ...] = ()
    log_prob: Callable[[str], float | WireReport] = field(default=lambda _: -1.0)
    fail_after: int | None = None
    before_step: Callable[[int], Awaitable[None]] | None = None
    calls: list[Call] = field(default_factory=list)
    errored = False
    is_running = True
    dead_error = RuntimeError("engine is dead")

    def __post_init__(self) -> None:
        self.model_config = self.vllm_config.model_config
        self.renderer = renderer_from_config(self.vllm_config)
        self.input_processor = InputProcessor(self.vllm_config, self.renderer)
        self.trace_gate = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        """Back to the defaults, between tests."""
        self.answers = ["The code is 4821."]
        self.fail_after = None
        self.before_step = None
        self.trace_scores = torch.ones
        self.layers, self.traced = 2, ()
        self.log_prob = lambda _: -1.0
        self.calls.clear()
        self.trace_gate = asyncio.Event()
        self.trace_gate.set()
        self._reports: dict[str, bytes] = {}

    @property
    def generations(self) -> list[Call]:
        return [call for call in self.calls if not call.is_trace]

    @property
    def traces(self) -> list[Call]:
        return [call for call in self.calls if call.is_trace]

    def get_tokenizer(self) -> Any:
        return self.renderer.tokenizer

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        return None

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[bytes]:
        if method == "flashtrace_status":
            return [msgspec.msgpack.encode({"refusal": self.refusal, **self.status})]
        assert method == "flashtrace_collect"
        missing = WireReport(status="missing").encode()
        return [self._reports.pop(args[0], missing)]

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        call = Call(prompt, sampling_params, request_id, kwargs)
        self.calls.append(call)
        outputs = self._trace(call) if call.is_trace else self._complete(call)
        try:
            async for output in outputs:
                yield output
            call.finished = True
        finally:
            call.aborted = not call.finished

    async def _trace(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        await self.trace_gate.wait()
        spec = unseal(call.params.extra_args["flashtrace"])
        assert len(call.prompt["prompt_token_ids"]) == spec.length
        if isinstance(spec, ScoreSpec):
            self._score(call, spec)
            yield _request_output(call, [_choice(0, "", [0], "length")], True)
            return
        scores = self.trace_scores(spec.length)
        attention, heads = b"", 0
        layers = len(self.traced) or self.layers
        if spec.attention:
            heads = self.model_config.get_num_attention_heads(self.vllm_config.parallel_config)
            sums = (scores / scores.sum()).expand(layers, heads, -1)
            attention = tensor_bytes(sums, torch.float16)
        self._reports[spec.nonce] = WireReport(
            status="completed",
            scores=tensor_bytes(scores.expand(len(spec.targets), -1)),
            hops=(1,) * len(spec.targets),
            layer_scores=tensor_bytes(scores.expand(layers, -1) / layers) if spec.layers else b"",
            num_layers=layers if spec.layers else 0,
            attention=attention,
            num_heads=heads,
            part=ModelPart(0, self.layers, self.layers, 1, self.traced),
            recomputed_tokens=spec.length - spec.first_target,
            cached_tokens=spec.first_target,
            seconds={"prefill": 0.1, "recording": 0.02, "proximity": 0.03},
            changes=tensor_bytes(torch.tensor([[1.0, 4.0]] * len(spec.targets)), torch.float64)
            if self.traced
            else b"",
        ).encode()
        yield _request_output(call, [_choice(0, "", [0], "length")], True)

    def _score(self, call: Call, spec: ScoreSpec) -> None:
        text = self.get_tokenizer().decode(call.prompt["prompt_token_ids"])
        positions = spec.scored_positions()
        scored = self.log_prob(text)
        if isinstance(scored, WireReport):
            self._reports[spec.nonce] = scored.encode()
            return
        self._reports[spec.nonce] = WireReport(
            status="completed",
            log_probs=tensor_bytes(torch.full((len(positions),), scored)),
            recomputed_tokens=spec.length - spec.first_row,
            cached_tokens=spec.first_row,
        ).encode()

    async def _complete(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        count = call.params.n
        scripts = [self._script(i, call.params) for i in range(count)]
        if call.params.output_kind == RequestOutputKind.FINAL_ONLY:
            yield _request_output(
                call,
                [
                    _choice(i, "".join(t for _, t in s), [k for k, _ in s], reason)
                    for i, (s, reason) in enumerate(scripts)
                ],
                True,
            )
            return
        longest = max(len(script) for script, _ in scripts)
        for step in range(longest):
            if self.before_step is not None:
                await self.before_step(step)
            if step == self.fail_after:
                raise RuntimeError("the engine broke")
            for i, (script, reason) in enumerate(scripts):
                if step < len(script):
                    token, text = script[step]
                    last = step == len(script) - 1
                    choice = _choice(i, text, [token], reason if last else None)
                    finished = last and i == count - 1
                    yield _request_output(call, [choice], finished)
                    await asyncio.sleep(0)

    def _script(self, index: int, params: Any) -> tuple[list[tuple[int, str]], str]:
        """(token, visible text) pairs; a stop string's tokens are kept, its text is not."""
        tokenizer = self.renderer.tokenizer
        text = self.answers[index % len(self.answers)]
        ids = tokenizer.encode(text, add_special_tokens=False)[: params.max_tokens]
        pieces = [tokenizer.decode([token]) for token in ids]
        for stop in params.stop or []:
            cut = "".join(pieces).find(stop)
            if cut >= 0:
                return _cut(ids, pieces, cut, cut + len(stop)), "stop"
        pairs = list(zip(ids, pieces, strict=True))
        if len(pairs) == params.max_tokens:
            return pairs, "length"
        return [*pairs, (tokenizer.eos_token_id, "")], "stop"


def _cut(ids: list[int], pieces: list[str], end: int, stop_end: int) -> list[tuple[int, str]]:
    kept, at = [], 0
    for token, piece in zip(ids, pieces, strict=True):
        if at >= stop_end:
            break
        kept.append((token, piece[: max(0, end - at)]))
        at += len(piece)
    return kept


def _choice(index: int, text: str, ids: list[int], reason: str | None) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=ids,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=reason,
    )


def _request_output(call: Call, choices: list[CompletionOutput], finished: bool) -> RequestOutput:
    return RequestOutput(
        request_id=call.request_id,
        prompt=None,
        prompt_token_ids=list(call.prompt["prompt_token_ids"]),
        prompt_logprobs=None,
        outputs=choices,
        finished=finished,
    )
