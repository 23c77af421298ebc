"""A stand-in for the replica: answers at once, or takes its process with it.

Every worker that Ray starts imports this module, so it imports no more than it needs.
"""

from __future__ import annotations

import json
import os
from typing import Any

from vllm_flashtrace.scale.batch.batch_replica import ReplicaError
from vllm_flashtrace.scale.batch.results import Outcome

POISON, REFUSE = "poison", "refuse"
SCORES = [
    {
        "index": 1,
        "token": "a\ud800",
        "token_id": 7,
        "score": 0.5,
        "message": 0,
        "start": 0,
        "end": 1,
    },
    {"index": 4, "token": "<|im_end|>", "token_id": 2, "score": 0.25},
]
ATTRIBUTION = {
    "id": "ft-1",
    "object": "flashtrace.attribution",
    "status": "completed",
    "target": {"text": "no", "tokens": [[0, 1]]},
    "scores": SCORES,
    "prompt_tokens": 5,
    "input_mass": 0.8,
    "remaining_mass": 0.1,
    "target_mass": 0.1,
    "skipped_mass": 0.0,
    "hops": [
        {"hop": 0, "input_mass": 0.8, "reasoning_mass": 0.1, "target_mass": 0.1, "skipped_mass": 0}
    ],
}


def chat(*attributions: Any) -> dict[str, Any]:
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": f"no {i}"},
            "finish_reason": "stop",
            **({} if attribution is None else {"flashtrace": attribution}),
        }
        for i, attribution in enumerate(attributions)
    ]
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }


class StandIn:
    """Takes what :class:`~vllm_flashtrace.scale.batch.batch_replica.Replica` takes."""

    def __init__(self, settings: Any) -> None:
        if settings.model == REFUSE:
            raise ReplicaError("the engine did not start: no such model")

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        outcomes = [self._answer(row) for row in batch.to_pylist()]
        return pa.table({"row": batch.column("row"), "outcome": pa.array(outcomes)})

    def _answer(self, row: dict[str, Any]) -> str:
        place = row["custom_id"], row["source"], row["line"]
        if row["error"] is not None:
            return Outcome(*place, error=json.loads(row["error"])).to_json()
        if json.loads(row["body"]).get("prompt") == POISON:
            os._exit(1)
        return Outcome.answered(*place, 200, chat(ATTRIBUTION)).to_json()
