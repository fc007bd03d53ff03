"""DINO's own checkpoints, as its authors publish them, into the `dino` head."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import from_count
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights, count_layers
from vitdense.convert.source import ConversionError, Source, require

HEAD: Rules = [
    (r"^transformer\.", ""),
    (r"^input_proj", "inputs"),
    (r"^level_embed", "encoder.level_embed"),
    (r"^label_enc", "denoising.classes"),
    (r"^tgt_embed", "contents"),
    (r"^refpoint_embed\.weight", "references.logits"),
    (r"^enc_output_norm", "first_stage.project.1"),
    (r"^enc_output\.", "first_stage.project.0."),
    (r"^enc_out_class_embed", "first_stage.predictor.classes"),
    (r"^enc_out_bbox_embed", "first_stage.predictor.boxes"),
    (r"^decoder\.ref_point_head", "decoder.place.mlp"),
    (r"^(decoder\.)?class_embed\.(\d+)", r"decoder.predictors.\2.classes"),
    (r"^(decoder\.)?bbox_embed\.(\d+)", r"decoder.predictors.\2.boxes"),
    (r"^(encoder.*)\.self_attn\.", r"\1.attention."),
    (r"^(encoder.*)\.norm1", r"\1.norm"),
    (r"^(encoder.*)\.norm2", r"\1.feed_forward.norm"),
    (r"\.self_attn\.in_proj_", ".self_attn.{query,key,value}."),
    (r"\.self_attn\.out_proj", ".self_attention.output"),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn\.", ".cross_attention."),
    (r"\.sampling_offsets", ".offsets"),
    (r"\.attention_weights", ".weights"),
    (r"\.value_proj", ".value"),
    (r"\.output_proj", ".output"),
    (r"^(decoder.*)\.norm1", r"\1.cross_norm"),
    (r"^(decoder.*)\.norm2", r"\1.self_norm"),
    (r"^(decoder.*)\.norm3", r"\1.feed_forward.norm"),
    (r"\.linear1", ".feed_forward.expand"),
    (r"\.linear2", ".feed_forward.reduce"),
]

SWIN: Rules = [
    # the authors merge patches at the end of a stage, timm at the start of the next
    (r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample"),
    (r"^(layers|patch_embed)", r"model.\1"),
]
"""The names of Swin's authors; the norms of its maps are numbered by those that are read."""

USUAL = {
    "transformer_activation": "relu",
    "position_embedding": "sine",
    "pe_temperatureH": 20,
    "pe_temperatureW": 20,
    "pre_norm": False,
    "dilation": False,
    "decoder_sa_type": "sa",
    "decoder_module_seq": ["sa", "ca", "ffn"],
    "dec_layer_number": None,
    "num_patterns": 0,
    "two_stage_learn_wh": False,
    "two_stage_pat_embed": 0,
    "two_stage_add_query_num": 0,
    "use_deformable_box_attn": False,
    "add_channel_attention": False,
}
"""What the arguments of training must be that change the model in ways our head does not know."""

LABELS = "label_enc.weight"
FIRST = "transformer.encoder.layers.0."


class Dino(Family):
    """`checkpoint*.pth` of IDEA-Research/DINO on ResNet or Swin.

    Sizes are read from the weights. The arguments that are kept beside them tell the rest; a file
    of weights alone is taken for the published design.
    """

    title = "DINO"

    def recognises(self, source: Source) -> bool:
        needed = {LABELS, "transformer.level_embed", f"{FIRST}self_attn.sampling_offsets.weight"}
        places = "transformer.decoder.ref_point_head.layers.0.weight"
        return source.model_type is None and needed | {places} <= source.weights.keys()

    def plan(self, source: Source) -> Plan:
        require(source.config, source.name, **USUAL)
        model = {
            "backbone": backbones.plan(_with_backbone(source)),
            "neck": "none",
            "head": plan_head(source),
        }
        return Plan(model, from_count(_rows(source)), preparation.detection(source))

    def fill(self, source: Source, weights: Weights) -> None:
        if not source.config.get("dn_number", 100):
            weights.drop(rf"^{re.escape(LABELS)}$", "is for denoising, which was off in training")
        levels = enumerate(_levels(source))
        norms = [(rf"^norm{level}\.", f"level_norms.{place}.") for place, level in levels]
        weights.rename([(r"^", "model.")], "backbone.0.body.", "backbone.")
        weights.rename([*norms, *SWIN], "backbone.0.", "backbone.")
        one = [(r"^decoder\.predictors\.\d+\.", "decoder.predictors.0.")]
        weights.rename([*HEAD, *(one if _shares(source) else [])], into="head.")
        count = _rows(source)
        weights.change(r"^head\.denoising\.classes\.weight$", lambda rows: _padded(rows, count))


