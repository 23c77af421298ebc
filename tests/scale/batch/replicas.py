"""A stand-in for the replica: answers at once, or takes its process with it."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.scale.batch.test_results import ATTRIBUTION, chat
from vllm_flashtrace.scale.batch.batch_replica import ReplicaError
from vllm_flashtrace.scale.batch.results import Outcome

POISON, REFUSE = "poison", "refuse"


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
