"""Maps as dense prediction is published with them: with norms on levels, with the class token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitdense.backbones.timm import TimmBackbone
from vitdense.structures import Level
from vitdense.testing import check_backbone

SHAPES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 1)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "vit_tiny_patch16_224": {"depth": 4, "embed_dim": 24},
}


def build(model: str = "vit_tiny_patch16_224", **options: Any) -> TimmBackbone:
    torch.manual_seed(0)
    backbone = TimmBackbone(model=model, options=SHAPES.get(model, {}), **options).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_the_class_token_is_added_or_appended() -> None:
    plain, added, appended = (build(class_token=how) for how in ("drop", "add", "concat"))
    assert plain.levels == added.levels == [Level(24, 16)] * 4
    assert appended.levels == [Level(48, 16)] * 4
    tokens = plain.model.forward_intermediates(images(), indices=4, return_prefix_tokens=True)[1]
    tokens = [prefix[:, 0] for _, prefix in tokens]
    tokens[-1] = plain.model.norm(tokens[-1])
    maps = zip(plain(images()), added(images()), appended(images()), tokens, strict=True)
    for patches, total, both, token in maps:
        everywhere = token[:, :, None, None].expand_as(patches)
        torch.testing.assert_close(total, patches + everywhere)
        torch.testing.assert_close(both, torch.cat([patches, everywhere], 1))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_maps_with_class_tokens_conform(model: str) -> None:
    shape = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    check_backbone(TimmBackbone, model=model, class_token="concat", img_size=96, options=shape,
                   sizes=((64, 96), (70, 50)))  # fmt: skip


@pytest.mark.parametrize(
    "model", ["swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224", "resnet10t"]
)
def test_models_without_a_class_token_say_so(model: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=f"^class_token: {model} has none"):
        TimmBackbone(model=model, class_token="add")


def test_windows_have_class_tokens_of_their_own() -> None:
    with pytest.raises(ValueError, match="^class_token: each of the `windows` has its own"):
        build(class_token="add", windows=2)


def test_what_is_frozen_from_outside_stays_in_evaluation_mode() -> None:
    backbone = build(drop_path=0.5)
    backbone.requires_grad_(False)
    assert not any(module.training for module in backbone.train().model.modules())
    backbone.model.norm.requires_grad_(True)
    model = backbone.train().model
    assert model.norm.training and not any(module.training for module in model.blocks.modules())


def test_norms_of_levels_have_the_epsilon_of_the_model() -> None:
    for model, eps in (("swin_tiny_patch4_window7_224", 1e-5), ("convnext_tiny", 1e-6)):
        norms = build(model, level_norm=True).level_norms
        assert isinstance(norms, nn.ModuleList) and {norm.eps for norm in norms} == {eps}
