"""The classes of a source, and the rows of its classifiers that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train",
    8: "truck", 9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign",
    14: "parking meter", 15: "bench", 16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep",
    21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack",
    28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove",
    41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass",
    47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple",
    54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza",
    60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote",
    76: "keyboard", 77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink",
    82: "refrigerator", 84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear",
    89: "hair drier", 90: "toothbrush",
}  # fmt: skip
"""COCO's categories by id; the ids have gaps."""

OTHER_NAMES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
"""What some models call COCO's categories."""

UNUSED = {"", "n/a", "none", "background", "no-object"}
"""Labels that stand for no class."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes that are kept.

    Attributes:
        names, category_ids: of each, in order.
        rows: the row of each in the source's classifiers.
        count: rows of the source's classifiers, unused ones included; not that of "no object".
    """

    names: list[str]
    category_ids: list[int]
    rows: list[int]
    count: int


def from_labels(config: dict[str, Any]) -> Classes:
    """Classes of `id2label` in a config of transformers; COCO's get their usual names and ids."""
    labels = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    labels = {int(i): str(name) for i, name in labels.items()}
    kept = {i: name for i, name in sorted(labels.items()) if name.strip().lower() not in UNUSED}
    rows, count = list(kept), max(labels) + 1
    names = [OTHER_NAMES.get(name, name) for name in kept.values()]
    if names == list(COCO.values()):
        return Classes(names, list(COCO), rows, count)
    return Classes(list(kept.values()), rows, rows, count)


def of_pixels(config: dict[str, Any], first: int) -> Classes:
    """Classes of a semantic model: every row is one, as background is a class of pixels too.

    Args:
        first: the label of the first class in label maps: 1 if label 0 is ignored there.
    """
    labels = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    rows = list(range(max(labels, default=1) + 1))
    names = [labels.get(row, f"LABEL_{row}").strip() for row in rows]
    return Classes(names, [row + first for row in rows], rows, len(rows))


def from_count(count: int) -> Classes:
    """Classes of a source without names: COCO's if it has 80, 90 or 91 rows, else numbers."""
    if count == len(COCO):
        return Classes(list(COCO.values()), list(COCO), list(range(count)), count)
    if count == 90:  # the ids without 0
        return Classes(list(COCO.values()), list(COCO), [i - 1 for i in COCO], count)
    if count == 91:
        return Classes(list(COCO.values()), list(COCO), list(COCO), count)
    return numbered(count)


def numbered(count: int) -> Classes:
    """Classes named by their numbers."""
    numbers = list(range(count))
    return Classes([f"class {i}" for i in numbers], numbers, numbers, count)