def plan_head(source: Source) -> dict[str, Any]:
    """The `head` mapping."""
    tensors, config = source.weights, source.config
    levels, width = tensors["transformer.level_embed"].shape
    heads = config.get("nheads", 8)
    two_stage = "transformer.enc_output.weight" in tensors
    contents = tensors.get("transformer.tgt_embed.weight")
    return {
        "name": "dino",
        "input_levels": list(range(len(_levels(source)))),
        "num_levels": levels,
        "width": width,
        "heads": heads,
        "points": _points(source, heads * levels),
        "ffn": len(tensors[f"{FIRST}linear1.weight"]),
        "encoder_layers": count_layers(tensors, "transformer.encoder.layers"),
        "decoder_layers": count_layers(tensors, "transformer.decoder.layers"),
        "queries": config.get("num_queries", 900) if contents is None else len(contents),
        "dropout": config.get("dropout", 0.0),
        "two_stage": two_stage,
        "learned_content": contents is not None,
        "look_twice": not config.get("use_detached_boxes_dec_out", False),
        "share_predictors": _shares(source),
        "denoising": config.get("dn_number", 100),
        "label_noise": config.get("dn_label_noise_ratio", 0.5),
        "box_noise": config.get("dn_box_noise_scale", 1.0),
        "class_weight": config.get("cls_loss_coef", 1.0),
        "max_detections": config.get("num_select", 300),
        "nms": nms if (nms := config.get("nms_iou_threshold", -1)) > 0 else None,
    }


def _rows(source: Source) -> int:
    """Rows of the classifiers: for COCO 91, of which the ids that are no category are not used."""
    return len(source.weights["transformer.decoder.class_embed.0.weight"])


def _shares(source: Source) -> bool:
    """Whether all layers have one predictor, of which the file holds a copy for each."""
    pattern = re.compile(r"^transformer\.decoder\.((?:class|bbox)_embed)\.\d+\.(.*)")
    return all(
        torch.equal(tensor, source.weights[f"transformer.decoder.{match[1]}.0.{match[2]}"])
        for name, tensor in source.weights.items()
        if (match := pattern.match(name))
    )


def _points(source: Source, per_point: int) -> int:
    counts = {
        len(tensor) // per_point
        for name, tensor in source.weights.items()
        if name.endswith(".attention_weights.weight")
    }
    if len(counts) > 1:
        raise ConversionError(
            f"{source.name}: enc_n_points and dec_n_points differ; only equal ones can be converted"
        )
    return counts.pop()


def _padded(rows: Tensor, count: int) -> Tensor:
    """As many rows as there are classes, and zeros behind them, which stand for padding."""
    return torch.cat((rows[:count], rows.new_zeros(1, rows.shape[1])))


def _levels(source: Source) -> list[int]:
    """Which of the backbone's four maps are read: the last ones, each by a 1x1 convolution."""
    tensors = source.weights.items()
    read = [x for name, x in tensors if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)]
    count = sum(x.shape[-1] == 1 for x in read)
    return list(range(4 - count, 4))


def _with_backbone(source: Source) -> Source:
    """The same source with a config that describes its backbone in transformers' words."""
    within = "backbone.0."
    tensors = {
        name.removeprefix(within): tensor
        for name, tensor in source.weights.items()
        if name.startswith(within)
    }
    if "body.layer1.0.conv1.weight" in tensors:
        config = _resnet(tensors)
    elif "layers.0.blocks.0.attn.relative_position_bias_table" in tensors:
        config = _swin(tensors)
    else:
        raise ConversionError(
            f"{source.name}: its backbone is neither a ResNet nor a Swin; only these are converted"
        )
    config["out_features"] = [f"stage{level + 1}" for level in _levels(source)]
    return Source(source.name, {}, {"backbone_config": config})


def _resnet(tensors: dict[str, Tensor]) -> dict[str, Any]:
    deep = "body.layer1.0.conv3.weight" in tensors
    last = "conv3" if deep else "conv2"
    return {
        "model_type": "resnet",
        "layer_type": "bottleneck" if deep else "basic",
        "depths": [count_layers(tensors, f"body.layer{i}") for i in range(1, 5)],
        "hidden_sizes": [len(tensors[f"body.layer{i}.0.{last}.weight"]) for i in range(1, 5)],
    }


def _swin(tensors: dict[str, Tensor]) -> dict[str, Any]:
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    return {
        "model_type": "swin",
        "embed_dim": len(tensors["patch_embed.proj.weight"]),
        "depths": [count_layers(tensors, f"layers.{i}.blocks") for i in range(4)],
        "num_heads": [tensors[table.format(i)].shape[1] for i in range(4)],
        "window_size": (math.isqrt(len(tensors[table.format(0)])) + 1) // 2,
    }
