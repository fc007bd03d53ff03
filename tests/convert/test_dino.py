"""DINO's own checkpoints: the layout of its authors' files becomes our model."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention as Attention,
)

from vitdense.backbones.timm import TimmBackbone
from vitdense.cli import main
from vitdense.convert.classes import COCO
from vitdense.convert.dino import HEAD
from vitdense.convert.names import rename
from vitdense.engine.checkpoint import load_model, read_meta
from vitdense.heads.detection.deformable_transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
)
from vitdense.heads.detection.dino import DinoHead

SMALL = dict(
    width=32, heads=4, points=2, ffn=48, encoder_layers=1, decoder_layers=3, queries=10,
    look_twice=True,
)  # fmt: skip

RESNET = dict(
    model="resnet50",
    out_indices=[2, 3, 4],
    frozen_norms=True,
    options={"layers": [1, 2, 1, 1], "channels": [4, 4, 8, 8]},
)
SWIN = dict(
    model="swin_tiny_patch4_window7_224",
    out_indices=[0, 1, 2, 3],
    level_norm=True,
    options={"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
)

ARGUMENTS = dict(
    num_classes=91, nheads=4, dropout=0.0, num_queries=10, num_select=300, dn_number=100,
    dn_label_noise_ratio=0.5, dn_box_noise_scale=0.4, dn_labelbook_size=91, cls_loss_coef=1.0,
    nms_iou_threshold=-1, use_detached_boxes_dec_out=False, transformer_activation="relu",
    position_embedding="sine", pe_temperatureH=20, pe_temperatureW=20, pre_norm=False,
    dilation=False, decoder_sa_type="sa", decoder_module_seq=["sa", "ca", "ffn"],
    dec_layer_number=None, num_patterns=0, two_stage_learn_wh=False, two_stage_pat_embed=0,
    two_stage_add_query_num=0, use_deformable_box_attn=False, add_channel_attention=False,
    backbone="resnet50", lr=0.0001, device="cuda",
)  # fmt: skip

# Our names -> theirs, one by one.
ENCODER = {
    "attention.offsets": "self_attn.sampling_offsets",
    "attention.weights": "self_attn.attention_weights",
    "attention.value": "self_attn.value_proj",
    "attention.output": "self_attn.output_proj",
    "norm": "norm1",
    "feed_forward.expand": "linear1",
    "feed_forward.reduce": "linear2",
    "feed_forward.norm": "norm2",
}
DECODER = {
    "cross_attention.offsets": "cross_attn.sampling_offsets",
    "cross_attention.weights": "cross_attn.attention_weights",
    "cross_attention.value": "cross_attn.value_proj",
    "cross_attention.output": "cross_attn.output_proj",
    "cross_norm": "norm1",
    "self_attention.output": "self_attn.out_proj",
    "self_norm": "norm2",
    "feed_forward.expand": "linear1",
    "feed_forward.reduce": "linear2",
    "feed_forward.norm": "norm3",
}


def both(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def table(levels: int, layers: int, shared: bool, two_stage: bool) -> dict[str, str]:
    """Our names of the head -> theirs; that of the queries' attention is apart."""
    names = {
        "encoder.level_embed": "transformer.level_embed",
        "contents.weight": "transformer.tgt_embed.weight",
    }
    for i in range(levels):
        names |= both(f"inputs.{i}.0", f"input_proj.{i}.0")
        names |= both(f"inputs.{i}.1", f"input_proj.{i}.1")
    for ours, theirs in ENCODER.items():
        names |= both(f"encoder.layers.0.{ours}", f"transformer.encoder.layers.0.{theirs}")
    for i in range(layers):
        for ours, theirs in DECODER.items():
            names |= both(f"decoder.layers.{i}.{ours}", f"transformer.decoder.layers.{i}.{theirs}")
    for i in range(1 if shared else layers):
        predictor, theirs = f"decoder.predictors.{i}", "transformer.decoder"
        names |= both(f"{predictor}.classes", f"{theirs}.class_embed.{i}")
        for j in range(3):
            names |= both(f"{predictor}.boxes.layers.{j}", f"{theirs}.bbox_embed.{i}.layers.{j}")
    for j in range(2):
        names |= both(
            f"decoder.place.mlp.layers.{j}", f"transformer.decoder.ref_point_head.layers.{j}"
        )
    names |= both("decoder.norm", "transformer.decoder.norm")
    if not two_stage:
        return names | {"references.logits": "transformer.refpoint_embed.weight"}
    for j in range(3):
        names |= both(
            f"first_stage.predictor.boxes.layers.{j}", f"transformer.enc_out_bbox_embed.layers.{j}"
        )
    names |= both("first_stage.predictor.classes", "transformer.enc_out_class_embed")
    names |= both("first_stage.project.0", "transformer.enc_output")
    return names | both("first_stage.project.1", "transformer.enc_output_norm")


