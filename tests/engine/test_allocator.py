"""Memory that is freed and asked for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from vitdense.engine.allocator import keep_memory

PROGRAM = """
import resource, sys, torch
from vitdense.engine.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory(torch.device("cpu"))
for _ in range(10):
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    """64 MB are 16,000 pages."""
    freed, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, how], capture_output=True, check=True
            ).stdout
        )
        for how in ("free", "keep")
    )
    assert kept < 1000 < freed


def test_other_devices_and_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not keep_memory(torch.device("cuda"))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_memory(torch.device("cpu"))
