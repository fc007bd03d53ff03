"""Converted folders of LW-DETR and RF-DETR answer as transformers does, from pixels on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
)
from transformers.models.lw_detr import modeling_lw_detr
from transformers.models.rf_detr import modeling_rf_detr

from vitdense.convert.conversion import convert
from vitdense.convert.lwdetr import PROJECTOR
from vitdense.convert.names import rename
from vitdense.convert.source import ConversionError
from vitdense.engine import checkpoint
from vitdense.layers.position import box_embedding
from vitdense.necks.projector import MultiScaleProjector
from vitdense.structures import Level

SIZE, PATCH, GROUPS, QUERIES = 128, 16, 3, 10
VIT = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=1, patch_size=PATCH)
SIZES = dict(
    d_model=32, decoder_self_attention_heads=4, decoder_cross_attention_heads=8,
    decoder_n_points=2, decoder_ffn_dim=48, decoder_layers=2, num_queries=QUERIES,
    group_detr=GROUPS, num_labels=5, dropout=0.0,
)  # fmt: skip


def lw_detr(trained: int = SIZE, **changes) -> nn.Module:
    """`trained` is the size of images that the positions are of."""
    backbone = LwDetrViTConfig(
        **VIT, num_windows=4, image_size=SIZE, pretrain_image_size=trained, out_indices=[2, 4, 5],
        window_block_indices=[0, 2, 3],
    )  # fmt: skip
    config = LwDetrConfig(
        backbone_config=backbone, **dict(projector_scale_factors=[2.0, 0.5]) | SIZES | changes
    )
    return LwDetrForObjectDetection(config)


def rf_detr(trained: int = SIZE, kind: type = RfDetrForObjectDetection, **changes) -> nn.Module:
    backbone = dict(
        model_type="rf_detr_dinov2", **VIT, num_windows=2, image_size=trained, out_indices=[2, 4, 5]
    )
    return kind(RfDetrConfig(backbone_config=backbone, **SIZES | changes))


def save(model: nn.Module, folder: Path) -> Path:
    """The model with random weights and statistics, as transformers saves it."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    model.save_pretrained(folder)
    preparation = {"do_normalize": True, "size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


def compare(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    dtype = next(theirs.parameters()).dtype
    pixels = torch.randint(256, (2, 3, SIZE, SIZE)).to(dtype)
    for training in (False, True):
        with torch.no_grad():
            outputs = ours.train(training)(pixels)
            expected = theirs.train(training)(ours.normalize(pixels))
        close = dict(atol=tolerance, rtol=0)
        assert outputs.logits.shape[2] == (GROUPS if training else 1) * QUERIES
        torch.testing.assert_close(outputs.logits[-1], expected.logits, **close)
        torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, **close)


def converted(source: Path) -> nn.Module:
    out = source.parent / "ours.safetensors"
    report = convert(str(source), out)
    assert not report.faults and not report.fresh
    return checkpoint.load_model(out)[0]


@pytest.mark.parametrize("trained", [SIZE, 96])
@pytest.mark.parametrize("build", [lw_detr, rf_detr])
def test_converted_folders_answer_the_same(build, trained, tmp_path):
    theirs = build(trained)
    compare(converted(save(theirs, tmp_path / "theirs")), theirs, 1e-4)


@pytest.mark.parametrize("build", [lw_detr, rf_detr])
def test_converted_folders_answer_the_same_in_double_precision(build, tmp_path, monkeypatch):
    def embed_exactly(boxes: Tensor, num_pos_feats: int) -> Tensor:
        return box_embedding(boxes[..., [1, 0, 2, 3]], num_pos_feats)

    for module in (modeling_lw_detr, modeling_rf_detr):
        # transformers takes the frequencies in float32 whatever the model's type
        monkeypatch.setattr(module, "encode_sinusoidal_position_embedding", embed_exactly)
    theirs = build()
    ours = converted(save(theirs, tmp_path / "theirs"))
    compare(ours.double(), theirs.double(), 1e-8)


def test_names_of_memory_convert_as_those_of_files(tmp_path):
    for build in (lw_detr, rf_detr):
        theirs = build()
        folder = save(theirs, tmp_path / build.__name__)
        expected = converted(folder).state_dict()
        save_file(theirs.state_dict(), folder / "model.safetensors")
        torch.testing.assert_close(converted(folder).state_dict(), expected, atol=0, rtol=0)


ARGUMENTS = dict(
    encoder="dinov2_windowed_small", out_feature_indexes=[2, 4, 5], sa_nheads=4, ca_nheads=8,
    dec_n_points=2, projector_scale=["P4"], num_windows=2, resolution=SIZE, num_classes=4,
)  # fmt: skip


def checkpoint_of_rf_detr(theirs: nn.Module, folder: Path, **changes) -> Path:
    """What RF-DETR's own training writes: the names are those of transformers' files."""
    weights = load_file(save(theirs, folder / "theirs") / "model.safetensors")
    path = folder / "rf-detr.pth"
    arguments = argparse.Namespace(
        **{k: v for k, v in (ARGUMENTS | changes).items() if v is not None}
    )
    torch.save({"model": weights, "args": arguments}, path)
    return path


def test_checkpoints_of_rf_detr_answer_the_same(tmp_path):
    theirs = rf_detr(layer_norm_eps=1e-6)
    path = checkpoint_of_rf_detr(theirs, tmp_path)
    ours = converted(path)
    compare(ours, theirs, 1e-4)
    meta = checkpoint.read_meta(tmp_path / "ours.safetensors")
    assert meta.classes == [f"class {i}" for i in range(5)]
    assert "size: 128" in meta.config


@pytest.mark.parametrize("names, first", [(None, "person"), (["keyboard", "mouse"], "class 0")])
def test_rows_for_coco_are_not_its_classes_where_others_were_learned(names, first, tmp_path):
    path = checkpoint_of_rf_detr(rf_detr(num_labels=91), tmp_path, class_names=names)
    converted(path)
    assert checkpoint.read_meta(tmp_path / "ours.safetensors").classes[0] == first


def test_several_scales_of_rf_detr_have_a_place():
    # transformers has none, so the names are checked alone: those of the large model of 2025
    neck = MultiScaleProjector([Level(24, 14)] * 2, scales=(2.0, 0.5), channels=8, blocks=1)
    names = [
        "stages.1.0.cv1.conv.weight",
        "stages.1.0.m.0.cv2.bn.bias",
        "stages.0.0.cv2.bn.weight",
        "stages.0.1.weight",
        "stages_sampling.0.1.0.bias",
        "stages_sampling.1.1.0.conv.weight",
        "stages_sampling.1.0.0.bn.weight",
    ]
    ours = rename({name: torch.zeros(()) for name in names}, PROJECTOR)
    assert len(ours) == len(names) and ours.keys() < neck.state_dict().keys()


def test_models_for_masks_become_detectors(tmp_path):
    theirs = rf_detr(kind=RfDetrForInstanceSegmentation)
    source = save(theirs, tmp_path / "theirs")
    report = convert(str(source), tmp_path / "ours.safetensors")
    assert "makes masks" in str(report)
    compare(checkpoint.load_model(tmp_path / "ours.safetensors")[0], theirs, 1e-4)


def test_the_report_tells_what_is_left_out(tmp_path):
    text = str(convert(str(save(rf_detr(), tmp_path / "a")), tmp_path / "ours.safetensors"))
    assert "mask_token: stands for hidden patches in pretraining" in text
    assert "encoder.layer.*" in text or "encoder.layer.5" in text
    assert "lies behind the last map that is read" in text
    assert "re-initialised  nothing" in text


@pytest.mark.parametrize(
    "build, changes, message",
    [
        (rf_detr, dict(activation_function="relu"), "activation_function is 'relu'"),
        (lw_detr, dict(decoder_activation_function="gelu"), "only 'relu' can be converted"),
        (lw_detr, dict(hidden_expansion=1.0), "hidden_expansion is 1.0"),
    ],
)
def test_other_designs_are_refused(build, changes, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(str(save(build(**changes), tmp_path / "a")), tmp_path / "ours.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sa_nheads=None), "holds no arguments sa_nheads beside its weights"),
        (dict(bbox_reparam=False), "bbox_reparam is off"),
        (dict(encoder="dinov2_registers_windowed_small"), "encoder is 'dinov2_registers"),
        (dict(projector_scale=["P2"]), "projector_scale is"),
    ],
)
def test_other_checkpoints_are_refused(changes, message, tmp_path):
    path = checkpoint_of_rf_detr(rf_detr(), tmp_path, **changes)
    with pytest.raises(ConversionError, match=message):
        convert(str(path), tmp_path / "ours.safetensors")
