"""The feature pyramid network against torchvision's and against the paper's formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vitdense.necks.fpn import FPN
from vitdense.structures import Level

LEVELS = [Level(8, 4), Level(12, 8), Level(16, 16)]


def features(height: int = 64, width: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            2, lv.channels, -(-height // lv.stride), -(-width // lv.stride), generator=generator
        )
        for lv in LEVELS
    ]


def test_equals_torchvision_on_copied_weights() -> None:
    ours = FPN(LEVELS, channels=10, extra_levels=1)
    theirs = FeaturePyramidNetwork([8, 12, 16], 10, extra_blocks=LastLevelMaxPool())
    theirs.load_state_dict(ours.pyramid.state_dict())
    named = {str(index): feature for index, feature in enumerate(features())}
    torch.testing.assert_close(ours(features()), list(theirs(named).values()))


def test_equals_the_formula() -> None:
    neck, maps = FPN(LEVELS, channels=10), features(68, 100)
    laterals = [conv(m) for conv, m in zip(neck.pyramid.inner_blocks, maps, strict=True)]
    for index in (1, 0):
        size = laterals[index].shape[-2:]
        laterals[index] = laterals[index] + F.interpolate(laterals[index + 1], size)
    expected = [conv(m) for conv, m in zip(neck.pyramid.layer_blocks, laterals, strict=True)]
    torch.testing.assert_close(neck(maps), expected)


def test_levels_are_what_comes_out() -> None:
    neck = FPN(LEVELS, channels=10, extra_levels=2)
    assert neck.levels == [Level(10, stride) for stride in (4, 8, 16, 32, 64)]
    assert [tuple(m.shape[1:]) for m in neck(features())] == [
        (10, -(-64 // level.stride), -(-96 // level.stride)) for level in neck.levels
    ]
