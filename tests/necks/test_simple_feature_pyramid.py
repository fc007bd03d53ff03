"""The simple feature pyramid against ViTDet's description."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vitdense.necks.simple_feature_pyramid import SimpleFeaturePyramid
from vitdense.structures import Level


def kinds(stage: nn.Module) -> list[str]:
    return [type(module).__name__ for module in stage]


def test_layers_are_vitdets() -> None:
    neck = SimpleFeaturePyramid([Level(64, 16)], channels=24)
    projection = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    up = "ConvTranspose2d"
    assert [kinds(stage) for stage in neck.stages] == [
        [up, "LayerNorm2d", "GELU", up, *projection],
        [up, *projection],
        projection,
        ["MaxPool2d", *projection],
    ]
    first = neck.stages[0]
    assert [(m.in_channels, m.out_channels) for m in (first[0], first[3], first[4], first[6])] == [
        (64, 32), (32, 16), (16, 24), (24, 24),
    ]  # fmt: skip
    for stage in neck.stages:
        for conv, size in zip(stage[-4::2], (1, 3), strict=True):
            assert conv.bias is None and conv.kernel_size == (size, size)


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5)])
def test_levels_are_what_comes_out(patch: int, grid: tuple[int, int]) -> None:
    neck = SimpleFeaturePyramid([Level(16, patch)] * 4, channels=8)
    assert [level.stride for level in neck.levels] == [patch / 4, patch / 2, patch, patch * 2]
    maps = neck([torch.zeros(2, 16, *grid)] * 4)
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, *(math.ceil(side * patch / level.stride) for side in grid)) for level in neck.levels
    ]


def test_only_the_last_map_is_read() -> None:
    neck = SimpleFeaturePyramid([Level(16, 16)] * 2, channels=8)
    last = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(neck([torch.zeros_like(last), last]), neck([last]))


def test_every_parameter_learns() -> None:
    neck = SimpleFeaturePyramid([Level(16, 16)], channels=8)
    sum(m.square().mean() for m in neck([torch.randn(1, 16, 4, 4)])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


def test_scales_come_finest_first() -> None:
    neck = SimpleFeaturePyramid([Level(16, 16)], channels=8, scales=(1.0, 2.0))
    assert [level.stride for level in neck.levels] == [8, 16]


@pytest.mark.parametrize("scales", [(), (3.0,), (1.0, 1.0)])
def test_other_scales_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="^scales: .*different ones of"):
        SimpleFeaturePyramid([Level(16, 16)], scales=scales)
