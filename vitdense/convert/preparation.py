"""How transformers prepares images, in the words of our configs."""

from __future__ import annotations

from typing import Any

from vitdense.convert.source import ConversionError, Source

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
RAW = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def statistics(source: Source, usual: dict[str, list[float]] = IMAGENET) -> dict[str, list[float]]:
    """`mean` and `std` of a backbone: the preprocessor's, or the family's `usual` without one."""
    said = source.preprocessor
    if not said:
        return usual
    if said.get("do_normalize", usual is not RAW) is False:
        return RAW
    return {
        "mean": list(said.get("image_mean") or usual["mean"]),
        "std": list(said.get("image_std") or usual["std"]),
    }


def detection(source: Source, usual: int | dict[str, int]) -> dict[str, Any]:
    """`data.transforms` for a detector.

    Args:
        usual: the size if the preprocessor says none: a side, or as transformers writes it.
    """
    size = source.preprocessor.get("size") or usual
    if isinstance(size, int):  # a side; in old files with `max_size` the shorter one
        aspect = "max_size" in source.preprocessor
        size = {"shortest_edge": size} if aspect else {"height": size, "width": size}
    if "height" in size and "width" in size:
        height, width = size["height"], size["width"]
        square = height if height == width else [height, width]
        return {"name": "detection", "size": square, "resize": "stretch"}
    if "shortest_edge" in size:
        longest = size.get("longest_edge") or source.preprocessor.get("max_size") or 1333
        return {"name": "short_side", "size": size["shortest_edge"], "longest": longest}
    raise ConversionError(f"{source.name}: its preprocessor has a size that is unknown: {size}")
