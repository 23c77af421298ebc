"""The last step: final files from the store of finished rows.

Invariant: a final file appears whole or not at all, rows are in input order, and doing the step
again gives the same bytes. The store is deleted only after the manifest says that they are there.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_flashtrace.scale.batch.outcome import Outcome
from vllm_flashtrace.scale.batch.parts import FinishedRows
from vllm_flashtrace.scale.batch.results import make_table, result_schema, table_rows
from vllm_flashtrace.scale.batch.store import (
    ERRORS,
    OUTPUT,
    PARTS,
    RESULTS,
    Manifest,
    OutputFolderError,
    replacing,
)

_ROW_GROUP = 512


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows of the whole input by what became of them."""

    rows: int
    errors: int
    failed_traces: int


def finish(folder: Path, manifest: Manifest, finished: FinishedRows) -> Totals:
    """Writes ``output.jsonl``, ``errors.jsonl`` and ``results.parquet``; drops the store.

    Args:
        folder: The output folder.
        manifest: The run's.
        finished: Every row of the input.
    """
    import pyarrow.parquet as pq

    fingerprint = manifest.fingerprint
    rows = errors = failed = 0
    pending: list[dict[str, Any]] = []
    with ExitStack() as stack:
        drafts = [stack.enter_context(replacing(folder / n)) for n in (OUTPUT, ERRORS, RESULTS)]
        files = [stack.enter_context(draft.open("w", encoding="ascii")) for draft in drafts[:2]]
        writer = stack.enter_context(pq.ParquetWriter(drafts[2], result_schema()))
        for _, record in finished.records():
            outcome = Outcome.from_json(record)
            is_error = outcome.error is not None
            files[is_error].write(json.dumps(outcome.to_batch_record(fingerprint)) + "\n")
            table = table_rows(outcome)
            rows, errors = rows + 1, errors + is_error
            failed += any(row["status"] in ("failed", "skipped") for row in table)
            pending += table
            if len(pending) >= _ROW_GROUP:
                writer.write_table(make_table(pending))
                pending = []
        if pending:
            writer.write_table(make_table(pending))
    replace(manifest, finished=True).write(folder)
    drop_store(folder)
    return Totals(rows, errors, failed)


def drop_store(folder: Path) -> None:
    """Deletes the store of a finished run.

    Raises:
        OutputFolderError: A final file is missing.
    """
    for name in (OUTPUT, ERRORS, RESULTS):
        if not (folder / name).exists():
            raise OutputFolderError(f"the run in {folder} had finished, but {name} is gone")
    if (folder / PARTS).exists():
        shutil.rmtree(folder / PARTS)
