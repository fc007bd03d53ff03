"""Levels promised = maps given, for every family of timm, on the meta device."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch

from vitdense.backbones.timm import TimmBackbone

FAMILIES = json.loads((Path(__file__).parents[2] / "benchmarks" / "families.json").read_text())
REFUSED = {"CrossViT", "PiT", "Inception"}
SIZES = [(256, 320), (137, 201)]

REPRESENTATIVES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "samvit_base_patch16",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "vit_tiny_r_s16_p8_224",
    "swin_s3_tiny_224",
    "swinv2_tiny_window8_256",
    "pvt_v2_b0",
    "twins_svt_small",
    "maxvit_pico_rw_256",
    "coatnet_nano_rw_224",
    "xcit_nano_12_p16_224",
    "tiny_vit_5m_224",
    "convnext_atto",
    "efficientnet_b0",
]


def names_of(family: str) -> list[str]:
    found = [[p] if "." in p else timm.list_models(p) for p in FAMILIES[family]]
    return sorted({name for names in found for name in names})


def build(name: str) -> TimmBackbone:
    """The backbone on the meta device; families of one size are built for the rectangle."""
    with torch.device("meta"):
        backbone = TimmBackbone(model=name)
        return TimmBackbone(model=name, img_size=SIZES[0]) if backbone.canvas.fixed else backbone


def check(backbone: TimmBackbone, size: tuple[int, int]) -> None:
    maps = backbone.eval()(torch.empty(2, 3, *size, device="meta"))
    assert [tuple(m.shape) for m in maps] == [
        (2, lv.channels, math.ceil(size[0] / lv.stride), math.ceil(size[1] / lv.stride))
        for lv in backbone.levels
    ]
    strides = [level.stride for level in backbone.levels]
    assert strides == sorted(strides)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_one_of_each_family(name: str) -> None:
    backbone = build(name)
    check(backbone, SIZES[1])
    sum(m.sum() for m in backbone(torch.empty(2, 3, *SIZES[0], device="meta"))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    depths = backbone.layer_depths()
    assert not depths or set(depths) == {n for n, _ in backbone.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REFUSED))
def test_whole_family(family: str) -> None:
    for name in names_of(family):
        backbone = build(name)
        for size in SIZES:
            check(backbone, size)


@pytest.mark.slow
def test_the_sweep_is_wide() -> None:
    assert sum(len(names_of(family)) for family in set(FAMILIES) - REFUSED) >= 150


@pytest.mark.parametrize("name", ["crossvit_9_240", "pit_ti_224", "inception_v3"])
def test_families_without_a_regular_grid_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^model: {name} cannot serve as a backbone: .*grid"):
        build(name)
