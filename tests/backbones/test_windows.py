"""Windowed attention of plain ViTs: equal to masked and to full attention, for every family."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vitdense.backbones.timm import TimmBackbone
from vitdense.backbones.windows import Windows, partition, spread
from vitdense.testing import check_backbone

TINY = {"embed_dim": 32, "depth": 6, "num_heads": 2}
FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_tiny_r_s16_p8_224",
]
NO_TOKENS = {
    "vit_tiny_patch16_224": {"class_token": False, "global_pool": "avg"},
    "eva02_tiny_patch14_224": {"class_token": False, "global_pool": "avg"},
    "vit_small_patch16_dinov3": {"class_token": False, "num_reg_tokens": 0},
    "vit_small_patch16_rope_mixed_224": {"class_token": False, "global_pool": "avg"},
}


def build(model: str = "vit_tiny_patch16_224", **arguments: Any) -> TimmBackbone:
    """A tiny backbone in which attention, biases and layer scales all matter."""
    options = TINY | arguments.pop("options", {})
    backbone = TimmBackbone(model=model, options=options, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return backbone


def images(height: int = 112, width: int = 112, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def sequence_lengths(backbone: TimmBackbone, pixels: Tensor) -> list[tuple[int, int]]:
    """(sequences, tokens of each) that every block's attention is called with."""
    seen: list[tuple[int, int]] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
        for block in backbone.model.blocks
    ]
    backbone(pixels)
    for hook in hooks:
        hook.remove()
    return [tuple(shape) for shape in seen]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_window_is_full_attention(name: str) -> None:
    full, pixels = build(name), images(97, 131)
    gradients = []
    for option in ({}, {"windows": 1}, {"window_size": 10}):
        backbone = build(name, **option)
        maps = backbone(pixels)
        torch.testing.assert_close(maps, full(pixels), atol=1e-5, rtol=1e-5)
        sum(m.square().mean() for m in maps).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NO_TOKENS)
