"""``vllm-flashtrace batch`` with one replica, in its own process and without Ray.

python -m tests.scale.batch.without_ray INPUT OUTPUT MODEL BATCH_SIZE -- ENGINE_OPTIONS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO

from vllm_flashtrace.scale.batch import run_batch
from vllm_flashtrace.scale.batch.batch_replica import Replica, ReplicaSettings
from vllm_flashtrace.scale.batch.inputs import Defaults
from vllm_flashtrace.scale.batch.run_batch import BatchOptions
from vllm_flashtrace.scale.batch.source import Scan
from vllm_flashtrace.scale.batch.store import FinishedRows, PartsWriter


def answer_here(options: BatchOptions, scan: Scan, finished: FinishedRows, _: TextIO) -> None:
    """What ``run_batch.answer_rows`` does."""
    group = f"without-ray-{os.getpid()}"
    replica = Replica(ReplicaSettings(options.model, options.argv, 0, 1, 1, group))
    try:
        with PartsWriter(finished) as writer:
            for file in run_batch.unfinished(options, scan, finished):
                for rows in file():
                    answers = replica(rows)
                    numbers, texts = answers.column("row"), answers.column("outcome")
                    pairs: Any = zip(numbers.to_pylist(), texts.to_pylist(), strict=True)
                    writer.add([(row, text.encode()) for row, text in pairs])
    finally:
        replica._run(replica._stack.aclose())  # An actor's process ends its engine.


def main() -> None:
    """Runs a batch from its beginning to its end."""
    source, output, model, size, _, *argv = sys.argv[1:]
    run_batch.answer_rows = answer_here
    options = BatchOptions(
        Path(source), Path(output), model, tuple(argv), (1, 1), int(size), Defaults()
    )
    sys.exit(run_batch.run_batch(options))


if __name__ == "__main__":
    main()
