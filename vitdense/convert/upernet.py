"""transformers' UPerNet, with any backbone that we know."""

from __future__ import annotations

from typing import Any

from vitdense.convert import backbones, preparation
from vitdense.convert.classes import of_pixels
from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Rules, Weights
from vitdense.convert.source import Source, require

HEAD: Rules = [
    (r"^auxiliary_head\.convs\.0", "aux.0"),
    (r"^auxiliary_head\.classifier", "aux.1.1"),
    (r"^decode_head\.", ""),
    (r"^psp_modules\.(?:blocks\.)?(\d+)\.(?:1|conv)", r"pools.\1"),
    (r"^(psp_)?bottleneck", "context"),
    (r"^lateral_convs", "laterals"),
    (r"^fpn_convs", "smooths"),
    (r"^fpn_bottleneck", "fuse"),
    (r"^classifier", "classifier.1"),
    (r"\.(conv|convolution)\.", ".0."),
    (r"\.(bn|batch_norm|normalization)\.", ".1."),
]
"""Of UPerNet and of BEiT, whose names differ in transformers 5 and in files."""

FINE_TUNING: dict[str, Any] = {
    "train": {"steps": 20000, "batch_size": 8, "clip": None},
    "optimizer": {"lr": 6e-5, "weight_decay": 0.01},
    "schedule": {"name": "poly", "power": 1.0, "warmup": 0.05},
}
"""The optimizer of the published semantic models, for an eighth of their steps."""


class UPerNet(Family):
    """`UperNetForSemanticSegmentation`."""

    title = "transformers' UPerNet"

    def recognises(self, source: Source) -> bool:
        return source.model_type == "upernet"

    def plan(self, source: Source) -> Plan:
        head = plan_head(source, width=512)
        model = {"backbone": backbones.plan(source), "neck": "none", "head": head}
        return plan(source, model, 512)

    def fill(self, source: Source, weights: Weights) -> None:
        backbones.fill(source, weights, within="backbone.")
        fill_head(source, weights)


def plan_head(source: Source, width: int) -> dict[str, Any]:
    """The head's options; `width` is that of the pyramid if the config says none."""
    config = source.config
    require(config, source.name, auxiliary_num_convs=1, auxiliary_concat_input=False)
    return {
        "name": "upernet",
        "channels": config.get("hidden_size", width),
        "pool_scales": list(config.get("pool_scales") or (1, 2, 3, 6)),
        "aux_weight": aux_weight(source),
        "aux_channels": config.get("auxiliary_channels", 256),
        "aux_level": 2,
    }


def plan(source: Source, model: dict[str, Any], usual: int | dict[str, int]) -> Plan:
    """A plan for a semantic model; `usual` is that of `preparation.segmentation`."""
    first = preparation.first_label(source)
    return Plan(
        model,
        of_pixels(source.config, first),
        preparation.segmentation(source, usual),
        dataset={"name": "ade20k", "reduce_zero_label": bool(first)},
        recipe=FINE_TUNING,
    )


def fill_head(source: Source, weights: Weights) -> None:
    """The head, and the auxiliary one if it counts in the loss."""
    if not aux_weight(source):
        weights.drop(r"^auxiliary_head\.", "counts nothing in the loss")
    weights.rename(HEAD, into="head.")


def aux_weight(source: Source) -> float:
    """What the auxiliary head counts in the loss; 0 without it."""
    if not source.config.get("use_auxiliary_head", True):
        return 0.0
    return source.config.get("auxiliary_loss_weight", 0.4)
