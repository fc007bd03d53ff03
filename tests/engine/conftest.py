"""A model and its data, as small as they can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.small import SEGMENTATION, Make, small_config
from vitdense.backbones.base import Backbone
from vitdense.config import Config
from vitdense.models.base import Model
from vitdense.structures import Frame, Level, Prediction, Target


class TinyBackbone(Backbone):
    """A patch embedding, a position embedding and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = [Level(8, 4)]
        self.pos_embed = nn.Parameter(torch.randn(1, 8, 1, 1) * 0.02)
        self.gamma = nn.Parameter(torch.ones(2, 8))
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.stem(images) + self.pos_embed
        for block, gain in zip(self.blocks, self.gamma, strict=True):
            maps = maps + gain.view(1, -1, 1, 1) * block(maps).relu()
        return [self.norm(maps)]

    def layer_depths(self) -> dict[str, int]:
        depths = {"pos_embed": 0, "gamma": 0, "stem.weight": 0, "stem.bias": 0}
        depths |= {f"blocks.{i}.{kind}": i + 1 for i in range(2) for kind in ("weight", "bias")}
        return depths | {"norm.weight": 3, "norm.bias": 3}

    def no_weight_decay(self) -> set[str]:
        return {"gamma"}


class TinyModel(Model):
    """A linear classifier of pixels with batch statistics beside it."""

    task = "semantic"

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = TinyBackbone()
        self.divisor = 4
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Tensor:
        return self.head(self.norm(self.backbone(self.normalize(images))[0]))

    def loss(self, outputs: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        truth = torch.stack([target.semantic for target in targets if target.semantic is not None])
        logits = nn.functional.interpolate(outputs, truth.shape[-2:], mode="bilinear")
        loss = nn.functional.cross_entropy(logits, truth.long(), ignore_index=255)
        return {"cross_entropy": loss}

    def predict(self, outputs: Tensor, frames: list[Frame]) -> list[Prediction]:
        maps = [frame.restore_map(logits) for logits, frame in zip(outputs, frames, strict=True)]
        return [Prediction(semantic=logits.argmax(0)) for logits in maps]


@pytest.fixture
def tiny_model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def make(shapes: Path, tmp_path: Path) -> Make:
    """A config of a template, with overrides, that writes to `tmp_path / out`."""

    def make(*overrides: str, text: str = SEGMENTATION, out: str = "run") -> Config:
        return small_config(shapes, tmp_path / out, overrides, text)

    return make
