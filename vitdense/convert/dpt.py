"""transformers' DPT on a plain ViT."""

from __future__ import annotations

from typing import Any

from vitdense.convert import preparation, upernet, vit
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import ConversionError, Source, require
from vitdense.structures import Size

SHAPES = {
    (768, 12, 12): "vit_base_patch16_384",
    (1024, 24, 16): "vit_large_patch16_384",
}


class Dpt(Family):
    """`DPTForSemanticSegmentation`."""

    title = "transformers' DPT"

    def recognises(self, source: Source) -> bool:
        segments = any(name.startswith("head.head.4.") for name in source.weights)
        depth = any(name.startswith("head.head.2.") for name in source.weights)
        return source.model_type == "dpt" and segments and not depth

    def plan(self, source: Source) -> Plan:
        config = source.config
        normed = bool(config.get("use_batch_norm_in_fusion_residual"))
        require(
            config,
            source.name,
            is_hybrid=False,
            hidden_act="gelu",
            qkv_bias=True,
            reassemble_factors=[4, 2, 1, 0.5],
            head_in_index=-1,
        )
        if config.get("use_bias_in_fusion_residual") not in (None, not normed):
            raise ConversionError(
                f"{source.name}: use_bias_in_fusion_residual is as "
                "use_batch_norm_in_fusion_residual; only one of them can be converted"
            )
        head = {
            "name": "dpt",
            "channels": config.get("fusion_hidden_size", 256),
            "widths": list(config.get("neck_hidden_sizes") or (96, 192, 384, 768)),
            "readout": "project" if readout(source) == "project" else "ignore",
            "norm": "auto" if normed else "none",
            "dropout": config.get("semantic_classifier_dropout", 0.1),
            "aux_weight": upernet.aux_weight(source),
        }
        model = {"backbone": backbone(source), "neck": "none", "head": head}
        return upernet.plan(source, model, preparation.sides(config.get("image_size", 384)))

    def fill(self, source: Source, weights: Weights) -> None:
        config = source.config
        weights.drop(r"^dpt\.layernorm\.", "is behind the maps")
        weights.drop(r"^dpt\.pooler\.", "is for classification alone")
        weights.drop(r"fusion_stage\.layers\.0\.residual_layer1\.", "gets no map in transformers")
        for number in range(blocks(source)[-1] + 1, config.get("num_hidden_layers", 12)):
            weights.drop(rf"^dpt\.encoder\.layer\.{number}\.", "is behind the last map")
        if not upernet.aux_weight(source):
            weights.drop(r"^auxiliary_head\.", "counts nothing in the loss")
        weights.rename(vit.DPT, within="dpt.", into="backbone.model.")
        weights.change(
            r"\.pos_embed$",
            lambda table: vit.resample(table, grid(source), prefix=1, mode="bilinear"),
        )
        weights.rename(head_rules(source), into="head.")
        weights.change(r"head\.readouts\.\d\.0\.weight", lambda matrix: matrix[..., None, None])


def head_rules(source: Source) -> Rules:
    """From the whole model's names on; transformers numbers the fusion from the coarsest map."""
    last = len(source.config.get("neck_hidden_sizes") or (96, 192, 384, 768)) - 1
    normed = bool(source.config.get("use_batch_norm_in_fusion_residual"))
    places = {1: 1, 2: 4 if normed else 3}
    return [
        (r"^neck\.reassemble_stage\.readout_projects", "readouts"),
        (r"^neck\.reassemble_stage\.layers\.(\d)\.projection", r"reassemble.\1.0"),
        (r"^neck\.reassemble_stage\.layers\.(\d)\.resize", r"reassemble.\1.1"),
        (r"^neck\.convs", "convs"),
        (r"^neck\.fusion_stage\.layers\.(\d)", lambda m: f"fusions.{last - int(m[1])}"),
        (r"\.projection\.", ".project."),
        (r"\.residual_layer1", ".merge.layers"),
        (r"\.residual_layer2", ".refine.layers"),
        (r"\.convolution(\d)", lambda m: f".{places[int(m[1])]}"),
        (r"\.batch_norm(\d)", lambda m: f".{places[int(m[1])] + 1}"),
        (r"^head\.head", "classifier"),
        (r"^auxiliary_head\.head", "aux"),
    ]


def backbone(source: Source) -> dict[str, Any]:
    """The `backbone` mapping: a ViT whose last map has no norm."""
    config = source.config
    patch, (rows, columns) = config.get("patch_size", 16), grid(source)
    options: dict[str, Any] = {
        "name": "timm",
        **vit.size_options(config, SHAPES),
        "img_size": [rows * patch, columns * patch],
        "out_indices": blocks(source),
        "norm": False,
        **preparation.statistics(source, preparation.HALF),
    }
    if patch != 16:
        options["patch_size"] = patch
    if readout(source) != "ignore":
        options["class_token"] = {"project": "concat", "add": "add"}[readout(source)]
    return options


def blocks(source: Source) -> list[int]:
    """The blocks, from 0, whose maps are read."""
    return list(source.config.get("backbone_out_indices") or (2, 5, 8, 11))


def readout(source: Source) -> str:
    """What becomes of the class token: `ignore`, `add` or `project`."""
    return source.config.get("readout_type", "project")


def grid(source: Source) -> Size:
    """Rows and columns of patches of the images that the preprocessor makes.

    DPT resamples positions bilinearly and timm does not, so they are brought to this grid here.
    """
    size, patch = source.preprocessor.get("size"), source.config.get("patch_size", 16)
    if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
        known = size if isinstance(size, int) else source.config.get("image_size", 384)
        size = preparation.sides(known)
    return size["height"] // patch, size["width"] // patch
