"""Each semantic head learns two images by heart: loss near zero, mIoU 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead
from vitdense.heads.segmentation.dpt import DPTHead
from vitdense.heads.segmentation.linear import LinearHead
from vitdense.heads.segmentation.smp import SmpHead
from vitdense.heads.segmentation.upernet import UPerNetHead
from vitdense.metrics.miou import MeanIoU
from vitdense.structures import IGNORE, Batch, Frame, Level, Target

SIZE = (32, 64)
LEVELS = [Level(16, 2), Level(16, 4), Level(16, 8), Level(16, 16)]


class Stem(nn.Module):
    """A small convolutional pyramid in place of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
            for width in (3, 16, 16, 16)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return maps[1:]


def generated() -> Batch:
    """Rectangles of three classes in three noisy colours, with an ignored border."""
    torch.manual_seed(0)
    labels = torch.zeros(2, *SIZE, dtype=torch.uint8)
    labels[0, 8:24, 8:28] = 1
    labels[0, 4:20, 40:56] = 2
    labels[1, 16:32, 4:36] = 2
    labels[1, 0:12, 44:64] = 1
    colours = torch.tensor([[40, 60, 80], [200, 60, 60], [60, 60, 220]])
    images = colours[labels.long()].permute(0, 3, 1, 2) + torch.randint(-30, 30, (2, 3, *SIZE))
    labels[:, :, :2] = IGNORE
    return Batch(
        images=images.clamp(0, 255).to(torch.uint8),
        targets=[Target(semantic=label) for label in labels],
        frames=[Frame(SIZE, SIZE, SIZE)] * 2,
        image_ids=[0, 1],
        paths=[Path("0.png"), Path("1.png")],
    )


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (UPerNetHead, {"channels": 16, "aux_channels": 16, "dropout": 0.0}),
        (UPerNetHead, {"channels": 16, "aux_weight": 0.0, "dropout": 0.0, "norm": "group"}),
        (LinearHead, {"dropout": 0.0}),
        (LinearHead, {"dropout": 0.0, "losses": {"cross_entropy": 1.0, "lovasz": 1.0}}),
        (DPTHead, {"channels": 8, "dropout": 0.0, "aux_weight": 0.0}),
        (SmpHead, {"decoder": "unet", "channels": [16, 16, 16, 16]}),
    ],
)
def test_two_images_by_heart(cls: type[SemanticHead], options: dict) -> None:
    batch = generated()
    torch.manual_seed(0)
    stem, head = Stem(), cls(LEVELS, 3, **options)
    parameters = [*stem.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-2)
    images = batch.images / 128 - 1
    for _ in range(300):
        terms = head.loss(head(stem(images)), batch.targets)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    main = sum(term.item() for name, term in terms.items() if not name.startswith("aux_"))
    assert main < 0.02
    metric = MeanIoU(["ground", "red", "blue"])
    with torch.no_grad():
        metric.update(head.eval().predict(head(stem.eval()(images)), batch.frames), batch)
    assert metric.compute()["mIoU"] == 1.0
