"""Two processes, and accumulation, give the gradients of one process with one large batch."""

from __future__ import annotations

from pathlib import Path

from tests.engine.worlds import run_world


def test_every_head_learns_the_same_however_its_images_are_spread(tmp_path: Path) -> None:
    run_world("tests.engine.gradients", "compare", tmp_path)
