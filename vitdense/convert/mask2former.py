"""transformers' Mask2Former into the `mask2former` head."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import COCO, Classes, of_pixels
from vitdense.convert.detr import LAYERS
from vitdense.convert.eomt import COCO_PANOPTIC, labels
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source, require

LEVELS = 3
"""Maps that attention reads, in transformers always three."""

PIXELS: Rules = [
    # theirs go from the coarsest map to the finest
    (r"^input_projections\.(\d)", lambda m: f"inputs.{LEVELS - 1 - int(m[1])}"),
    (r"^adapter_(\d)", lambda m: f"fpn.{int(m[1]) - 1}.lateral"),
    (r"^layer_(\d)", lambda m: f"fpn.{int(m[1]) - 1}.smooth"),
    (r"^mask_projection", "project"),
    (r"^level_embed", "encoder.level_embed"),
    (r"\.sampling_offsets", ".offsets"),
    (r"\.attention_weights", ".weights"),
    *LAYERS,
]
"""Of the pixel decoder."""

QUERIES: Rules = [
    (r"^queries_embedder", "places"),
    (r"^queries_features", "queries"),
    (r"^decoder\.layernorm", "predictor.norm"),
    (r"^decoder\.mask_predictor\.mask_embedder\.(\d)\.0", r"predictor.masks.layers.\1"),
    (r"^decoder\.", ""),
    (r"\.cross_attn\.in_proj_", ".cross_attention.{query,key,value}."),
    (r"\.cross_attn\.", ".cross_attention."),
    (r"\.cross_attn_layer_norm", ".cross_norm"),
    *LAYERS,
]
"""Of the transformer decoder."""

ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60,
    61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131,
    140, 141, 145,
)  # fmt: skip
"""Which of its 150 classes are no things, as its panoptic truth has it."""

THINGS = {
    ("person", len(COCO_PANOPTIC)): range(len(COCO)),
    ("wall", 150): sorted(set(range(150)) - set(ADE20K_STUFF)),
    ("road", 19): range(11, 19),
}
"""Classes that are things, by name of the first and number of all: COCO, ADE20K, Cityscapes."""

DATASETS: dict[str, dict[str, Any]] = {
    "instance": {"name": "coco", "masks": True},
    "panoptic": {"name": "coco_panoptic"},
}

RECIPE: dict[str, Any] = {
    "train": {"epochs": 12, "batch_size": 8, "clip": 0.01},
    "optimizer": {"lr": 1e-4, "weight_decay": 0.05, "backbone_scale": 0.1},
    "schedule": {"name": "poly", "power": 0.9, "warmup": 0.02},
}
"""The optimizer of the published models."""


USUAL: dict[str, Any] = {
    "activation_function": "relu",
    "pre_norm": False,
    "enforce_input_projection": False,
    "common_stride": 4,
    "feature_strides": [4, 8, 16, 32],
}
"""What its options must be."""


class Mask2Former(Family):
    """`Mask2FormerForUniversalSegmentation`."""

    title = "transformers' Mask2Former"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "mask2former"

    def plan(self, source: Source) -> Plan:
        config = source.config
        width = config.get("hidden_dim", 256)
        sizes = {"feature_size": width, "mask_feature_size": width}
        require(config, source.name, **USUAL, **sizes)
        task = task_of(source)
        head = {
            "name": "mask2former",
            "task": task,
            "num_levels": LEVELS,
            "queries": config.get("num_queries", 100),
            "width": width,
            "heads": config.get("num_attention_heads", 8),
            "encoder_layers": config.get("encoder_layers", 6),
            "encoder_ffn": config.get("encoder_feedforward_dim", 1024),
            "decoder_layers": config.get("decoder_layers", 10) - 1,  # theirs counts predictions
            "ffn": config.get("dim_feedforward", 2048),
            "dropout": config.get("dropout", 0.0),
            "class_weight": config.get("class_weight", 2.0),
            "mask_weight": config.get("mask_weight", 5.0),
            "dice_weight": config.get("dice_weight", 5.0),
            "background": config.get("no_object_weight", 0.1),
            "mask_points": config.get("train_num_points", 12544),
        }
        backbone = backbones.plan(source)
        if len(backbone["out_indices"]) != LEVELS + 1:
            raise ConversionError(
                f"{source.name}: its backbone gives {len(backbone['out_indices'])} maps; only "
                "models that read four can be converted"
            )
        transforms = preparation.detection(source)
        if task == "semantic":
            transforms = preparation.segmentation(source, 512)
        classes, dataset = classes_of(source, task)
        model = {"backbone": backbone, "neck": "none", "head": head}
        fresh = {r"^head\.things$": "is in no file: all classes count as things"}
        return Plan(model, classes, transforms, fresh, dataset, RECIPE)

    def fill(self, source: Source, weights: Weights) -> None:
        weights.drop(r"^criterion\.empty_weight$", "is the option `background`")
        backbones.fill(source, weights, within="model.pixel_level_module.encoder.")
        pixels = "model.pixel_level_module.decoder."
        weights.rename(PIXELS, within=pixels, into="head.pixel_decoder.")
        weights.rename(QUERIES, within="model.transformer_module.", into="head.decoder.")
        weights.rename([], within="class_predictor", into="head.decoder.predictor.classes")
        things = things_of(source)
        if things is not None:
            weights.found["head.things"] = things
            weights.origin["head.things"] = ["config.json"]


def task_of(source: Source) -> str:
    """What it was trained for: no config says it, but the names of the public models do.

    By default what most models with as many classes are for.
    """
    said = re.findall("semantic|instance|panoptic", source.name)
    if said:
        return said[-1]
    usual = {len(COCO_PANOPTIC): "panoptic", 150: "semantic", 19: "semantic"}
    return usual.get(len(labels(source)), "instance")


def classes_of(source: Source, task: str) -> tuple[Classes, dict[str, Any]]:
    """The classes, and the data set that has them; COCO's have COCO's ids."""
    if task == "semantic":
        first = preparation.first_label(source)
        return of_pixels(source.config, first), {"name": "ade20k", "reduce_zero_label": bool(first)}
    found = of_pixels(source.config, first=0)
    for categories in (COCO, COCO_PANOPTIC):
        if found.names == list(categories.values()):
            found = Classes(found.names, list(categories), found.rows, found.count)
    return found, DATASETS[task]


def things_of(source: Source) -> Tensor | None:
    """Which classes are things, bool [C]; None if that is not known."""
    names = labels(source)
    numbers = THINGS.get((names.get(0, ""), len(names)))
    if numbers is None:
        return None
    things = torch.zeros(len(names), dtype=torch.bool)
    things[list(numbers)] = True
    return things
