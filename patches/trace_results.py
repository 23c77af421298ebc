"""Sends results of traces to the API server with the outputs of their requests.

What it changes: ``Scheduler.update_from_output`` puts a result that came with the model runner's
output into ``kv_transfer_params`` of the trace request's own output, which vLLM carries to
``RequestOutput`` untouched. Steps without a result cost one comparison. The patches of the runners
add the results to their outputs by `with_results`.

Why here: the way back by ``collective_rpc`` is a barrier. It waits until the engine is between two
steps, and holds up the next one until the worker has answered.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput

from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.patches._check import PatchError, require_keyword, require_parameters
from vllm_flashtrace.trace.pickup import CARRIED_KEY
from vllm_flashtrace.worker.runner import RESULTS_ATTRIBUTE, existing_capture


def check() -> None:
    """Raises PatchError unless the method and the field are as expected."""
    method = getattr(Scheduler, "update_from_output", None)
    name = "Scheduler.update_from_output"
    require_parameters(method, name, "self", "scheduler_output", "model_runner_output")
    if AsyncScheduler.update_from_output is not method:
        raise PatchError("AsyncScheduler.update_from_output is not Scheduler's")
    if "kv_transfer_params" not in EngineCoreOutput.__struct_fields__:
        raise PatchError("EngineCoreOutput has no kv_transfer_params")
    require_keyword(RequestOutput, "RequestOutput", "kv_transfer_params")


def apply() -> None:
    """Wraps the method."""
    stock_update = Scheduler.update_from_output

    @functools.wraps(stock_update)
    def update_from_output(
        self: Scheduler, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = stock_update(self, scheduler_output, model_runner_output, *args, **kwargs)
        results = getattr(model_runner_output, RESULTS_ATTRIBUTE, None)
        if results:
            try:
                add_results(outputs, results)
            except Exception as error:
                log_unexpected("sending the results of traces", error)
        return outputs

    Scheduler.update_from_output = update_from_output


def with_results(stock: Any) -> Any:
    """A model runner's ``sample_tokens`` whose output has the results of requests that have ended.

    Before it log-probabilities are taken, of the state that ``execute_model`` has left for it.
    """

    @functools.wraps(stock)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        capture = existing_capture(self)
        if capture is None:
            return stock(self, *args, **kwargs)
        capture.take_log_probs(self)
        return capture.with_results(stock(self, *args, **kwargs))

    return sample_tokens


def add_results(outputs: dict[int, Any], results: dict[str, bytes]) -> None:
    """Puts results into the outputs of their requests.

    Args:
        outputs: ``EngineCoreOutputs`` of each API server.
        results: Encoded results by request id.
    """
    for for_client in outputs.values():
        for output in for_client.outputs:
            result = results.get(output.request_id)
            if result is not None:
                output.kv_transfer_params = {
                    **(output.kv_transfer_params or {}),
                    CARRIED_KEY: result,
                }
