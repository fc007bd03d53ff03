"""Runs as small as they can be: their config, and whether two of them left the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdense.config import Config, loads
from vitdense.engine import train as train_module
from vitdense.engine.run import Run

Make = Callable[..., Config]

VIT = """
  backbone:
    name: timm
    model: vit_tiny_patch16_224
    img_size: 32
    patch_size: 8
    options: {depth: 1, embed_dim: 16, num_heads: 2}
  neck: {name: simple_feature_pyramid, channels: 16}
"""
SEGMENTATION = f"""
model: {VIT}
  head: {{name: linear, norm: layer}}
data:
  dataset: {{name: shapes, task: semantic, images: 12, size: 32}}
  root: ROOT
  transforms: {{name: segmentation, size: 32, crop: 32}}
  workers: 0
train: {{steps: 4, batch_size: 2, ema: 0.9, evaluations: 2, pictures: 2}}
optimizer: {{lr: 1e-3}}
output: OUT
device: cpu
"""


def small_config(root: Path, output: Path, overrides: tuple[str, ...], text: str) -> Config:
    """A template above, its data set `shapes` in `root`, its run in `output`."""
    text = text.replace("ROOT", str(root)).replace("OUT", str(output))
    return loads(text, "test.yaml", overrides)


def train_until_killed(config: Config, step: int, patch: pytest.MonkeyPatch) -> None:
    """Train, and die in the step after `step` ones."""
    original = train_module.step

    def dying(run: Run, batches: Any) -> None:
        if run.step == step:
            raise MemoryError
        original(run, batches)

    with patch.context() as patched:
        patched.setattr(train_module, "step", dying)
        with pytest.raises(MemoryError):
            train_module.train(config)


def assert_same(ours: Any, theirs: Any, where: str = "state") -> None:
    """Bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where
