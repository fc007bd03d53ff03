"""The built-in data set: generated shapes with boxes, masks, semantic and panoptic truth."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from vitdense.data.ade20k import Ade20kDataset
from vitdense.data.base import DataError, Dataset
from vitdense.data.coco import CocoDataset
from vitdense.data.coco_panoptic import CocoPanopticDataset
from vitdense.data.shape_images import CLASSES, Scene, make_scene
from vitdense.ops.masks import mask_to_rle
from vitdense.registry import DATASETS
from vitdense.structures import Sample, Target

log = logging.getLogger(__name__)

VERSION = 3
"""Goes up with every change of the pictures, so that old files are not taken for new ones."""

SPLITS = ("train", "val")
_VAL_PART = 6

_Entry = dict[str, Any]


@DATASETS.register("shapes")
class ShapesDataset(Dataset):
    """Textured shapes on textured ground, made on first use and the same on every machine.

    The files lie in a folder of their own for each set of options, in the layouts of COCO
    (detection, instance and panoptic JSON) and ADE20K, and can be read by `coco` and `ade20k` too.

    Raises:
        DataError: there is no such split, or the files cannot be written.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        task: Literal["detection", "instance", "semantic", "panoptic"] = "detection",  # which truth
        images: PositiveInt = 600,  # of the split train; val has a sixth of it
        size: PositiveInt = 160,  # side of the square images in pixels
        seed: NonNegativeInt = 0,  # another seed, other images
    ) -> None:
        super().__init__(root, split)
        if size < 32:
            raise ValueError(f"size: {size} is too small to tell shapes by; take 32 or more")
        if split not in SPLITS:
            raise DataError(f"shapes has the splits train and val, not '{split}'")
        self.folder = make_shapes(self.root, images, size, seed)
        self.files: Dataset
        if task == "semantic":
            self.files = Ade20kDataset(self.folder, split, reduce_zero_label=False)
        elif task == "panoptic":
            self.files = CocoPanopticDataset(self.folder, split)
        else:
            self.files = CocoDataset(self.folder, split, masks=task == "instance")
        self.classes, self.category_ids = self.files.classes, self.files.category_ids
        self.things = self.files.things

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        self.files.channels, self.files.cache = self.channels, self.cache
        return self.files[index]

    def target(self, index: int) -> Target:
        return self.files.target(index)

    def labels(self, index: int) -> Tensor:
        return self.files.labels(index)

    def image_path(self, index: int) -> Path:
        return self.files.image_path(index)


def make_shapes(root: Path, images: int, size: int, seed: int) -> Path:
    """The folder of this set under root, made if it is not there.

    It is written beside its place and then moved there at once, so that it is either whole or
    absent; of several processes the first wins.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = root / f"{images}x{size}px-seed{seed}-v{VERSION}"
    if folder.is_dir():
        return folder
    log.info("making the data set shapes in %s", folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error.strerror}); set data.root") from None
    try:
        for split, count in zip(SPLITS, (images, max(1, images // _VAL_PART)), strict=True):
            _write_split(draft, split, count, size, seed)
        _write_json(draft / "classes.json", {"classes": _categories()})
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    labels, panoptic = f"annotations/{split}", f"annotations/panoptic_{split}"
    for name in (f"images/{split}", labels, panoptic):
        os.makedirs(folder / name)
    images: list[_Entry] = []
    objects: list[_Entry] = []
    segments: list[_Entry] = []
    for index in range(count):
        scene = make_scene(size, np.random.default_rng((seed, SPLITS.index(split), index)))
        number, stem = index + 1, f"{index + 1:06d}"
        images.append({"id": number, "file_name": f"{stem}.jpg", "height": size, "width": size})
        found = [_segment(scene, layer) for layer in range(len(scene.labels) + 1)]
        segments.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": found})
        for layer, segment in enumerate(found[1:], start=1):
            mask = mask_to_rle(scene.layers == layer)
            owner = {"id": len(objects) + 1, "image_id": number, "segmentation": mask}
            objects.append({**segment, **owner})
        _save(scene.image, folder / f"images/{split}/{stem}.jpg")
        _save(_semantic(scene), folder / labels / f"{stem}.png")
        _save(_segment_ids(scene), folder / panoptic / f"{stem}.png")
    things, every = _categories()[1:], _categories()
    instances = {"images": images, "categories": things, "annotations": objects}
    _write_json(folder / f"annotations/instances_{split}.json", instances)
    whole = {"images": images, "categories": every, "annotations": segments}
    _write_json(folder / f"annotations/panoptic_{split}.json", whole)


def _categories() -> list[_Entry]:
    """Ids are the labels of the semantic maps: 0 is the background."""
    names = ("background", *CLASSES)
    return [{"id": key, "name": name, "isthing": int(key > 0)} for key, name in enumerate(names)]


def _segment(scene: Scene, layer: int) -> _Entry:
    """What COCO's formats say about one layer of the scene."""
    rows, columns = np.nonzero(scene.layers == layer)
    left, top = (int(places.min(initial=len(scene.layers))) for places in (columns, rows))
    right, bottom = (int(places.max(initial=-1)) + 1 for places in (columns, rows))
    return {
        "id": layer + 1,
        "category_id": scene.labels[layer - 1] + 1 if layer else 0,
        "bbox": [left, top, right - left, bottom - top],
        "area": len(rows),
        "iscrowd": 0,
    }


def _semantic(scene: Scene) -> NDArray[np.uint8]:
    categories = [0, *(label + 1 for label in scene.labels)]
    return np.array(categories, dtype=np.uint8)[scene.layers]


def _segment_ids(scene: Scene) -> NDArray[np.uint8]:
    """COCO's panoptic PNG: the segment's id in red; 0, which no pixel has, would be void."""
    red = scene.layers + np.uint8(1)
    return np.stack([red, np.zeros_like(red), np.zeros_like(red)], axis=2)


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, quality=92)


def _write_json(path: Path, content: _Entry) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))
