"""Small data sets in the layouts that others have made, written to disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 32)
"""(height, width) of all images."""


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_map(path: Path, values: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        image = Image.fromarray(values, "L").convert("P")
        image.putdata(values.ravel().tolist())
        image.putpalette([(37 * k) % 256 for k in range(768)])
    image.save(path)


def columns(*values: int, kind: type = np.uint8) -> np.ndarray:
    """A map of upright stripes of equal width."""
    return np.repeat(np.array(values, dtype=kind), SIZE[1] // len(values))[None].repeat(SIZE[0], 0)


def colors_of(ids: np.ndarray) -> np.ndarray:
    """COCO's panoptic colors of segment ids."""
    ids = ids.astype(np.int64)
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)


CATEGORIES = [
    {"id": 7, "name": "person", "isthing": 1},
    {"id": 90, "name": "grass", "isthing": 0},
    {"id": 3, "name": "sky", "isthing": 0},
]
"""Sorted by id the labels are sky 0, person 1, grass 2."""


def panoptic_content(names: list[str]) -> dict:
    """Per image: sky, two persons, a crowd of persons, and void."""
    ids = (70_000, 5, 300, 12)
    kinds = (3, 7, 7, 7)
    pairs = list(zip(ids, kinds, strict=True))
    segments = [
        {"id": key, "category_id": kind, "iscrowd": int(key == 12), "area": 1, "bbox": [0, 0, 1, 1]}
        for key, kind in pairs
    ]
    return {
        "images": [
            {"id": 40 + k, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for k, name in enumerate(names)
        ],
        "annotations": [
            {"image_id": 40 + k, "file_name": f"{Path(name).stem}.png", "segments_info": segments}
            for k, name in enumerate(names)
        ],
        "categories": CATEGORIES,
    }


def make_panoptic(
    root: Path,
    file: str = "annotations/panoptic_train.json",
    images: str = "images/train",
) -> Path:
    """Two images in COCO's panoptic format: stripes of sky, two persons, a crowd, and void."""
    content = panoptic_content(["a.png", "b.png"])
    for name in ("a.png", "b.png"):
        picture(root / images / name)
        stripes = columns(70_000, 70_000, 5, 5, 300, 12, 12, 0, kind=np.int64)
        save_map((root / file).with_suffix("") / name, colors_of(stripes))
    (root / file).write_text(json.dumps(content))
    return root


def make_ade_instance(root: Path) -> Path:
    """Two images; a table of 150 names; in each map class 1 twice, class 100 once, and stuff."""
    rows = [f"{k}\t0\t0\t0\tname {k}" for k in range(1, 151)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    for name in ("a", "b"):
        picture(root / f"images/training/{name}.jpg")
        red, green = columns(1, 1, 100, 0), columns(1, 2, 3, 0)
        stacked = np.stack([red, green, np.zeros_like(red)], 2)
        save_map(root / f"annotations_instance/training/{name}.png", stacked)
    return root


def make_cityscapes(root: Path, truth: str = "gtFine") -> Path:
    """Two cities; stripes: road, two cars, a group of cars, a caravan, ego vehicle, sky, void."""
    labels = columns(7, 26, 26, 26, 29, 1, 23, 0)
    instances = columns(7, 26000, 26001, 26, 29, 1, 23, 0, kind=np.uint16)
    for city in ("aachen", "ulm"):
        stem = f"{city}_000000_000019"
        picture(root / f"leftImg8bit/train/{city}/{stem}_leftImg8bit.png")
        folder = root / truth / "train" / city
        save_map(folder / f"{stem}_{truth}_labelIds.png", labels)
        save_map(folder / f"{stem}_{truth}_instanceIds.png", instances)
    return root


XML = """<annotation><size><width>32</width><height>24</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult>
  <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>24</ymax></bndbox>
  <part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>
</object>
<object><name>person</name><difficult>1</difficult>
  <bndbox><xmin>9.5</xmin><ymin>3</ymin><xmax>40</xmax><ymax>3</ymax></bndbox></object>
</annotation>"""


def make_voc(root: Path) -> Path:
    """Three images, two of them in the split; stripes: background, border, a dog, two persons."""
    for name in ("a", "b", "c"):
        picture(root / f"JPEGImages/{name}.jpg")
        save_map(root / f"SegmentationClass/{name}.png", columns(0, 255, 12, 15, 15, 0, 0, 0), True)
        save_map(root / f"SegmentationObject/{name}.png", columns(0, 255, 1, 2, 3, 0, 0, 0), True)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(XML)
    for kind in ("Segmentation", "Main"):
        (root / "ImageSets" / kind).mkdir(parents=True)
        (root / f"ImageSets/{kind}/train.txt").write_text("a\nc\n")
    return root


def make_folders(root: Path, labels: np.ndarray, palette: bool = False) -> Path:
    """Two images in folders of the split, with a map each."""
    for name in ("a", "b"):
        picture(root / f"images/train/{name}.jpg")
        save_map(root / f"labels/train/{name}.png", labels, palette)
    return root


def make_lvis(root: Path) -> Path:
    """Two images: one holds a cat and surely no dog, of the other's birds not all are annotated."""
    folders = {4: "train2017", 9: "val2017"}
    for key, folder in folders.items():
        picture(root / "images" / folder / f"{key:012}.jpg", key)
    square = [2, 3, 22, 3, 22, 13, 2, 13]
    content = {
        "images": [
            {
                "id": key,
                "coco_url": f"http://images.cocodataset.org/{folder}/{key:012}.jpg",
                "height": SIZE[0],
                "width": SIZE[1],
                "neg_category_ids": [8] if key == 4 else [],
                "not_exhaustive_category_ids": [] if key == 4 else [11],
            }
            for key, folder in folders.items()
        ],
        "annotations": [
            {"id": key, "image_id": key, "category_id": kind, "bbox": [2, 3, 20, 10], "area": 200,
             "segmentation": [square]}
            for key, kind in ((4, 5), (9, 11))
        ],
        "categories": [
            {"id": key, "name": name, "frequency": frequency}
            for key, name, frequency in ((11, "bird", "f"), (5, "cat", "r"), (8, "dog", "c"))
        ],
    }  # fmt: skip
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "lvis_v1_train.json").write_text(json.dumps(content))
    return root
