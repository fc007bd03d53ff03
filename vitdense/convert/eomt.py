"""transformers' EoMT, on DINOv2 with registers and on DINOv3."""

from __future__ import annotations

from typing import Any

import torch

from vitdense.convert import preparation
from vitdense.convert.classes import COCO, Classes, of_pixels
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source, require

Config = dict[str, Any]

COCO_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain",
    112: "door-stuff", 118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house",
    130: "light", 133: "mirror-stuff", 138: "net", 141: "pillow", 144: "platform",
    145: "playingfield", 147: "railroad", 148: "river", 149: "road", 151: "roof", 154: "sand",
    155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other",
    180: "window-blind", 181: "window-other", 184: "tree-merged", 185: "fence-merged",
    186: "ceiling-merged", 187: "sky-other-merged", 188: "cabinet-merged", 189: "table-merged",
    190: "floor-other-merged", 191: "pavement-merged", 192: "mountain-merged", 193: "grass-merged",
    194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
"""COCO's stuff in its panoptic truth, by id; behind its things."""

COCO_PANOPTIC = COCO | COCO_STUFF

HEAD: Rules = [
    (r"^query\.", "queries."),
    (r"^class_predictor\.", "classes."),
    (r"^mask_head\.fc(\d)", lambda m: f"masks.{2 * int(m[1]) - 2}"),
    (r"^upscale_block\.block\.", "upscale."),
    (r"\.conv1\.", ".expand."),
    (r"\.conv2\.", ".mix."),
    (r"\.layernorm2d\.", ".norm."),
]

BLOCKS: list[tuple[str, str]] = [
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.patch_embeddings(\.projection)?\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.attention\.q_proj", ".attn.qkv[0]"),
    (r"\.attention\.k_proj", ".attn.qkv[1]"),
    (r"\.attention\.v_proj", ".attn.qkv[2]"),
    (r"\.attention\.(out|o)_proj", ".attn.proj"),
]
"""Of the backbone, in both families."""

DINOV2: Rules = [
    *BLOCKS,
    (r"^embeddings\.position_embeddings\.weight", "pos_embed"),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj", ".mlp.fc1[0]"),
    (r"\.mlp\.up_proj", ".mlp.fc1[1]"),
    (r"\.mlp\.weights_in", ".mlp.fc1"),  # in older files
    (r"\.mlp\.(down_proj|weights_out)", ".mlp.fc2"),
    (r"^", "model."),
]

DINOV3: Rules = [
    (r"\.attention\.([qv])_proj\.bias", r".attn.\1_bias"),
    *BLOCKS,
    (r"\.layer_scale(\d)\.lambda1", r".gamma_\1"),
    (r"\.mlp\.up_proj", ".mlp.fc1"),
    (r"\.mlp\.down_proj", ".mlp.fc2"),
    (r"^", "model."),
]

SIZES: dict[tuple[int, ...], str] = {
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
}
"""By width, depth and heads."""

GIANT: dict[tuple[int, ...], str] = {(1536, 40, 24): "giant"}
"""DINOv2's, with gated MLPs."""

DINOV3_USUAL: Config = {
    "layer_norm_eps": 1e-5,
    "use_gated_mlp": False,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}
"""What the options of DINOv3 must be."""