def as_theirs(head: DinoHead, shared: bool, labelbook: int) -> dict[str, Tensor]:
    """The head's state in the layout of the authors."""
    ours = head.state_dict()
    layers = len(head.decoder.layers)
    names = table(len(head.inputs), layers, shared, head.first_stage is not None)
    found = {theirs: ours.pop(name) for name, theirs in names.items()}
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [
                ours.pop(f"decoder.layers.{i}.self_attention.{part}.{kind}")
                for part in ("query", "key", "value")
            ]
            found[f"transformer.decoder.layers.{i}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    rows = ours.pop("denoising.classes.weight")[:-1]
    found["label_enc.weight"] = torch.cat((rows, torch.randn(labelbook + 1 - len(rows), 32)))
    assert not ours  # the table is complete
    for name in list(found):  # the authors' files hold the predictors twice, and shared ones often
        if match := re.match(r"transformer\.decoder\.(\w+_embed)\.0\.(.*)", name):
            for i in range(layers):
                other = f"transformer.decoder.{match[1]}.{i}.{match[2]}"
                if shared:
                    found[other] = found[name].clone()
                found[f"{match[1]}.{i}.{match[2]}"] = found[other].clone()
    return found


def backbone_as_theirs(backbone: TimmBackbone) -> dict[str, Tensor]:
    found = {}
    for name, tensor in backbone.state_dict().items():
        if "resnet" in backbone.name:
            name = name.replace("model.", "body.", 1)
        elif match := re.match(r"level_norms\.(\d)\.(.*)", name):
            name = f"norm{match[1]}.{match[2]}"
        else:
            name = name.removeprefix("model.")
            if match := re.match(r"layers\.(\d)\.downsample\.(.*)", name):
                name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
            if name.endswith("relative_position_bias_table"):
                index = name.replace("bias_table", "index")
                found[f"backbone.0.{index}"] = torch.zeros(16, 16, dtype=torch.long)
        found[f"backbone.0.{name}"] = tensor
    return found


def build(kind: dict, classes: int, shared: bool, levels: int, **changes):
    torch.manual_seed(0)
    backbone = TimmBackbone(**kind)
    given = list(range(len(backbone.levels)))
    head = DinoHead(
        backbone.levels, classes, input_levels=given, num_levels=levels, share_predictors=shared,
        **(SMALL | changes),
    )  # fmt: skip
    for module in (backbone, head):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    return backbone.eval(), head.eval()


def save(path: Path, backbone, head, shared: bool, labelbook: int, arguments: dict | None) -> Path:
    weights = backbone_as_theirs(backbone) | as_theirs(head, shared, labelbook)
    content: dict = {"model": weights}
    if arguments is not None:
        content |= {"optimizer": {"state": {}}, "epoch": 11}
        content["args"] = argparse.Namespace(**arguments)
    torch.save(content, path)
    return path


def convert(source: Path, tmp_path: Path):
    out = tmp_path / "ours" / "model.safetensors"
    assert main(["convert", str(source), "--out", str(out)]) == 0
    return load_model(out)[0].eval(), read_meta(out)


def outputs(backbone, head):
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = head(backbone(pixels))
    return found.logits, found.boxes


def test_a_checkpoint_for_coco_keeps_the_80_categories(tmp_path, capsys):
    backbone, head = build(RESNET, 91, shared=True, levels=4)
    source = save(tmp_path / "checkpoint0011_4scale.pth", backbone, head, True, 91, ARGUMENTS)
    model, meta = convert(source, tmp_path)
    assert meta.classes == list(COCO.values()) and meta.category_ids == list(COCO)
    report = capsys.readouterr().out
    assert "80: person, bicycle" in report and "11 rows without a class left out" in report
    assert "re-initialised  nothing" in report
    rows = list(COCO)  # row i of the authors' classifiers is COCO's id i
    before, after = head.state_dict(), model.head.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        expected = before[name]
        if name == "denoising.classes.weight":
            assert torch.equal(tensor[:-1], expected[rows]) and tensor[-1].eq(0).all()
        else:
            expected = expected[rows] if "classes" in name else expected
            assert torch.equal(tensor, expected), name
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor), name


