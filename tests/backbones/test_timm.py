"""The timm backbone: levels, sizes, options, weights and errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from vitdense.backbones.timm import TimmBackbone
from vitdense.registry import BACKBONES
from vitdense.structures import Level

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}


def tiny_vit(**arguments: Any) -> TimmBackbone:
    options = TINY | arguments.pop("options", {})
    torch.manual_seed(0)
    return TimmBackbone(model="vit_tiny_patch16_224", options=options, **arguments).eval()


def tiny_swin(**arguments: Any) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(model="swin_tiny_patch4_window7_224", options=SWIN, **arguments).eval()


def images(height: int = 64, width: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def check_maps(backbone: TimmBackbone, pixels: Tensor) -> list[Tensor]:
    maps = backbone(pixels)
    height, width = pixels.shape[-2:]
    assert [tuple(m.shape) for m in maps] == [
        (len(pixels), lv.channels, math.ceil(height / lv.stride), math.ceil(width / lv.stride))
        for lv in backbone.levels
    ]
    return maps


def test_one_line_in_a_repl() -> None:
    backbone = BACKBONES.get("timm")(
        model="swin_tiny_patch4_window7_224", pretrained=False, img_size=(256, 384)
    )
    assert backbone.levels == [Level(96, 4), Level(192, 8), Level(384, 16), Level(768, 32)]


@pytest.mark.parametrize(
    ("depth", "indices"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (3, [0, 1, 2])]
)
def test_a_plain_vit_gives_four_spread_blocks(depth: int, indices: list[int]) -> None:
    with torch.device("meta"):
        backbone = tiny_vit(options={"depth": depth})
    assert backbone.indices == indices
    assert backbone.levels == [Level(32, 16)] * len(indices)


def test_a_hierarchical_model_gives_strides_from_four_on() -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(model="resnet18")
    assert [level.stride for level in backbone.levels] == [4, 8, 16, 32]


def test_indices_are_sorted_and_unique_and_counted_from_the_end() -> None:
    backbone = tiny_vit(out_indices=[-1, 1, 3])
    assert backbone.indices == [1, 3]
    assert len(backbone(images())) == 2


def test_blocks_behind_the_last_map_are_dropped() -> None:
    backbone = tiny_vit(out_indices=[1])
    assert len(backbone.model.blocks) == 2
    assert len(check_maps(backbone, images())) == 1


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (97, 131), (20, 33)])
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_any_size_has_rounded_up_maps(build: Any, size: tuple[int, int]) -> None:
    check_maps(build(), images(*size))


def test_an_odd_size_is_padded_with_zeros_and_cropped() -> None:
    backbone, pixels = tiny_vit(), images(97, 131)
    padded = torch.nn.functional.pad(pixels, (0, 144 - 131, 0, 112 - 97))
    for odd, even in zip(backbone(pixels), backbone(padded), strict=True):
        torch.testing.assert_close(odd, even)


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_one_image_equals_the_same_in_a_batch(build: Any) -> None:
    backbone, pixels = build(), images(60, 90, batch=3)
    for one, many in zip(backbone(pixels[1:2]), backbone(pixels), strict=True):
        torch.testing.assert_close(one[0], many[1], atol=1e-5, rtol=1e-4)


def test_a_plain_vit_equals_timm() -> None:
    backbone = tiny_vit(img_size=64)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **TINY).eval()
    model.load_state_dict(backbone.model.state_dict())
    expected = model.forward_intermediates(images(), indices=[0, 1, 2, 3], intermediates_only=True)
    final = model.forward_features(images())[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
    for ours, theirs in zip(backbone(images()), [*expected[:3], final], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_final_norm_can_be_left_out() -> None:
    normed, plain = tiny_vit(), tiny_vit(norm=False)
    last = plain(images())[-1].permute(0, 2, 3, 1)
    torch.testing.assert_close(normed(images())[-1], normed.model.norm(last).permute(0, 3, 1, 2))
    assert not any("norm." in name.split("blocks")[0] for name, _ in plain.named_parameters())


def test_the_final_norm_serves_an_earlier_block_too() -> None:
    maps = check_maps(tiny_vit(out_indices=[1], norm=True), images())
    torch.testing.assert_close(maps[0].mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)


def test_level_norms_are_new_and_normalise_each_map() -> None:
    backbone = tiny_swin(level_norm=True)
    for feature in check_maps(backbone, images(56, 84)):
        torch.testing.assert_close(
            feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-5, rtol=0
        )
    assert {name for name, _ in backbone.level_norms.named_parameters()} == {
        "0.weight", "0.bias", "1.weight", "1.bias",
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(channels: int) -> None:
    backbone = tiny_vit(in_chans=channels)
    assert len(backbone.mean) == len(backbone.std) == channels == backbone.in_chans
    check_maps(backbone, images(channels=channels))


def test_smaller_patches() -> None:
    backbone = tiny_vit(patch_size=8)
    assert {level.stride for level in backbone.levels} == {8}
    check_maps(backbone, images())


def test_pixel_statistics_are_those_of_the_weights_unless_given() -> None:
    assert tiny_vit().mean == (0.5, 0.5, 0.5)
    assert tiny_vit(mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0]).mean == (0.1, 0.2, 0.3)


def test_no_parameter_is_left_without_gradient() -> None:
    for backbone in (tiny_vit(), tiny_vit(out_indices=[1]), tiny_swin(level_norm=True)):
        sum(feature.square().mean() for feature in backbone(images())).backward()
        assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_all_frozen_parts_stay_in_evaluation_mode() -> None:
    backbone = tiny_vit(frozen=True, drop_path=0.5).train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    torch.testing.assert_close(backbone(images())[-1], backbone(images())[-1])
    assert not any(module.training for module in backbone.model.modules())


def test_the_first_blocks_frozen() -> None:
    backbone = tiny_vit(frozen=2).train()
    free = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in free if "blocks" in name} == {"2", "3"}
    assert {name for name in free if "blocks" not in name} == {
        "model.norm.weight", "model.norm.bias",
    }  # fmt: skip
    assert [block.training for block in backbone.model.blocks] == [False, False, True, True]


def test_frozen_statistics_of_batch_norm_do_not_move() -> None:
    backbone = TimmBackbone(model="resnet18", frozen=2, out_indices=[1, 2]).train()
    before = copy.deepcopy(backbone.model.bn1.state_dict())
    backbone(images())
    torch.testing.assert_close(backbone.model.bn1.state_dict(), before)


def test_a_frozen_stem_only() -> None:
    backbone = tiny_vit(frozen=0)
    held = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in held} == {"cls_token", "pos_embed", "patch_embed"}


def test_copies_keep_their_own_frozen_parts() -> None:
    twin = copy.deepcopy(tiny_vit(frozen=1)).train()
    assert [block.training for block in twin.model.blocks] == [False, True, True, True]


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_checkpointing_changes_neither_maps_nor_gradients(build: Any) -> None:
    results = []
    for checkpointing in (False, True):
        backbone = build(checkpointing=checkpointing).train()
        maps = backbone(images())
        sum(feature.square().mean() for feature in maps).backward()
        results.append((maps, {name: p.grad for name, p in backbone.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_checkpointing_saves_activations(build: Any) -> None:
    saved = []
    for checkpointing in (False, True):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()), id):
            build(checkpointing=checkpointing).train()(images())
        saved.append(sum(kept))
    assert saved[1] < saved[0] / 2


def test_drop_path_grows_with_depth() -> None:
    backbone = tiny_vit(drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path_is_off_by_default_even_where_timm_has_it_on() -> None:
    model = tiny_swin().model
    assert not [m for m in model.modules() if getattr(m, "drop_prob", 0)]


@pytest.mark.parametrize(
    "model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "hiera_tiny_224"]
)
def test_layer_depths_cover_all_parameters_and_grow(model: str) -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(model=model)
    depths = backbone.layer_depths()
    assert list(depths) == [name for name, _ in backbone.named_parameters()]
    assert set(depths.values()) == set(range(max(depths.values()) + 1))
    numbered = [depth for name, depth in depths.items() if ".blocks." in name]
    assert numbered == sorted(numbered)
    stems = {depth for name, depth in depths.items() if "patch_embed" in name or "pos_emb" in name}
    assert 0 in stems


def test_positions_and_tables_do_not_decay() -> None:
    assert tiny_vit().no_weight_decay() == {"model.cls_token", "model.pos_embed"}
    tables = tiny_swin().no_weight_decay()
    assert "model.layers.0.blocks.0.attn.relative_position_bias_table" in tables
    assert all("bias_table" in name for name in tables)


def test_local_weights_at_another_size(tmp_path: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **TINY)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    backbone = tiny_vit(weights=str(tmp_path / "vit.pth"), img_size=(96, 128))
    qkv = backbone.model.state_dict()["blocks.2.attn.qkv.weight"]
    torch.testing.assert_close(qkv, model.state_dict()["blocks.2.attn.qkv.weight"])
    assert backbone.model.pos_embed.shape[1] == 6 * 8 + 1
    check_maps(backbone, images(96, 128))


def test_local_safetensors_with_other_channels(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    backbone = tiny_vit(weights=str(tmp_path / "vit.safetensors"), in_chans=1)
    kernel = model.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight, kernel.sum(1, keepdim=True))


def test_weights_of_another_model_are_refused(tmp_path: Any) -> None:
    torch.save({"something.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^weights: .*other.pth does not belong to vit_tiny"):
        tiny_vit(weights=str(tmp_path / "other.pth"))


def test_missing_and_broken_files_are_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="^weights: there is no file .*nothing.pth"):
        tiny_vit(weights=str(tmp_path / "nothing.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="^weights: cannot load .*broken.pth"):
        tiny_vit(weights=str(tmp_path / "broken.pth"))


def test_no_network_names_the_alternatives(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = "^pretrained: .*`weights: path`.*`pretrained: false`.*HF_HUB_OFFLINE"
    with pytest.raises(ValueError, match=message):
        TimmBackbone(model="vit_tiny_patch16_224", pretrained=True)


def test_a_model_without_weights_says_so() -> None:
    with pytest.raises(ValueError, match="^pretrained: No pretrained weights exist for test_vit_r"):
        TimmBackbone(model="test_vit_relpos", pretrained=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_tiny_patch16_225"}, "^model: .*did you mean vit_tiny_patch16_224"),
        ({"model": "vit_tiny_patch16_224.mea"}, "^model: .*no weights tagged 'mea', only augreg"),
        ({"model": "crossvit_9_240"}, "^model: crossvit_9_240 cannot serve as a backbone: .*grid"),
        ({"model": "pit_ti_224"}, "^model: pit_ti_224 cannot serve as a backbone"),
        ({"model": "resnet18", "patch_size": 8}, "^patch_size: resnet18 has no patches"),
        ({"model": "vgg11", "drop_path": 0.1}, "^drop_path: vgg11 has no stochastic depth"),
        ({"model": "nest_tiny", "img_size": (256, 320)}, "^model: .*nest_tiny .*square inputs"),
        ({"model": "resnet18", "options": {"dpeth": 3}}, "^options: timm cannot build .*dpeth"),
        ({"model": "resnet18", "out_indices": [2, 5]}, "^out_indices: .* must lie in 0..4"),
        ({"model": "resnet18", "norm": True}, "^norm: resnet18 has no final norm"),
        ({"model": "resnet18", "frozen": 99}, "^frozen: resnet18 has 8 blocks in order, not 99"),
        ({"model": "poolformer_s12", "frozen": 2}, "^frozen: timm knows no order of blocks"),
        ({"model": "vgg11", "checkpointing": True}, "^checkpointing: vgg11 has no support"),
        ({"model": "resnet18", "mean": [0.5]}, "^mean: 1 numbers for 3 channels"),
    ],
)
def test_errors_start_with_the_option(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        TimmBackbone(**arguments)


def test_a_fixed_size_is_named_and_can_be_set() -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(model="hiera_tiny_224")
        message = "hiera_tiny_224 has a fixed input size of 224x224.*set model.backbone.img_size"
        with pytest.raises(ValueError, match=f"^img_size: {message}"):
            backbone(images(256, 320).to("meta"))
        check_maps(backbone, images(97, 131).to("meta"))
        check_maps(
            TimmBackbone(model="hiera_tiny_224", img_size=(250, 320)),
            images(256, 320).to("meta"),
        )