RECIPE: Config = {
    "train": {"epochs": 12, "batch_size": 16, "precision": "auto", "clip": 0.01},
    "optimizer": {"lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.8},
    "schedule": {"name": "poly", "power": 0.9, "warmup": 0.02},
}
"""The published one on COCO."""


class Eomt(Family):
    """`EomtForUniversalSegmentation`."""

    title = "transformers' EoMT"
    names = DINOV2

    def recognises(self, source: Source) -> bool:
        return source.model_type == "eomt"

    def plan(self, source: Source) -> Plan:
        config = source.config
        usual = {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_dropout": 0.0}
        require(config, source.name, **usual)
        task, classes, dataset = answers(source)
        backbone = self.backbone(source) | preparation.statistics(source)
        model = {
            "name": "eomt",
            "backbone": {"name": "timm", "in_chans": config.get("num_channels", 3), **backbone},
            "task": task,
            "queries": config.get("num_queries", 200),
            "blocks": config.get("num_blocks", 4),
            "upscale": config.get("num_upscale_blocks", 2),
            "masking": masking(source),
            "class_weight": config.get("class_weight", 2.0),
            "mask_weight": config.get("mask_weight", 5.0),
            "dice_weight": config.get("dice_weight", 5.0),
            "background": config.get("no_object_weight", 0.1),
            "mask_points": config.get("train_num_points", 12544),
        }
        side = config.get("image_size", 640)
        transforms: Config = {"name": "detection", "size": side, "resize": "keep_ratio"}
        if task == "semantic":
            transforms = preparation.segmentation(source, side)
        fresh = {r"^head\.things$": "all are things until a data set says otherwise"}
        return Plan(model, classes, transforms, fresh, dataset, RECIPE)

    def backbone(self, source: Source) -> Config:
        """Options of `timm` for DINOv2."""
        config = source.config
        require(config, source.name, layer_norm_eps=1e-6)
        gated, ratio = config.get("use_swiglu_ffn", False), config.get("mlp_ratio", 4)
        size, options = shape(config, GIANT if gated else SIZES, "reg_tokens")
        if gated and (options or ratio != 4):
            width = config.get("hidden_size", 1024)
            hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
            options["mlp_ratio"] = 2 * hidden / width
        elif ratio != 4:
            options["mlp_ratio"] = ratio
        return {
            "model": f"vit_{size}_patch14_reg4_dinov2",
            "img_size": config.get("image_size", 640),
            "patch_size": config.get("patch_size", 16),
            "drop_path": config.get("drop_path_rate", 0.0),
            "options": options,
        }

    def fill(self, source: Source, weights: Weights) -> None:
        weights.drop(r"^criterion\.", "is in the option `background`")
        weights.drop(r"^attn_mask_probs$", "is in the option `masking`")
        if not source.config.get("num_register_tokens", 4):
            weights.drop(r"^embeddings\.register_tokens$", "there are none")
        for part in ("query.", "class_predictor.", "mask_head.", "upscale_block."):
            weights.rename([(r"^", part), *HEAD, (r"^", "head.")], within=part)
        weights.rename(self.names, into="backbone.")
        weights.change(r"pos_embed$", lambda table: table[None])
        if (count := len(labels(source))) == len(COCO_PANOPTIC):
            weights.found["head.things"] = torch.arange(count) < len(COCO)
            weights.origin["head.things"] = ["config.json"]


class EomtDinov3(Eomt):
    """`EomtDinov3ForUniversalSegmentation`, whole: the published files are differences."""

    title = "transformers' EoMT on DINOv3"
    names = DINOV3

    def recognises(self, source: Source) -> bool:
        return source.model_type == "eomt_dinov3"

    def backbone(self, source: Source) -> Config:
        """Options of `timm` for DINOv3."""
        config = source.config
        options = {**(config.get("rope_parameters") or {}), **config}
        require(options, source.name, **DINOV3_USUAL)
        size, options = shape(config, SIZES, "num_reg_tokens")
        width, hidden = config.get("hidden_size", 1024), config.get("intermediate_size", 4096)
        if hidden != 4 * width:
            options["mlp_ratio"] = hidden / width
        return {
            "model": f"vit_{size}_patch16_dinov3_qkvb",
            "patch_size": config.get("patch_size", 16),
            "drop_path": config.get("drop_path_rate", 0.0),
            "options": options,
        }


def shape(config: Config, sizes: dict[tuple[int, ...], str], registers: str) -> tuple[str, Config]:
    """The size of timm's model, and the options that make another of it.

    Args:
        sizes: names by width, depth and heads.
        registers: timm's option for their number.
    """
    wanted = (
        config.get("hidden_size", 1024),
        config.get("num_hidden_layers", 24),
        config.get("num_attention_heads", 16),
    )
    options: Config = {}
    if wanted not in sizes:
        options = dict(zip(("embed_dim", "depth", "num_heads"), wanted, strict=True))
    if config.get("num_register_tokens", 4) != 4:
        options[registers] = config["num_register_tokens"]
    return sizes.get(wanted, next(iter(sizes.values()))), options


def masking(source: Source) -> str:
    """The option: whether the queries of these weights see their masks alone.

    Raises:
        ConversionError: they do by chance, as halfway through training.
    """
    probabilities = source.weights.get("attn_mask_probs", torch.zeros(1))
    if probabilities.min() == probabilities.max() and probabilities.max() in (0, 1):
        return "always" if probabilities.max() else "annealed"
    raise ConversionError(
        f"{source.name}: attn_mask_probs are {probabilities.tolist()}: its training was left "
        "before masking had faded; set all to 0, or all to 1"
    )


def labels(source: Source) -> dict[int, str]:
    """Names of the classes by number."""
    found = source.config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    return {int(number): str(name) for number, name in found.items()}


def answers(source: Source) -> tuple[str, Classes, Config]:
    """The task, which no config says, the classes, and the data set.

    The preprocessor cuts images of semantic models into squares; COCO's 80 objects are instances.
    Classes without names are COCO's where there are as many.
    """
    found = labels(source)
    names = list(found.values())
    if source.preprocessor.get("do_split_image"):
        first = preparation.first_label(source)
        ade20k = {"name": "ade20k", "reduce_zero_label": bool(first)}
        return "semantic", of_pixels(source.config, first), ade20k
    known: list[tuple[str, dict[int, str], Config]] = [
        ("instance", COCO, {"name": "coco", "masks": True}),
        ("panoptic", COCO_PANOPTIC, {"name": "coco_panoptic"}),
    ]
    for task, categories, dataset in known:
        if len(names) == len(categories):
            if names == [f"LABEL_{number}" for number in found]:
                names = list(categories.values())
            return task, Classes(names, list(categories), list(found), len(found)), dataset
    return "panoptic", of_pixels(source.config, 0), {"name": "coco_panoptic"}
