"""How transformers prepares images, in the words of our configs."""

from __future__ import annotations

from typing import Any

from vitdense.convert.source import ConversionError, Source

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
RAW = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}

COCO_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
"""Of images in most detectors of COCO, as transformers writes it."""

ADE20K = 150
"""Classes of its benchmark."""


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


def detection(source: Source, usual: int | dict[str, int] = COCO_SIZE) -> dict[str, Any]:
    """`data.transforms` for a detector.

    Args:
        usual: the size if the preprocessor says none: a side, or as transformers writes it.
    """
    size = source.preprocessor.get("size") or usual
    if isinstance(size, int):  # a side; in old files with `max_size` the shorter one
        aspect = "max_size" in source.preprocessor
        size = {"shortest_edge": size} if aspect else {"height": size, "width": size}
    if "height" in size and "width" in size:
        return {"name": "detection", "size": _canvas(size), "resize": "stretch"}
    if "shortest_edge" in size:
        longest = size.get("longest_edge") or source.preprocessor.get("max_size") or 1333
        return {"name": "short_side", "size": size["shortest_edge"], "longest": longest}
    raise _unknown(source, size)


def segmentation(source: Source, usual: int | dict[str, int]) -> dict[str, Any]:
    """`data.transforms` for a semantic model.

    Args:
        usual: the size if the preprocessor says none: the shorter side, or as transformers
            writes it.
    """
    said = source.preprocessor
    size = usual if isinstance(usual, dict) else {"shortest_edge": usual}
    if said.get("size"):
        size = said["size"] if isinstance(said["size"], dict) else sides(said["size"])
    if "shortest_edge" not in size and not {"height", "width"} <= size.keys():
        raise _unknown(source, size)
    side = size.get("shortest_edge") or min(size["height"], size["width"])
    if said.get("do_resize") is False:
        return {"name": "segmentation", "size": side, "crop": side, "evaluation": "keep"}
    if "shortest_edge" in size or said.get("keep_aspect_ratio"):
        return {"name": "segmentation", "size": side, "crop": side}
    crop = _canvas(size)
    return {"name": "segmentation", "size": side, "crop": crop, "evaluation": "stretch"}


def sides(size: int | list[int]) -> dict[str, int]:
    """As transformers writes a size today; in old files it is a number, or height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height, "width": width}


def first_label(source: Source) -> int:
    """The label of the first class in label maps: 1 where label 0 is ignored, as ADE20K's is."""
    said = source.preprocessor
    reduced = said.get("do_reduce_labels", said.get("reduce_labels"))
    if reduced is None:
        reduced = len(source.config.get("id2label") or {}) == ADE20K
    return int(reduced)


def _canvas(size: dict[str, int]) -> int | list[int]:
    """Height and width, or the side of a square."""
    height, width = size["height"], size["width"]
    return height if height == width else [height, width]


def _unknown(source: Source, size: Any) -> ConversionError:
    return ConversionError(f"{source.name}: its preprocessor has a size that is unknown: {size}")
