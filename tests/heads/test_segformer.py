"""SegFormer's head: fused at each level's own size, it equals the published concatenation."""

from __future__ import annotations

import torch
from torch import Tensor

from vitdense.heads.segmentation.segformer import SegFormerHead
from vitdense.layers.resize import resize
from vitdense.structures import IGNORE, Level, Target

LEVELS = [Level(8, 4), Level(12, 8), Level(16, 16), Level(20, 32)]


def maps(height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            2, level.channels, int(height // level.stride), int(width // level.stride),
            generator=generator, dtype=torch.float64,
        )
        for level in LEVELS
    ]  # fmt: skip


def test_equals_the_concatenation_of_resized_levels() -> None:
    head = SegFormerHead(LEVELS, 5, channels=16).double().eval()
    features = maps(64, 96)
    inputs = zip(head.inputs, features, strict=True)
    levels = [resize(project(map_), (16, 24)) for project, map_ in inputs]
    expected = head.classifier(head.fuse(torch.cat(levels, dim=1)))
    torch.testing.assert_close(head(features).logits, expected, atol=1e-12, rtol=0)


def test_one_image_trains_everything() -> None:
    head = SegFormerHead(LEVELS, 5, channels=16, norm="group").double()
    labels = torch.randint(5, (1, 32, 32))
    labels[:, :8] = IGNORE
    outputs = head([map_[:1] for map_ in maps(32, 32)])
    sum(head.loss(outputs, [Target(semantic=labels[0])]).values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
