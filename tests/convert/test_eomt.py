"""Converted folders of EoMT answer as transformers does, in evaluation and in training."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)

from vitdense.convert.conversion import convert
from vitdense.convert.eomt import COCO_PANOPTIC
from vitdense.convert.source import ConversionError
from vitdense.engine import checkpoint

SIDE, BLOCKS = 64, 2
SIZES = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=16,
    num_blocks=BLOCKS, num_queries=7, num_labels=5,
)  # fmt: skip


def dinov2(**changes) -> nn.Module:
    return EomtForUniversalSegmentation(EomtConfig(**SIZES | changes))


def dinov3(**changes) -> nn.Module:
    usual = dict(intermediate_size=96, layer_norm_eps=1e-5, pos_embed_rescale=None)
    return EomtDinov3ForUniversalSegmentation(EomtDinov3Config(**SIZES | usual | changes))


FAMILIES = [dinov2, dinov3]


def save(model: nn.Module, folder: Path, masking: float = 0.0, **preparation) -> Path:
    """The model with random weights, as transformers saves it."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.attn_mask_probs.fill_(masking)
    model.save_pretrained(folder)
    if preparation:
        (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


def converted(source: Path) -> nn.Module:
    out = source.parent / "ours.safetensors"
    report = convert(str(source), out)
    assert not report.faults
    return checkpoint.load_model(out)[0]


def all_answers(theirs: nn.Module, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Class logits and masks of transformers wherever it predicts them."""
    found, predict = [], theirs.predict

    def record(tokens: Tensor) -> tuple[Tensor, Tensor]:
        found.append(predict(tokens))
        return found[-1]

    theirs.predict = record
    theirs(pixels)
    theirs.predict = predict
    return [logits for _, logits in found], [masks for masks, _ in found]


def compare(ours: nn.Module, theirs: nn.Module, training: bool, atol: float = 1e-4) -> int:
    """Assert equal answers; returns how many there are."""
    dtype = next(theirs.parameters()).dtype
    images = torch.randint(256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    images = images.to(dtype)
    with torch.no_grad():
        mine = ours.train(training)(images)
        logits, masks = all_answers(theirs.train(training), ours.normalize(images))
    assert mine.logits.std() > 0.1 and mine.masks[-1].std() > 0.1
    for a, b in zip(mine.logits, logits, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)
    for a, b in zip(mine.masks, masks, strict=True):
        torch.testing.assert_close(a, b, atol=atol * b.abs().max().item(), rtol=0)
    return len(logits)


@pytest.mark.parametrize("build", FAMILIES)
def test_without_masking_in_both_modes_and_precisions(build, tmp_path):
    theirs = build()
    ours = converted(save(theirs, tmp_path / "theirs"))
    assert compare(ours, theirs, training=False) == 1
    ours.progress = 1.0
    assert compare(ours, theirs, training=True) == BLOCKS + 1
    compare(copy.deepcopy(ours).double(), copy.deepcopy(theirs).double(), False, atol=1e-8)


@pytest.mark.parametrize("build", FAMILIES)
def test_with_masking_in_both_modes(build, tmp_path):
    theirs = build()
    ours = converted(save(theirs, tmp_path / "theirs", masking=1.0))
    assert ours.masking == "always"
    for training in (False, True):
        assert compare(ours, theirs, training) == BLOCKS + 1


def test_the_start_of_annealing_is_masking(tmp_path):
    theirs = dinov2()
    ours = converted(save(theirs, tmp_path / "theirs"))
    theirs.attn_mask_probs.fill_(1.0)
    ours.progress = 0.0
    compare(ours, theirs, training=True)
    theirs.attn_mask_probs.copy_(torch.tensor([0.0, 1.0]))
    ours.progress = 0.5
    compare(ours, theirs, training=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_swiglu_ffn=True),
        dict(num_register_tokens=0, num_upscale_blocks=1, mlp_ratio=3),
        dict(patch_size=8, num_register_tokens=2, num_blocks=4),
    ],
)
def test_other_shapes(changes, tmp_path):
    theirs = dinov2(**changes)
    compare(converted(save(theirs, tmp_path / "theirs")), theirs, training=False)


def test_older_names_of_gated_blocks(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = dinov2(use_swiglu_ffn=True)
    file = save(theirs, tmp_path / "theirs") / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".mlp.up_proj" in name]:
        gate = name.replace("up_proj", "gate_proj")
        joined = torch.cat((tensors.pop(gate), tensors.pop(name)))
        tensors[name.replace("up_proj", "weights_in")] = joined
    renamed = {name.replace("down_proj", "weights_out"): t for name, t in tensors.items()}
    save_file(renamed, file)
    compare(converted(file.parent), theirs, training=False)


def test_coco_panoptic_knows_its_classes_and_things(tmp_path):
    ours = converted(save(dinov2(num_labels=133), tmp_path / "theirs"))
    meta = checkpoint.read_meta(tmp_path / "ours.safetensors")
    assert ours.task == "panoptic"
    assert meta.classes == list(COCO_PANOPTIC.values()) and len(meta.classes) == 133
    assert meta.category_ids == sorted(COCO_PANOPTIC)
    assert ours.head.things.tolist() == [True] * 80 + [False] * 53


def test_coco_instances(tmp_path):
    ours = converted(save(dinov2(num_labels=80), tmp_path / "theirs"))
    meta = checkpoint.read_meta(tmp_path / "ours.safetensors")
    assert ours.task == "instance" and meta.classes[0] == "person"


def test_images_that_are_cut_are_semantic(tmp_path):
    source = save(dinov2(num_labels=150), tmp_path / "theirs", do_split_image=True)
    assert converted(source).task == "semantic"
    meta = checkpoint.read_meta(tmp_path / "ours.safetensors")
    assert meta.category_ids == list(range(1, 151))


@pytest.mark.parametrize(
    "build, changes, message",
    [
        (dinov2, dict(hidden_act="relu"), "hidden_act is 'relu'"),
        (dinov2, dict(attention_dropout=0.1), "attention_dropout is 0.1"),
        (dinov3, dict(use_gated_mlp=True), "use_gated_mlp is True"),
        (dinov3, dict(layer_norm_eps=1e-6), "layer_norm_eps is 1e-06"),
    ],
)
def test_other_designs_are_refused(build, changes, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(str(save(build(**changes), tmp_path / "a")), tmp_path / "ours.safetensors")


def test_training_left_halfway_is_refused(tmp_path):
    source = save(dinov2(), tmp_path / "a", masking=0.25)
    with pytest.raises(ConversionError, match="before masking had faded"):
        convert(str(source), tmp_path / "ours.safetensors")
