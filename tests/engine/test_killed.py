"""benchmarks/faults.py in short: killed and resumed equals left alone, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and kills")


def run(folder: Path, *words: str) -> dict[str, dict]:
    out = folder / "faults.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--out", str(out), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert out.exists(), done.stdout + done.stderr
    found: dict[str, dict] = json.loads(out.read_text())["variants"]
    for row in found.values():
        assert row["differences"] == []
    assert done.returncode == 0
    return found


def test_three_kills(tmp_path: Path) -> None:
    moments = ("writing", "evaluated", "in_step")
    found = run(
        tmp_path,
        *("--kills", "3", "--steps", "9", "--evaluations", "2"),
        *("--variants", "alone", "--moments", *moments),
    )
    assert found["alone"]["moments"] == dict.fromkeys(moments, 1)


@pytest.mark.slow
def test_many_kills_of_every_variant(tmp_path: Path) -> None:
    found = run(tmp_path, "--kills", "11", "--steps", "40")
    assert set(found) == {"alone", "2 workers", "accumulate 2", "2 processes"}
    for row in found.values():
        assert row["kills"] == sum(row["moments"].values()) - row["moments"].get("told", 0) == 11
