"""TF32 in attention moves scores by thousandths, float32 does not."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import tf32_attention


def test_only_tf32_moves_the_scores(tmp_path: Path) -> None:
    assert tf32_attention.main(["--tokens", "80", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["family"] for row in rows] == ["qwen3", "llama"]
    for row in rows:
        assert row["float32"] < 1e-5
        assert 1e-4 < row["rounded"] < row["truncated"] < 2e-2
