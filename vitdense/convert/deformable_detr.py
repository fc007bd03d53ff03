"""transformers' Deformable DETR: single stage, with refinement, two-stage."""

from __future__ import annotations

import re

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import from_labels
from vitdense.convert.detr import LAYERS, USUAL, attention_heads, feed_forward, fill_backbone, same
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import Source, require


def names(layers: int) -> Rules:
    """Rules for the head; the predictor numbered after the decoder's is that of the first stage."""
    return [
        (r"^model\.", ""),
        (r"^input_proj", "inputs"),
        (r"^query_position_embeddings", "queries"),
        (r"^reference_points", "references"),
        (r"^enc_output_norm", "first_stage.project.1"),
        (r"^enc_output\.", "first_stage.project.0."),
        (r"^level_embed", "encoder.level_embed"),
        (r"^pos_trans_norm", "place.1"),
        (r"^pos_trans\.", "place.0."),
        (r"\.sampling_offsets", ".offsets"),
        (r"\.attention_weights", ".weights"),
        *LAYERS,
        (r"^(?:decoder\.)?class_embed\.(\d+)", r"decoder.predictors.\1.classes"),
        (r"^(?:decoder\.)?bbox_embed\.(\d+)", r"decoder.predictors.\1.boxes"),
        (rf"^decoder\.predictors\.{layers}\.", "first_stage.predictor."),
    ]


class DeformableDetr(Family):
    """`DeformableDetrForObjectDetection`."""

    title = "transformers' Deformable DETR"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "deformable_detr"

    def plan(self, source: Source) -> Plan:
        config = source.config
        require(config, source.name, **USUAL)
        two_stage = config.get("two_stage", False)
        levels, backbone = config.get("num_feature_levels", 4), backbones.plan(source)
        maps = list(range(len(backbone["out_indices"])))
        head = {
            "name": "deformable_detr",
            "input_levels": maps if levels > 1 else maps[-1:],
            "num_levels": levels,
            "width": config.get("d_model", 256),
            "heads": attention_heads(source),
            "points": same(source, "encoder_n_points", "decoder_n_points", 4),
            "ffn": feed_forward(source, 1024),
            "encoder_layers": config.get("encoder_layers", 6),
            "decoder_layers": config.get("decoder_layers", 6),
            "queries": config.get("two_stage_num_proposals" if two_stage else "num_queries", 300),
            "dropout": config.get("dropout", 0.1),
            "two_stage": two_stage,
            "box_refinement": config.get("with_box_refine", False),
        }
        model = {"backbone": backbone, "neck": "none", "head": head}
        return Plan(model, from_labels(config), preparation.detection(source))

    def fill(self, source: Source, weights: Weights) -> None:
        fill_backbone(source, weights)
        layers = source.config.get("decoder_layers", 6)
        refines = source.config.get("with_box_refine", False)
        if not refines:
            _drop_copies(weights)
        weights.rename(names(layers), into="head.")
        if refines:
            _untie(weights, layers)
        # the first stage tells objects from background by the logit of class 0 alone
        weights.change(r"^head\.first_stage\.predictor\.classes", lambda tensor: tensor[:1])


def _drop_copies(weights: Weights) -> None:
    """Without refinement all layers share a predictor, which files may hold once for each."""
    for name in list(weights.left):
        match = re.match(r"((?:class|bbox)_embed)\.[1-9]\d*\.(.*)", name)
        first = match and weights.left.get(f"{match[1]}.0.{match[2]}")
        if match and first is not None and weights.left[name].equal(first):
            weights.drop(rf"^{re.escape(name)}$", "is the predictor of layer 0 again")


def _untie(weights: Weights, layers: int) -> None:
    """Copy the predictor of layer 0 where transformers ties others to it and does not save them."""
    first = "head.decoder.predictors.0."
    for name in [name for name in weights.found if name.startswith(first)]:
        for layer in range(1, layers):
            weights.copy(name, name.replace(first, f"head.decoder.predictors.{layer}."))
