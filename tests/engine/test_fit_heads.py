"""``vllm-flashtrace fit-heads`` end to end, on an engine that is there."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.test_cli import run
from tests.engine.harness import Engine
from tests.engine.test_scores import log_probs
from tests.oracle import oracle_attention
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.base.records import ScoredText
from vllm_flashtrace.commands import fit_heads
from vllm_flashtrace.text.sentences import sentence_spans
from vllm_flashtrace.trace.heads_file import HeadsFile

CONTEXT = "The lamp is red. Tom has a bike. The lab is cold! It rains. Who has a bike?"
LINES: list[dict[str, Any]] = [
    {"prompt": CONTEXT, "response": " Tom has it, and it is red", "task": "a"},
    {
        "messages": [
            {"role": "system", "content": "Be brief. Be kind."},
            {"role": "user", "content": CONTEXT},
        ],
        "task": "b",
    },
    *(
        {"prompt": f"Item {i} is here. Item {i + 1} is there. Where is {i}?", "task": f"c{i % 3}"}
        for i in range(4)
    ),
    {"prompt": "One sentence alone."},
    {"prompt": "Far too long. " * 2000},
]


@pytest.fixture
def command(tiny: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's words; its engine is the one that is there."""

    @contextmanager
    def command_engine(model: str, **engine_args: Any) -> Iterator[FlashTrace]:
        assert engine_args["dtype"] == "float32"
        yield FlashTrace(llm=tiny.llm)

    monkeypatch.setattr(fit_heads, "command_engine", command_engine)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, LINES)), "utf-8")
    files = {
        "--data": data,
        "--out": tmp_path / "heads.safetensors",
        "--work": tmp_path / "work.jsonl",
        "--json": tmp_path / "report.json",
    }
    words = [word for name, path in files.items() for word in (name, str(path))]
    return ["fit-heads", "--model", "m", "--dtype", "float32", "--max-tokens", "6", *words]


def test_weights_are_learned_and_a_run_goes_on(
    command: list[str],
    tiny: Engine,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*command) == 0
    out = capsys.readouterr().out
    assert "6 of 8 lines, 48 ablations" in out
    assert "1 skipped: too long" in out and "1 skipped: fewer than 2 sentences" in out
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["examples"] == 6 and report["seconds"] > 0
    assert set(report["held_out"]) == {"training", "examples", "learned", "equal", "default"}
    file = HeadsFile.read(tmp_path / "heads.safetensors")
    assert report["bytes"] == (tmp_path / "heads.safetensors").stat().st_size
    file.check_model(file.model.of(tiny.llm.llm_engine.vllm_config), tmp_path)
    check_first_line(tiny, tiny_folder, tmp_path)

    work = tmp_path / "work.jsonl"
    lines = work.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(LINES)
    work.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])  # A kill.
    measured: list[Any] = []
    stock = fit_heads._measured
    monkeypatch.setattr(
        fit_heads, "_measured", lambda *args: (measured.append(args[1]), stock(*args))[1]
    )
    assert run(*command) == 0
    assert [line.prompt for line in measured] == [line["prompt"] for line in LINES[-2:]]
    again = HeadsFile.read(tmp_path / "heads.safetensors")
    assert torch.equal(again.weights, file.weights)
    assert work.read_bytes() == b"".join(lines)
    capsys.readouterr()
    assert run(*command, "--seed", "1") == 2
    assert "of another run (other seed)" in capsys.readouterr().err


def check_first_line(tiny: Engine, folder: Path, tmp_path: Path) -> None:
    """Attention and log-probabilities of what is left, computed without the package's engine."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    row = json.loads((tmp_path / "work.jsonl").read_text("utf-8").splitlines()[1])
    tokenizer = tiny.llm.get_tokenizer()
    encoded = tokenizer(CONTEXT, return_offsets_mapping=True)
    prompt, offsets = encoded["input_ids"], encoded["offset_mapping"]
    response = tokenizer.encode(LINES[0]["response"], add_special_tokens=False)
    starts = torch.tensor([start for start, _ in sentence_spans(CONTEXT)])
    # A token belongs to the sentence of its first character that is no blank.
    firsts = [
        start + len(CONTEXT[start:end]) - len(CONTEXT[start:end].lstrip())
        if CONTEXT[start:end].strip()
        else start
        for start, end in offsets
    ]
    sentence = (torch.searchsorted(starts, torch.tensor(firsts), right=True) - 1).tolist()
    special = [end == start for start, end in offsets]
    sources = [
        [i for i, own in enumerate(sentence) if own == number and not special[i]]
        for number in range(len(starts))
    ]
    rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    sums = oracle_attention(model, [*prompt, *response], list(rows), torch.ones(len(rows)))
    expected = torch.stack([sums[..., tokens].sum(-1) for tokens in sources])
    values = torch.frombuffer(bytearray(base64.b64decode(row["attention"])), dtype=torch.float32)
    assert row["shape"] == list(expected.shape)
    assert float((values.view(row["shape"]) - expected).abs().max()) <= 1e-3  # float16
    assert len(row["kept"]) == len(row["logprobs"]) == 8
    for mask, found in zip(row["kept"], row["logprobs"], strict=True):
        gone = {i for keeps, own in zip(mask, sources, strict=True) if keeps == "0" for i in own}
        left = [token for i, token in enumerate(prompt) if i not in gone]
        text = ScoredText([*left, *response], list(range(len(left), len(left) + len(response))))
        assert found == pytest.approx(float(log_probs(model, text).sum()), abs=1e-3)
