"""The multilevel neck against mmsegmentation's description."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdense.necks.multilevel import MultiLevelNeck
from vitdense.structures import Level
from vitdense.testing import check_neck

PLAIN = [Level(12, 16)] * 4
SCALES = (4, 2, 1, 0.5)


def test_levels_are_convolved_resized_and_convolved() -> None:
    neck = MultiLevelNeck(PLAIN, channels=8)
    state = neck.state_dict()
    maps = [torch.randn(2, 12, 4, 6) for _ in PLAIN]
    for index, (found, map_, scale) in enumerate(zip(neck(maps), maps, SCALES, strict=True)):
        weight, bias = state[f"laterals.{index}.0.weight"], state[f"laterals.{index}.0.bias"]
        lateral = F.conv2d(map_, weight, bias)
        resized = F.interpolate(lateral, scale_factor=scale, mode="bilinear", align_corners=False)
        weight, bias = state[f"smooths.{index}.0.weight"], state[f"smooths.{index}.0.bias"]
        expected = F.conv2d(resized, weight, bias, padding=1)
        assert torch.allclose(found, expected, atol=1e-6)


def test_convolutions_start_as_mmsegmentations() -> None:
    neck = MultiLevelNeck([Level(256, 16)] * 4)
    conv = neck.smooths[0][0]
    bound = math.sqrt(6 / (256 * 9 + 256 * 9))
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not conv.bias.any()


def test_width_is_by_default_the_backbones() -> None:
    assert {level.channels for level in MultiLevelNeck(PLAIN).levels} == {12}
    assert {level.channels for level in MultiLevelNeck(PLAIN, channels=20).levels} == {20}


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5)])
def test_levels_are_what_comes_out(patch: int, grid: tuple[int, int]) -> None:
    neck = MultiLevelNeck([Level(12, patch)] * 4)
    assert [level.stride for level in neck.levels] == [patch / 4, patch / 2, patch, patch * 2]
    maps = neck([torch.zeros(2, 12, *grid)] * 4)
    assert [tuple(m.shape) for m in maps] == [
        (2, 12, *(math.ceil(side * patch / level.stride) for side in grid)) for level in neck.levels
    ]


def test_one_map_serves_every_level() -> None:
    neck = MultiLevelNeck(PLAIN[:1])
    maps = neck([torch.randn(1, 12, 4, 4)])
    assert [map_.shape[-1] for map_ in maps] == [16, 8, 4, 2]


def test_norm_and_relu_follow_each_convolution() -> None:
    neck = MultiLevelNeck(PLAIN, norm="batch", relu=True)
    for conv in [*neck.laterals, *neck.smooths]:
        assert isinstance(conv[1], nn.BatchNorm2d) and isinstance(conv[2], nn.ReLU)
        assert conv[0].bias is None
    check_neck(MultiLevelNeck, levels=PLAIN, norm="group", relu=True)


@pytest.mark.parametrize(
    ("levels", "scales", "match"),
    [
        (PLAIN, (4.0, 2.0, 1.0), "^scales: there are 3 of them for 4 maps"),
        (PLAIN, (0.5, 1.0, 2.0, 4.0), "^scales: .* must not get finer"),
    ],
)
def test_scales_that_make_no_pyramid_are_refused(levels, scales, match) -> None:
    with pytest.raises(ValueError, match=match):
        MultiLevelNeck(levels, scales=scales)
