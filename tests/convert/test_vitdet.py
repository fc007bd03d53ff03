"""ViTDet: transformers' backbone under detectron2's names gives our maps, and all names return."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import VitDetBackbone, VitDetConfig

from vitdense import config
from vitdense.backbones.timm import TimmBackbone
from vitdense.cli import main
from vitdense.convert.names import Weights
from vitdense.convert.source import Source
from vitdense.convert.vitdet import VitDet
from vitdense.engine.checkpoint import load_model
from vitdense.necks.simple_feature_pyramid import SimpleFeaturePyramid

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
SAM = {"embed_dim": 32, "num_heads": 2, "depth": 4, "window_size": 3, "global_attn_indexes": [1, 3]}

DETECTRON2 = {
    "simfp_2": ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
    "simfp_3": ["0.weight", "0.bias"],
    "simfp_4": [],
    "simfp_5": [],
}
LAST = ["weight", "norm.weight", "norm.bias"]
"""Names of a pyramid's tensors in detectron2, in order; two convolutions follow each list."""


class Pyramid(nn.Module):
    """Backbone and neck under the names of our pyramid model."""

    def __init__(self, size: tuple[int, int], channels: int = 8) -> None:
        super().__init__()
        self.backbone = TimmBackbone(
            model="samvit_base_patch16", img_size=size, out_indices=[3], options=SAM
        )
        self.neck = SimpleFeaturePyramid(self.backbone.levels, channels=channels)


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def peer(size: int) -> nn.Module:
    config = VitDetConfig(
        **SHAPE, image_size=size, pretrain_image_size=64, window_block_indices=[0, 2],
        window_size=3, use_relative_position_embeddings=True, out_features=["stage4"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = VitDetBackbone(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = Weights(tensors)
    VitDet().fill(Source("theirs", tensors), weights)
    return weights.found


def detectron2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of ViTDet as detectron2 has them."""
    rules = [
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.projection", "patch_embed.proj"),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.", ".attn."),
    ]
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return {f"backbone.net.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("patches", [6, 7])
def test_the_maps_are_those_of_transformers(patches: int, dtype: torch.dtype) -> None:
    theirs, pixels = peer(16 * patches).to(dtype), images(16 * patches, 16 * patches).to(dtype)
    ours = Pyramid((16 * patches, 16 * patches)).eval().to(dtype)
    state = converted(detectron2_names(theirs.state_dict()))
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing and all(name.startswith("neck.") for name in missing)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-8
    torch.testing.assert_close(
        ours.backbone(pixels)[0], theirs(pixels).feature_maps[0], atol=tolerance, rtol=tolerance
    )


def as_in_detectron2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `Pyramid` under detectron2's names, from a table of their order."""
    neck = iter([(name, value) for name, value in state.items() if name.startswith("neck.")])
    theirs = {}
    for stage, names in DETECTRON2.items():
        count = len({name.split(".")[0] for name in names}) + (stage == "simfp_2")
        count += stage == "simfp_5"  # GELU and pooling have an index, but no tensors
        ends = [*names, *(f"{count + i}.{last}" for i in (0, 1) for last in LAST)]
        theirs |= {f"backbone.{stage}.{end}": next(neck)[1] for end in ends}
    assert next(neck, None) is None
    for name, value in state.items():
        if name.startswith("backbone.model."):
            theirs[name.replace("backbone.model.", "backbone.net.")] = value
    flat = state["backbone.model.pos_embed"].flatten(1, 2)
    theirs["backbone.net.pos_embed"] = torch.cat((torch.zeros(1, 1, 32), flat), 1)
    return theirs


def test_every_name_of_detectron2_finds_its_place() -> None:
    ours = Pyramid((96, 96))
    state = ours.state_dict()
    returned = converted(as_in_detectron2(state))
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], value) for name, value in state.items())
    assert ours.load_state_dict(returned)


def test_the_command_puts_it_under_a_new_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = Pyramid((96, 96), channels=256)
    theirs = as_in_detectron2(ours.state_dict()) | {"roi_heads.box.weight": torch.ones(2)}
    arrays = {name: tensor.numpy() for name, tensor in theirs.items()}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": arrays}))
    out = tmp_path / "model.safetensors"
    assert main(["convert", str(tmp_path / "model_final.pkl"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "left out        roi_heads.box.weight: belongs to its R-CNN" in text
    assert "re-initialised  head." in text and "ViTDet has another" in text
    model = load_model(out)[0]
    assert model.head.task == "detection"
    ours.eval()
    expected = ours.neck(ours.backbone(images(96, 96)))
    torch.testing.assert_close(model.neck(model.backbone(images(96, 96))), expected)
    assert config.load(tmp_path / "model.yaml").train.new_head


@pytest.mark.parametrize("size", [(96, 96), (33, 130), (200, 64), (16, 16)])
def test_sam_encoders_take_images_of_any_size(size: tuple[int, int]) -> None:
    backbone = Pyramid((64, 64)).backbone.eval()
    rounded = tuple(-(-side // 16) for side in size)
    seen: list[tuple[int, ...]] = []
    for block in backbone.model.blocks:
        block.attn.register_forward_pre_hook(
            lambda _, inputs: seen.append(tuple(inputs[0].shape[1:3]))
        )
    maps = backbone(images(*size))
    assert tuple(maps[0].shape) == (2, 32, *rounded)
    assert maps[0].isfinite().all()
    assert seen == [(3, 3), rounded, (3, 3), rounded]
