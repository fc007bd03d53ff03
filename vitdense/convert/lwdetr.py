"""LW-DETR of transformers, and RF-DETR of transformers or of its authors, into `lwdetr`."""

from __future__ import annotations

import math
import re
from typing import Any

from vitdense.convert import backbones, preparation, vit
from vitdense.convert.classes import COCO, Classes, from_count, from_labels, numbered
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights, count_layers
from vitdense.convert.source import ConversionError, Source, require

Config = dict[str, Any]

PROJECTOR: Rules = [
    (r"^projector_layer\.", "stages.0.c2f."),
    (r"^layer_norm\.", "stages.0.norm."),
    (r"^scale_layers\.", "stages."),
    (r"^(stages\.\d+)\.0\.", r"\1.c2f."),
    (r"^(stages\.\d+)\.1\.", r"\1.norm."),
    (r"^stages_sampling\.(\d+)\.(\d+)", r"stages.\1.resample.\2"),
    (r"\.sampling_layers\.(\d+)\.layers", r".resample.\1"),
    (r"(resample\.\d+)\.1\.", r"\1.2."),  # behind an activation that ours is a module for
    (r"\.projector_layer\.", ".c2f."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.(bottlenecks|m)\.(\d+)\.(conv|cv)1", r".blocks.\2.0"),
    (r"\.(bottlenecks|m)\.(\d+)\.(conv|cv)2", r".blocks.\2.1"),
    (r"\.c2f\.(conv|cv)1", ".c2f.expand"),
    (r"\.c2f\.(conv|cv)2", ".c2f.fuse"),
    (r"\.bn\.", ".norm."),
]
"""Of the neck, in the names of transformers' memory and those of RF-DETR's files."""

HEAD: Rules = [
    (r"^model\.", ""),
    (r"^transformer\.", ""),
    (r"^(refpoint|reference_point)_embed", "offsets"),
    (r"^query_feat", "queries"),
    (r"^enc_output\.(\d+)", r"first_stages.\1.project.0"),
    (r"^enc_output_norm\.(\d+)", r"first_stages.\1.project.1"),
    (r"^enc_out_class_embed\.(\d+)", r"first_stages.\1.predictor.classes"),
    (r"^enc_out_bbox_embed\.(\d+)", r"first_stages.\1.predictor.boxes"),
    (r"^class_embed", "decoder.predictors.0.classes"),
    (r"^bbox_embed", "decoder.predictors.0.boxes"),
    (r"^decoder\.ref_point_head", "decoder.place.mlp"),
    (r"^decoder\.(layer)?norm\.", "decoder.norm."),
    (r"\.self_attn\.in_proj_", ".self_attn.{query,key,value}."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn\.", ".cross_attention."),
    (r"\.(self_attn_layer_norm|norm1)\.", ".self_norm."),
    (r"\.(cross_attn_layer_norm|norm2)\.", ".cross_norm."),
    (r"\.(layer_norm|norm3)\.", ".feed_forward.norm."),
    (r"\.(mlp\.fc|linear)1\.", ".feed_forward.expand."),
    (r"\.(mlp\.fc|linear)2\.", ".feed_forward.reduce."),
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".weights."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.(v|value)_proj\.", ".value."),
    (r"\.(o|out|output)_proj\.", ".output."),
]
"""Of the head, likewise."""

BEHIND = "lies behind the last map that is read"
"""Why the last blocks of a backbone are dropped."""


class LwDetr(Family):
    """`LwDetrForObjectDetection`."""

    title = "transformers' LW-DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "lw_detr"

    def plan(self, source: Source) -> Plan:
        config = source.config
        check(source, config)
        transforms = preparation.detection(source, 640)
        backbone = self._backbone(source, transforms["size"])
        projector = neck(config, config["projector_scale_factors"], "batch")
        projector["eps"] = config.get("batch_norm_eps", 1e-5)
        model = {"backbone": backbone, "neck": projector, "head": head(config)}
        return Plan(model, from_labels(config), transforms)

    def _backbone(self, source: Source, size: int | list[int]) -> Config:
        config = source.config["backbone_config"]
        depth, stages = config.get("num_hidden_layers", 12), backbones.stages(config)
        windowed = config.get("window_block_indices", [])
        return {
            "name": "timm",
            "model": "vit_tiny_patch16_224",
            "img_size": size,
            "patch_size": config.get("patch_size", 16),
            "out_indices": [stage - 1 for stage in stages],
            "windows": math.isqrt(config.get("num_windows", 16)),
            "global_blocks": [i for i in range(depth) if i not in windowed],
            "norm": False,
            "options": {
                "embed_dim": config.get("hidden_size", 768),
                "depth": depth,
                "num_heads": config.get("num_attention_heads", 12),
                "mlp_ratio": config.get("mlp_ratio", 4),
                "class_token": False,
                "global_pool": "avg",
                "init_values": config.get("cae_init_values", 0.1),
            },
            **preparation.statistics(source),
        }

    def fill(self, source: Source, weights: Weights) -> None:
        config = source.config["backbone_config"]
        patch, size = config.get("patch_size", 16), preparation.detection(source, 640)["size"]
        height, width = (size, size) if isinstance(size, int) else size
        fill(weights, vit.LW_DETR, max(backbones.stages(config)))
        weights.change(r"^backbone\..*qkv\.bias$", vit.key_bias)
        grid = (height // patch, width // patch)
        weights.change(
            r"^backbone\..*pos_embed$",
            lambda table: vit.resample(table, grid, prefix=1)[:, 1:],
        )


class RfDetr(Family):
    """`RfDetrForObjectDetection`, in the layout of RF-DETR's own files, which name no classes."""

    title = "RF-DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "rf_detr" or (
            source.model_type is None
            and "refpoint_embed.weight" in source.weights
            and any(name.startswith("backbone.0.encoder.encoder.") for name in source.weights)
        )

    def plan(self, source: Source) -> Plan:
        config = describe(source)
        check(source, config)
        projector = neck(config, config["projector_scale_factors"], config["projector_norm"])
        projector |= {"eps": config["layer_norm_eps"], "halve_above": None}
        model = {
            "backbone": self._backbone(source, config["backbone_config"]),
            "neck": projector,
            "head": head(config),
        }
        known = source.model_type is not None
        classes = from_labels(config) if known else _classes(source)
        return Plan(model, classes, preparation.detection(source, config["resolution"]))

    def _backbone(self, source: Source, config: Config) -> Config:
        stages, depth = backbones.stages(config), config.get("num_hidden_layers", 12)
        return {
            "name": "timm",
            **vit.size_options(config, backbones.DINOV2_NAMES),
            "img_size": config.get("image_size", 224),
            "patch_size": config.get("patch_size", 14),
            "out_indices": [stage - 1 for stage in stages],
            "windows": config.get("num_windows", 4),
            # the blocks behind the maps see the whole image
            "global_blocks": [stage for stage in stages if stage < depth],
            "norm": "all" if config.get("apply_layernorm", True) else False,
            **preparation.statistics(source),
        }

    def fill(self, source: Source, weights: Weights) -> None:
        config = describe(source)["backbone_config"]
        weights.drop(r"^segmentation_head\.", "makes masks, which this head does not")
        fill(weights, vit.DINOV2, max(backbones.stages(config)))


CLASSES = "class_embed.weight"


def _classes(source: Source) -> Classes:
    """COCO's if there are as many rows, unless the training knew another number of names.

    RF-DETR trained on with the 91 rows of its weights where it was not told a number of classes.
    """
    rows, names = len(source.weights[CLASSES]), source.config.get("class_names") or COCO
    return from_count(rows) if len(names) == len(COCO) else numbered(rows)


def describe(source: Source) -> Config:
    """The config of an RF-DETR in transformers' words, from that or from a .pth's arguments.

    Raises:
        ConversionError: the file lacks arguments that its weights do not tell.
    """
    config = dict(source.config)
    if source.model_type is not None:
        usual = {"projector_norm": "layer", "projector_scale_factors": [1.0], "resolution": 560}
        return usual | {"layer_norm_eps": 1e-5} | config
    missing = {"out_feature_indexes", "sa_nheads", "ca_nheads", "dec_n_points"} - config.keys()
    if missing:
        raise ConversionError(
            f"{source.name}: holds no arguments {', '.join(sorted(missing))} beside its weights; "
            "give the whole checkpoint of RF-DETR"
        )
    _check_arguments(source)
    scales = {"P3": 2.0, "P4": 1.0, "P5": 0.5}
    tensors = source.weights
    groups = count_layers(tensors, "transformer.enc_output")
    return {
        "d_model": tensors[CLASSES].shape[1],
        "decoder_self_attention_heads": config["sa_nheads"],
        "decoder_cross_attention_heads": config["ca_nheads"],
        "decoder_n_points": config["dec_n_points"],
        "decoder_ffn_dim": len(tensors["transformer.decoder.layers.0.linear1.weight"]),
        "decoder_layers": count_layers(tensors, "transformer.decoder.layers"),
        "group_detr": groups,
        "num_queries": len(tensors["refpoint_embed.weight"]) // groups,
        "dropout": config.get("dropout", 0.0),
        "lite_refpoint_refine": config.get("lite_refpoint_refine", True),
        "c2f_num_blocks": count_layers(tensors, "backbone.0.projector.stages.0.0.m"),
        "projector_scale_factors": [
            scales[level] for level in config.get("projector_scale", ["P4"])
        ],
        "projector_norm": "layer" if config.get("layer_norm", True) else "batch",
        "layer_norm_eps": 1e-6 if config.get("layer_norm", True) else 1e-5,
        "resolution": config.get("resolution", 560),
        "backbone_config": _describe_backbone(source),
    }


def _describe_backbone(source: Source) -> Config:
    within = "backbone.0.encoder.encoder."
    projection = source.weights[f"{within}embeddings.patch_embeddings.projection.weight"]
    positions = source.weights[f"{within}embeddings.position_embeddings"]
    width, _, patch, _ = projection.shape
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(source.weights, f"{within}encoder.layer"),
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": math.isqrt(positions.shape[1] - 1) * patch,
        "num_windows": source.config.get("num_windows", 4),
        "out_features": [f"stage{stage}" for stage in source.config["out_feature_indexes"]],
    }


def _check_arguments(source: Source) -> None:
    """Raise ConversionError for a .pth of another design than the published ones."""
    config = source.config
    wrong = [f"{key} is off" for key in ("bbox_reparam", "two_stage") if not config.get(key, True)]
    if "registers" in config.get("encoder", "") or "dinov2_windowed" not in config.get(
        "encoder", "dinov2_windowed"
    ):
        wrong.append(f"encoder is {config['encoder']!r}, not dinov2_windowed_*")
    if not set(config.get("projector_scale", [])) <= {"P3", "P4", "P5"}:
        wrong.append(f"projector_scale is {config['projector_scale']}, with others than P3, P4, P5")
    if wrong:
        raise ConversionError(f"{source.name}: {'; '.join(wrong)}: that cannot be converted")


def check(source: Source, config: Config) -> None:
    """Raise ConversionError for options of transformers that our neck or head has not."""
    require(
        config,
        source.name,
        activation_function="silu",
        decoder_activation_function="relu",
        hidden_expansion=0.5,
        attention_bias=True,
        num_feature_levels=len(config.get("projector_scale_factors", [])),
    )
    require(
        config.get("backbone_config", {}),
        f"{source.name}: backbone_config",
        hidden_act="gelu",
        qkv_bias=True,
        use_swiglu_ffn=False,
        use_absolute_position_embeddings=True,
    )


def neck(config: Config, scales: list[float], norm: str) -> Config:
    """The `neck` mapping."""
    return {
        "name": "multi_scale_projector",
        "channels": config.get("d_model", 256),
        "scales": sorted(scales, reverse=True),
        "blocks": config.get("c2f_num_blocks", 3),
        "norm": norm,
    }


def head(config: Config) -> Config:
    """The `head` mapping."""
    return {
        "name": "lwdetr",
        "input_levels": list(range(len(config["projector_scale_factors"]))),
        "width": config.get("d_model", 256),
        "heads": config.get("decoder_self_attention_heads", 8),
        "cross_heads": config.get("decoder_cross_attention_heads", 16),
        "points": config.get("decoder_n_points", 4),
        "ffn": config.get("decoder_ffn_dim", 2048),
        "decoder_layers": config.get("decoder_layers", 3),
        "queries": config.get("num_queries", 300),
        "groups": config.get("group_detr", 13),
        "dropout": config.get("dropout", 0.0),
        "box_refinement": not config.get("lite_refpoint_refine", True),
        "aux_loss": config.get("auxiliary_loss", True),
        "max_detections": 300,
    }


def fill(weights: Weights, backbone: Rules, blocks: int) -> None:
    """Rename everything, but for the blocks of the backbone behind the first `blocks`."""
    for name in list(weights.left):
        match = re.search(r"backbone\..*\.encoder\.layer\.(\d+)\.", name)
        if match and int(match[1]) >= blocks:
            weights.drop(rf"^{re.escape(name)}$", BEHIND)
    for within in ("model.backbone.backbone.", "backbone.0.encoder.encoder."):
        weights.rename(backbone, within, "backbone.model.")
    for within in ("model.backbone.projector.", "backbone.0.projector."):
        weights.rename(PROJECTOR, within, "neck.")
    weights.rename(HEAD, into="head.")
