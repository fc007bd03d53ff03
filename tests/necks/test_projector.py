"""The multi-scale projector equals transformers' LW-DETR and RF-DETR projectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LwDetrConfig, LwDetrViTConfig, RfDetrConfig
from transformers.models.lw_detr.modeling_lw_detr import LwDetrMultiScaleProjector
from transformers.models.rf_detr.modeling_rf_detr import RfDetrScaleProjector

from vitdense.convert.lwdetr import PROJECTOR
from vitdense.convert.names import rename
from vitdense.necks.projector import MultiScaleProjector
from vitdense.structures import Level

WIDTH, MAPS = 24, 3


def shake(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return module.double()


def backbone(width: int) -> LwDetrViTConfig:
    return LwDetrViTConfig(
        hidden_size=width, num_hidden_layers=4, num_attention_heads=4, out_indices=[1, 2, 3]
    )


def features(width: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, width, 5, 6).double() for _ in range(MAPS)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("width", [WIDTH, 528])  # above 512 the finer level is made another way
def test_equals_lw_detr(width, training):
    torch.manual_seed(1)
    config = LwDetrConfig(
        backbone_config=backbone(width),
        d_model=16,
        c2f_num_blocks=2,
        projector_scale_factors=[2.0, 1.0, 0.5],
        batch_norm_eps=1e-3,
    )
    theirs = shake(LwDetrMultiScaleProjector(config)).train(training)
    ours = MultiScaleProjector(
        [Level(width, 16)] * MAPS, channels=16, scales=(0.5, 2.0, 1.0), blocks=2, norm="batch",
        eps=1e-3,
    ).double().train(training)  # fmt: skip
    ours.load_state_dict(rename(theirs.state_dict(), PROJECTOR))
    maps = ours(features(width))
    for actual, expected in zip(maps, theirs(features(width)), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-8, rtol=0)


def test_equals_rf_detr():
    torch.manual_seed(1)
    config = RfDetrConfig(
        backbone_config=dict(
            model_type="rf_detr_dinov2", hidden_size=WIDTH, num_hidden_layers=4,
            num_attention_heads=4, out_indices=[1, 2, 3],
        ),
        d_model=16,
    )  # fmt: skip
    theirs = shake(RfDetrScaleProjector(config))
    ours = MultiScaleProjector([Level(WIDTH, 14)] * MAPS, channels=16).double()
    ours.load_state_dict(rename(theirs.state_dict(), PROJECTOR))
    torch.testing.assert_close(ours(features()), [theirs(features())], atol=1e-8, rtol=0)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("patch", [14, 16])
def test_levels_are_what_comes_out_finest_first(norm, patch):
    scales = (1.0, 0.25, 4.0, 0.5, 2.0)
    neck = MultiScaleProjector([Level(WIDTH, patch)] * MAPS, channels=8, scales=scales, norm=norm)
    assert [level.stride * 4 for level in neck.levels] == [patch * n for n in (1, 2, 4, 8, 16)]
    maps = neck([x.float() for x in features()])
    assert [tuple(m.shape[1:]) for m in maps] == [
        (8, *(math.ceil(side * patch / level.stride) for side in (5, 6))) for level in neck.levels
    ]
    assert torch.equal(maps[-1], maps[-2][:, :, ::2, ::2])


def test_wide_maps_are_halved_on_the_way_up_where_wanted():
    levels = [Level(24, 16)]
    for halve_above, kinds in (
        (8, ["ConvNorm", "ReLU", "ConvTranspose2d"]),
        (None, ["ConvTranspose2d"]),
    ):
        neck = MultiScaleProjector(levels, channels=8, scales=(2.0,), halve_above=halve_above)
        (resample,) = neck.stages[0].resample
        assert [type(module).__name__ for module in resample] == kinds


@pytest.mark.parametrize(
    "levels, options, message",
    [
        ([Level(8, 8), Level(8, 16)], {}, "multi_scale_projector: fuses maps of one stride"),
        ([Level(8, 16)], dict(scales=()), r"^scales: .*different ones of"),
        ([Level(8, 16)], dict(scales=(3.0,)), r"^scales: .*different ones of"),
        ([Level(8, 16)], dict(scales=(1.0, 1.0)), r"^scales: .*different ones of"),
        ([Level(8, 16)], dict(scales=(1.0, 0.25)), r"^scales: 0.25 is made from 0.5"),
    ],
)
def test_what_it_cannot_do_is_refused(levels, options, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleProjector(levels, **options)