def test_windows_are_full_attention_with_a_mask(name: str) -> None:
    """timm's own blocks over the whole image, where a mask keeps every window to itself."""
    backbone = build(
        name, windows=2, global_blocks=[1, 4], norm=False, out_indices=[0, 2, 5],
        options=NO_TOKENS[name],
    )  # fmt: skip
    stride = backbone.levels[0].stride
    pixels = images(4 * stride, 6 * stride)
    maps = backbone(pixels)
    cells = torch.arange(4)[:, None] // 2 * 2 + torch.arange(6) // 3
    mask = (cells.flatten()[:, None] == cells.flatten()).expand(1, 1, 24, 24)
    model, rope = backbone.model, None
    tokens = model._pos_embed(model.patch_embed(pixels))
    if isinstance(tokens, tuple):
        tokens, rope = tokens
    assert model.num_prefix_tokens == 0
    expected = []
    for index, block in enumerate(model.blocks):
        extra: dict[str, Any] = {} if index in (1, 4) else {"attn_mask": mask}
        if rope is not None:
            extra["rope"] = rope[index] if rope.dim() > 2 else rope
        tokens = block(tokens, **extra)
        if index in (0, 2, 5):
            expected.append(tokens.transpose(1, 2).unflatten(2, (4, 6)))
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_global_blocks_see_the_tokens_of_every_window(name: str) -> None:
    """Like full attention of an image that has class and register tokens for each window."""
    backbone = build(name, windows=2, global_blocks=list(range(6)), norm=False)
    model, stride = build(name).model, backbone.levels[0].stride
    pixels = images(4 * stride, 6 * stride)
    tokens, rope = model._pos_embed(model.patch_embed(pixels)), None
    if isinstance(tokens, tuple):
        tokens, rope = tokens
    prefix = model.num_prefix_tokens
    tokens = torch.cat((tokens[:, :prefix].repeat(1, 4, 1), tokens[:, prefix:]), 1)
    for block in model.blocks:
        if rope is not None:
            block.attn.num_prefix_tokens = 4 * prefix
        tokens = block(tokens) if rope is None else block(tokens, rope=rope)
    expected = tokens[:, 4 * prefix :].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(backbone(pixels)[-1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_a_window_is_an_image_of_its_own_but_for_positions(name: str) -> None:
    """Without global blocks and positions, each window with its own class and register tokens."""
    windowed, full = build(name, windows=2, global_blocks=[]), build(name)
    for backbone in (windowed, full):
        if name.endswith("dinov3"):
            backbone.model.rope = NoRotation(backbone.model.rope)
        else:
            torch.nn.init.zeros_(backbone.model.pos_embed)
    stride = full.levels[0].stride
    pixels = images(4 * stride, 6 * stride)
    corner = pixels[..., 2 * stride :, 3 * stride :]
    for whole, part in zip(windowed(pixels), full(corner), strict=True):
        torch.testing.assert_close(whole[..., 2:, 3:], part, atol=1e-4, rtol=1e-4)


class NoRotation(torch.nn.Module):
    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.width = rope.get_embed(shape=[1, 1]).shape[-1] // 2

    def get_embed(self, shape: list[int]) -> Tensor:
        return torch.cat([torch.zeros(self.width), torch.ones(self.width)]).repeat(
            math.prod(shape), 1
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_called_on_windows(name: str) -> None:
    backbone = build(name, window_size=3, global_blocks=[2, 5])
    stride, prefix = backbone.levels[0].stride, backbone.model.num_prefix_tokens
    for rows, columns in ((6, 6), (6, 12)):
        windows = rows * columns // 9
        lengths = sequence_lengths(backbone, images(rows * stride, columns * stride))
        local, whole = (2 * windows, 9 + prefix), (2, windows * (9 + prefix))
        assert lengths == [local, local, whole, local, local, whole]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("option", [{"windows": 3}, {"window_size": 2}])
def test_images_of_any_size(name: str, option: dict[str, int]) -> None:
    backbone, pixels = build(name, **option), images(97, 131, batch=3)
    maps = backbone(pixels)
    assert [tuple(m.shape) for m in maps] == [
        (3, lv.channels, math.ceil(97 / lv.stride), math.ceil(131 / lv.stride))
        for lv in backbone.levels
    ]
    torch.testing.assert_close(backbone(pixels[1:2])[-1][0], maps[-1][1], atol=1e-4, rtol=1e-4)


def test_padding_is_less_than_a_patch_per_window() -> None:
    windows = Windows(stride=16, count=None, size=14, global_blocks=frozenset())
    assert windows.split((1024, 512)) == (5, 3)
    assert windows.fit((1024, 512)) == (5 * 13 * 16, 3 * 11 * 16)
    for patches in range(1, 100):
        height, _ = windows.fit((16 * patches, 16))
        split = windows.split((height, 16))
        assert split == windows.split((16 * patches, 16))
        assert height // 16 - patches < split[0]
        assert height // 16 <= 14 * split[0]


def test_tokens_are_sorted_by_window() -> None:
    cells = torch.arange(4 * 6).view(1, 24, 1)
    windows = partition(cells, (4, 6), (2, 3))[0, :, :, 0].tolist()
    assert windows[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert windows[3] == [12, 13, 18, 19]


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (40, [9, 19, 29, 39]), (6, [2, 5]), (2, [1])],
)
def test_global_blocks_are_spread_with_the_last_among_them(depth: int, blocks: list[int]) -> None:
    assert spread(depth) == blocks


def test_global_blocks_by_default_are_of_the_blocks_that_are_left() -> None:
    backbone = build(windows=2, out_indices=[2])
    assert backbone.windows is not None
    assert backbone.windows.global_blocks == {2}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = build(name, windows=2, checkpointing=checkpointing).train()
        sum(m.square().mean() for m in backbone(images())).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters()})
        assert None not in gradients[-1].values()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_training_with_stochastic_depth_frozen_blocks_and_autocast(name: str) -> None:
    backbone = build(name, windows=2, drop_path=0.5, frozen=2).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(images())
    sum(m.float().square().mean() for m in maps).backward()
    assert all(m.isfinite().all() for m in maps)
    trained = {n for n, p in backbone.named_parameters() if p.grad is not None}
    depths = backbone.layer_depths()
    assert set(depths) == {n for n, _ in backbone.named_parameters()}
    assert trained == {n for n, depth in depths.items() if depth > 2}


def test_a_windowed_backbone_conforms() -> None:
    check_backbone(TimmBackbone, model="vit_small_patch16_dinov3", windows=2, options=TINY)


def test_a_copy_computes_the_same() -> None:
    backbone = build("vit_small_patch16_dinov3", windows=2)
    torch.testing.assert_close(copy.deepcopy(backbone)(images()), backbone(images()))


def test_names_of_parameters_are_those_without_windows() -> None:
    assert build(windows=2).state_dict().keys() == build().state_dict().keys()
    assert build(windows=2).no_weight_decay() == build().no_weight_decay()


def test_the_norm_can_be_on_all_maps() -> None:
    normed, plain = build(windows=2, norm="all"), build(windows=2, norm=False)
    for ours, raw in zip(normed(images()), plain(images()), strict=True):
        expected = normed.model.norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="^norm: swin.* has no final norm for all its maps"):
        TimmBackbone(model="swin_tiny_patch4_window7_224", norm="all")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("samvit_base_patch16", {"depth": 2}),
        ("beit_base_patch16_224", {"depth": 2}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12}),
    ],
)
def test_families_that_cannot_be_cut_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^window_size: {name} cannot be cut"):
        TimmBackbone(model=name, window_size=7, options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 2, "window_size": 7}, "^window_size: .* not both"),
        ({"global_blocks": [1]}, "^global_blocks: say `windows`"),
        ({"windows": 2, "global_blocks": [2, 6]}, r"^global_blocks: \[6\] are not in 0..5"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmBackbone(model="vit_tiny_patch16_224", options=TINY, **options)
