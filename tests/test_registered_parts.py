"""Every registered part passes the conformance kit."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data import trees
from vitdense.registry import (
    BACKBONES,
    DATASETS,
    HEADS,
    NECKS,
    REGISTRIES,
    TRANSFORMS,
)
from vitdense.structures import Level
from vitdense.testing import (
    check_backbone,
    check_dataset,
    check_head,
    check_metric,
    check_model,
    check_neck,
    check_policy,
)

PLAIN = [Level(24, 16)] * 4
SMALL_DETR = {"queries": 12, "width": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2}
BLOCKS = [24, 16, 12, 8, 8]
SMP = {
    "unet": BLOCKS, "unetplusplus": BLOCKS, "manet": BLOCKS, "linknet": 8, "fpn": 32, "pspnet": 16,
    "pan": 16, "deeplabv3": 16, "deeplabv3plus": 16, "upernet": 16, "segformer": 16,
}  # fmt: skip
MASK2FORMER = SMALL_DETR | {"ffn": 48, "encoder_ffn": 48, "mask_points": 64}
EOMT = {
    "backbone": partial(BACKBONES.get("timm"), model="vit_tiny_patch16_224", img_size=64,
                        options={"depth": 4, "embed_dim": 48}),
    "queries": 12, "blocks": 2, "mask_points": 64,
}  # fmt: skip

# For each part the options that keep it small; several entries try several ways to use it.
SMALL: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "backbone": [
        ("timm", {"model": "vit_tiny_patch16_224", "img_size": 64, "options": {"depth": 4}}),
        ("timm", {"model": "swin_tiny_patch4_window7_224", "img_size": (64, 96),
                  "options": {"depths": (1, 1, 1, 1), "embed_dim": 24}}),
        ("timm", {"model": "resnet10t", "in_chans": 4}),
        ("presnet", {"options": {"layers": (1, 1, 1, 1)}, "frozen": 1}),
    ],
    "neck": [
        ("none", {}),
        ("fpn", {"channels": 16, "extra_levels": 1}),
        ("simple_feature_pyramid", {"channels": 16, "levels": PLAIN}),
        ("multi_scale_projector", {"channels": 16, "levels": PLAIN, "scales": (2.0, 1.0, 0.5)}),
        ("multi_scale_projector", {"channels": 16, "levels": PLAIN, "norm": "batch"}),
        ("multilevel", {"channels": 16, "levels": PLAIN}),
        ("feature2pyramid", {"levels": PLAIN}),
    ],
    "head": [
        ("linear", {}),
        ("upernet", {"channels": 16}),
        ("segformer", {"channels": 16}),
        ("segmenter", {"width": 48, "heads": 2}),
        ("dpt", {"channels": 16}),
        ("dpt", {"channels": 16, "levels": PLAIN, "readout": "project"}),
        *(("smp", {"decoder": name, "channels": channels}) for name, channels in SMP.items()),
        *(("mask2former", MASK2FORMER | {"task": task})
          for task in ("semantic", "instance", "panoptic")),
        ("mask2former", MASK2FORMER | {"encoder_layers": 0, "num_levels": 2, "levels": PLAIN[:1]}),
        ("detr", SMALL_DETR),
        ("detr", SMALL_DETR | {"query_kind": "conditional"}),
        ("detr", SMALL_DETR | {"query_kind": "dab"}),
        ("deformable_detr", SMALL_DETR),
        ("lwdetr", {"queries": 12, "width": 32, "heads": 4, "cross_heads": 8, "ffn": 48,
                    "decoder_layers": 2, "groups": 3}),
        ("rtdetr", SMALL_DETR),
        ("rtdetr", SMALL_DETR | {"points": [1, 2, 3], "norm": "group", "denoising": 0}),
        ("rtdetr", SMALL_DETR | {"two_stage": False, "denoising": 8}),
        ("rtdetr", SMALL_DETR | {"box_refinement": False, "train_all_cells": True}),
        ("rtdetr", SMALL_DETR | {"distribution": True, "fusion": "elan", "denoising": 8}),
        ("dino", SMALL_DETR | {"denoising": 8, "num_levels": 3, "ffn": 48}),
    ],
    "model": [
        ("pyramid", {
            "backbone": partial(BACKBONES.get("timm"), model="vit_tiny_patch16_224", img_size=64,
                                options={"depth": 4}),
            "neck": partial(NECKS.get("simple_feature_pyramid"), channels=16),
            "head": HEADS.get("linear"),
        }),
        *(("eomt", EOMT | {"task": task}) for task in ("semantic", "instance", "panoptic")),
        ("eomt", EOMT | {"masking": "always", "upscale": 0}),
    ],
    "dataset": [
        ("shapes", {"task": "detection"}),
        ("shapes", {"task": "instance"}),
        ("shapes", {"task": "semantic"}),
        ("shapes", {"task": "panoptic"}),
        ("coco", {}),
        ("coco", {"masks": True}),
        ("lvis", {"masks": True}),
        ("ade20k", {}),
        ("ade20k_instance", {}),
        ("coco_panoptic", {}),
        ("coco_panoptic", {"task": "semantic"}),
        *(("cityscapes", {"task": task}) for task in ("semantic", "instance", "panoptic")),
        *(("voc", {"task": task}) for task in ("semantic", "instance", "detection")),
        ("folders", {"binary": True}),
    ],
    "transform": [
        ("detection", {"size": 64}),
        ("detection", {"size": (48, 80), "resize": "keep_ratio", "jitter": (0.1, 2.0)}),
        ("segmentation", {"size": 64, "crop": 48}),
        ("segmentation", {"size": 64, "crop": 48, "evaluation": "stretch"}),
        ("short_side", {"size": 48, "longest": 80}),
        ("none", {}),
    ],
    "metric": [
        ("coco", {}),
        ("coco", {"iou_type": "segm"}),
        ("coco", {"iou_type": "boundary"}),
        ("voc", {}),
        ("voc", {"points": 11, "inclusive": True}),
        ("lvis", {}),
        ("lvis", {"iou_type": "segm"}),
        ("miou", {}),
        ("miou", {"absent": "zero"}),
        ("panoptic", {}),
        ("panoptic", {"things": ["square"]}),
    ],
}  # fmt: skip

CHECKS = {
    "backbone": check_backbone,
    "neck": check_neck,
    "head": check_head,
    "model": check_model,
    "transform": check_policy,
    "metric": check_metric,
}

CASES = [(kind, name, options) for kind in CHECKS for name, options in SMALL[kind]]


def name_of(case: Any) -> str | None:
    return case if isinstance(case, str) else None


@pytest.mark.parametrize("kind", SMALL)
def test_no_part_is_left_out(kind):
    built_in = {
        name
        for name in REGISTRIES[kind].names()
        if REGISTRIES[kind].resolve(name)[0].module.startswith("vitdense.")
    }
    assert built_in == {name for name, _ in SMALL[kind]}


@pytest.mark.parametrize(("kind", "name", "options"), CASES, ids=name_of)
def test_conforms(kind, name, options):
    CHECKS[kind](REGISTRIES[kind].get(name), **options)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["detection", "segmentation", "none"])
def test_policies_take_other_channels(name, channels):
    check_policy(TRANSFORMS.get(name), channels=channels)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A small set in each format; the reading of shapes makes its own."""
    coco = tmp_path_factory.mktemp("coco")
    labels = tmp_path_factory.mktemp("ade20k")
    pixels = np.random.default_rng(0).integers(0, 4, (30, 40, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.jpg"):
        for folder in (coco / "images" / "train", labels / "images" / "train"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels * 60).save(folder / name)
        folder = labels / "annotations" / "train"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(folder / name.replace("jpg", "png"))
    (labels / "classes.txt").write_text("sky\nroad\ntree\n")
    square = [2, 3, 22, 3, 22, 13, 2, 13]
    (coco / "annotations").mkdir()
    (coco / "annotations" / "instances_train.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": n, "height": 30, "width": 40}
                   for i, n in ((4, "a.jpg"), (9, "b.jpg"))],
        "annotations": [{"id": 1, "image_id": 9, "category_id": 17, "bbox": [2, 3, 20, 10],
                         "area": 200, "iscrowd": 0, "segmentation": [square]}],
        "categories": [{"id": 17, "name": "cat"}],
    }))  # fmt: skip
    folders = trees.make_folders(tmp_path_factory.mktemp("folders"), trees.columns(0, 255))
    (folders / "classes.txt").write_text("crack\n")
    makers = {
        "ade20k_instance": trees.make_ade_instance,
        "coco_panoptic": trees.make_panoptic,
        "cityscapes": trees.make_cityscapes,
        "lvis": trees.make_lvis,
        "voc": trees.make_voc,
    }
    made = {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}
    shapes = tmp_path_factory.mktemp("shapes")
    return made | {"coco": coco, "ade20k": labels, "shapes": shapes, "folders": folders}


@pytest.mark.parametrize(("name", "options"), SMALL["dataset"], ids=str)
def test_datasets_conform(name, options, roots):
    if name == "shapes":
        options = {**options, "images": 12, "size": 64}
    check_dataset(DATASETS.get(name), roots[name], "train", samples=3, **options)