def test_options_come_from_weights_and_arguments(tmp_path):
    backbone, head = build(RESNET, 3, shared=True, levels=4)
    arguments = ARGUMENTS | dict(
        num_classes=3, dn_number=50, dn_box_noise_scale=1.0, cls_loss_coef=2.0, num_select=200,
        nms_iou_threshold=0.7, use_detached_boxes_dec_out=True,
    )  # fmt: skip
    model, _ = convert(save(tmp_path / "x.pth", backbone, head, True, 91, arguments), tmp_path)
    ours = model.head
    assert (ours.denoising.queries, ours.denoising.box_noise) == (50, 1.0)
    assert ours.criterion.weights["class"] == 2.0
    assert (ours.max_detections, ours.nms, ours.decoder.look_twice) == (200, 0.7, False)
    assert len(ours.decoder.predictors) == 1
    for found, expected in zip(outputs(model.backbone, ours), outputs(backbone, head), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # the book of labels is larger than the classes of a fine-tuned model
    assert torch.equal(ours.denoising.classes.weight[:3], head.denoising.classes.weight[:3])


def test_weights_alone_with_swin_five_levels_and_a_predictor_for_each_layer(tmp_path, capsys):
    backbone, head = build(SWIN, 5, shared=False, levels=5)
    # without arguments the published number of heads is assumed
    head = DinoHead(
        backbone.levels,
        5,
        input_levels=[0, 1, 2, 3],
        num_levels=5,
        **(SMALL | dict(heads=8, points=1)),
    ).eval()
    source = save(tmp_path / "weights.pth", backbone, head, False, 5, None)
    model, meta = convert(source, tmp_path)
    assert meta.classes == [f"class {i}" for i in range(5)]
    assert [level.stride for level in model.backbone.levels] == [4, 8, 16, 32]
    assert "relative_position_index (5): is computed" in capsys.readouterr().out
    for found, expected in zip(
        outputs(model.backbone, model.head), outputs(backbone, head), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_references_that_are_learned(tmp_path):
    backbone, head = build(RESNET, 3, shared=True, levels=4, two_stage=False)
    model, _ = convert(save(tmp_path / "x.pth", backbone, head, True, 91, ARGUMENTS), tmp_path)
    for found, expected in zip(
        outputs(model.backbone, model.head), outputs(backbone, head), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_trained_without_denoising(tmp_path, capsys):
    backbone, head = build(RESNET, 3, shared=False, levels=4)
    arguments = ARGUMENTS | dict(dn_number=0)
    model, _ = convert(save(tmp_path / "x.pth", backbone, head, False, 91, arguments), tmp_path)
    assert model.head.denoising is None
    assert "label_enc.weight: is for denoising, which was off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pe_temperatureH=10000), "pe_temperatureH is 10000; only 20"),
        (dict(two_stage_learn_wh=True), "two_stage_learn_wh is True; only False"),
        (dict(decoder_module_seq=["ca", "sa", "ffn"]), "decoder_module_seq is"),
    ],
)
def test_another_design_is_refused(tmp_path, capsys, change, message):
    backbone, head = build(RESNET, 3, shared=True, levels=4)
    source = save(tmp_path / "x.pth", backbone, head, True, 91, ARGUMENTS | change)
    assert main(["convert", str(source), "--out", str(tmp_path / "out.safetensors")]) != 0
    assert message in capsys.readouterr().err


def test_another_backbone_is_refused(tmp_path, capsys):
    _, head = build(RESNET, 3, shared=True, levels=4)
    weights = as_theirs(head, True, 91) | {"backbone.0.stages.0.0.gamma": torch.ones(4)}
    torch.save({"model": weights}, tmp_path / "x.pth")
    arguments = ["convert", str(tmp_path / "x.pth"), "--out", str(tmp_path / "out.safetensors")]
    assert main(arguments) != 0
    assert "neither a ResNet nor a Swin" in capsys.readouterr().err


CONFIG = DeformableDetrConfig(d_model=32, num_feature_levels=2, disable_custom_kernels=True)
SHAPES = [(4, 6), (2, 3)]
LOOKING = {"spatial_shapes": torch.tensor(SHAPES), "spatial_shapes_list": SHAPES}


class TheirEncoderLayer(nn.Module):
    """As the authors write it, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention(CONFIG, 4, 3)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.linear1, self.linear2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, cells, positions, points):
        points = points[:, :, None].expand(len(cells), -1, 2, -1)
        update, _ = self.self_attn(
            cells + positions, encoder_hidden_states=cells, reference_points=points, **LOOKING
        )
        cells = self.norm1(cells + update)
        return self.norm2(cells + self.linear2(F.relu(self.linear1(cells))))


class TheirDecoderLayer(nn.Module):
    """Self-attention with the second norm, cross-attention with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = Attention(CONFIG, 4, 3)
        self.self_attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(32) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, queries, places, boxes, memory):
        placed = queries + places
        queries = self.norm2(queries + self.self_attn(placed, placed, queries)[0])
        boxes = boxes[:, :, None].expand(-1, -1, 2, -1)
        update, _ = self.cross_attn(
            queries + places, encoder_hidden_states=memory, reference_points=boxes, **LOOKING
        )
        queries = self.norm1(queries + update)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


def fill(ours: nn.Module, theirs: nn.Module, kind: str) -> None:
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {f"transformer.{kind}.layers.0.{name}": x for name, x in theirs.state_dict().items()}
    found = rename(names, HEAD)
    ours.load_state_dict({name.removeprefix(f"{kind}.layers.0."): x for name, x in found.items()})


def test_renamed_layers_do_the_same():
    cells, positions = torch.randn(2, 30, 32), torch.randn(1, 30, 32)
    points = torch.rand(1, 30, 2)
    ours, theirs = DeformableEncoderLayer(32, 4, 48, 0.0, 2, 3), TheirEncoderLayer()
    fill(ours, theirs, "encoder")
    torch.testing.assert_close(
        ours(cells, positions, points, SHAPES), theirs(cells, positions, points), atol=1e-5, rtol=0
    )
    queries, places, boxes = torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.rand(2, 7, 4)
    ours, theirs = DeformableDecoderLayer(32, 4, 48, 0.0, 2, 3), TheirDecoderLayer()
    fill(ours, theirs, "decoder")
    torch.testing.assert_close(
        ours(queries, places, boxes, cells, SHAPES),
        theirs(queries, places, boxes, cells),
        atol=1e-5,
        rtol=0,
    )
