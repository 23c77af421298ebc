"""The one vLLM engine that traces, and that scores perturbed prompts.

It is an ordinary engine of the product, compiled and with prefix caching. A log-probability counts
only if its row was computed for this very request: a row from the prefix cache has none.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_flashtrace import FlashTrace

_THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"
KV_CACHE_BYTES = 1 << 30
BLOCK_SIZE = 32
"""Tokens per KV block: the smallest that vLLM's CPU attention likes."""


class EngineResource:
    """A running engine and what the benchmark does with it.

    Attributes:
        ft: The product's offline class, whose ``llm`` is the engine.
        scorer: Log-probabilities of responses.
        pad_token_id: The token that stands for removed text.
    """

    def __init__(
        self,
        model_path: str | Path,
        dtype: str = "float32",
        max_model_len: int = 8192,
        **engine_args: Any,
    ) -> None:
        """Starts the engine.

        Args:
            model_path: Folder of the explained model.
            dtype: Of weights, activations and KV cache.
            max_model_len: Tokens of the longest sequence that is to be traced or scored.
            **engine_args: Further arguments of ``vllm.LLM``; they override those set here.
        """
        use_all_cores()
        arguments: dict[str, Any] = {
            "dtype": dtype,
            # A request ends with one token that nobody reads, and it needs a place.
            "max_model_len": max_model_len + 1,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "block_size": BLOCK_SIZE,
            "disable_log_stats": True,
            **engine_args,
        }
        self.ft = FlashTrace(str(model_path), **arguments)
        self.scorer = EngineScorer(self.ft.llm)
        tokenizer = self.ft.llm.get_tokenizer()
        pad = tokenizer.pad_token_id
        self.pad_token_id = int(tokenizer.eos_token_id if pad is None else pad)

    def close(self) -> None:
        """Stops the engine; closing again does nothing."""
        self.ft.close()


def use_all_cores() -> None:
    """Gives the engine's worker every core of this process; vLLM keeps one back otherwise."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ.setdefault(_THREADS_BIND, cores)


_KEPT_RESULTS = 1 << 16


class EngineScorer:
    """Log-probabilities of fixed responses, on a ``vllm.LLM`` with prefix caching.

    Each sequence makes two requests. The first is its prompt alone, in whole KV blocks, and no more
    than a plain prefill. The second is all of it with ``prompt_logprobs``, right behind the first
    so that it finds those blocks: vLLM runs the output layer on every row of such a request, and
    now that is the response and less than a block before it. Sequences go in the order of their
    tokens, in which each shares the longest possible prefix with its neighbour.
    """

    def __init__(self, llm: Any) -> None:
        """Takes an engine."""
        self._llm = llm
        self._block_size = int(llm.llm_engine.vllm_config.cache_config.block_size)
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self.evaluated = 0
        """Sequences that the engine has evaluated; others were known."""

    def response_logprobs(
        self, token_ids: list[list[int]], response_lengths: list[int]
    ) -> list[float]:
        """Log-probability (nats) of the last ``response_lengths[i]`` tokens of each sequence.

        Sequences that are known cost nothing.

        Raises:
            ValueError: A response is empty, or has no token before it.
            RuntimeError: The engine gave no number, or one that is not finite.
        """
        jobs = list(zip(map(tuple, token_ids), response_lengths, strict=True))
        for tokens, response in jobs:
            if not 0 < response < len(tokens):
                raise ValueError(f"a response of {response} tokens in a sequence of {len(tokens)}")
        keys = [_key(tokens, response) for tokens, response in jobs]
        new = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        found |= self._evaluate(new)
        for key, value in found.items():
            self._known[key] = value
            self._known.move_to_end(key)
        while len(self._known) > _KEPT_RESULTS:
            self._known.popitem(last=False)
        return [found[key] for key in keys]

    def forget(self) -> None:
        """Evaluates every sequence again, and anew: for timing. The prefix cache is emptied."""
        self._known.clear()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine did not empty its prefix cache")

    def _evaluate(self, jobs: dict[bytes, tuple[tuple[int, ...], int]]) -> dict[bytes, float]:
        if not jobs:
            return {}
        ordered = sorted(jobs, key=lambda key: jobs[key][0])
        outputs = self._run([jobs[key] for key in ordered], read_cache=True)
        again = [
            i
            for i, key in enumerate(ordered)
            # The row before the response predicts its first token.
            if (outputs[i].num_cached_tokens or 0) > len(jobs[key][0]) - jobs[key][1] - 1
        ]
        if again:
            repeated = self._run([jobs[ordered[i]] for i in again], read_cache=False)
            for i, output in zip(again, repeated, strict=True):
                outputs[i] = output
        self.evaluated += len(ordered)
        return {
            key: _response_sum(output, *jobs[key])
            for key, output in zip(ordered, outputs, strict=True)
        }

    def _run(self, jobs: Sequence[tuple[tuple[int, ...], int]], *, read_cache: bool) -> list[Any]:
        """Outputs of the requests that carry log-probabilities, in the order of ``jobs``."""
        from vllm import SamplingParams, TokensPrompt

        plain = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        scored = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=0,
            flat_logprobs=True,
            skip_reading_prefix_cache=not read_cache,
        )
        prompts, params, wanted = [], [], []
        for tokens, response in jobs:
            # The last row of the prompt predicts the response, so it must not be cached.
            ahead = (len(tokens) - response - 1) // self._block_size * self._block_size
            if read_cache and ahead:
                prompts.append(TokensPrompt(prompt_token_ids=list(tokens[:ahead])))
                params.append(plain)
            wanted.append(len(prompts))
            prompts.append(TokensPrompt(prompt_token_ids=list(tokens)))
            params.append(scored)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [outputs[i] for i in wanted]


def _key(tokens: tuple[int, ...], response: int) -> bytes:
    return hashlib.blake2b(array("q", (response, *tokens)).tobytes(), digest_size=16).digest()


def _response_sum(output: Any, tokens: tuple[int, ...], response: int) -> float:
    """The sum over the response's rows of a finished request.

    Raises:
        RuntimeError: A row is missing, is another token's, or is not a number.
    """
    first = len(tokens) - response
    if output.prompt_logprobs is None or len(output.prompt_logprobs) != len(tokens):
        raise RuntimeError(f"the engine gave no log-probabilities for {len(tokens)} tokens")
    if (output.num_cached_tokens or 0) >= first:
        raise RuntimeError("rows of the response came from the prefix cache")
    values = []
    for position in range(first, len(tokens)):
        found = output.prompt_logprobs[position].get(tokens[position])
        if found is None or not math.isfinite(found.logprob):
            raise RuntimeError(f"no log-probability at token {position}, got {found}")
        values.append(found.logprob)
    return math.fsum(values)
