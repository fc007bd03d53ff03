"""Objects from one map of their numbers, and sets of images that have such maps beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vitdense.data.base import DataError, Dataset
from vitdense.data.images import inside, list_images
from vitdense.ops.masks import split_masks
from vitdense.structures import IGNORE, Sample, Size, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MapDataset(Dataset):
    """Images with maps of the same size: subclasses set `images` and `names`, and write `target`.

    Attributes:
        images: the folder of images.
        names: of the images, in that folder.
    """

    images: Path
    names: NDArray[Any]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        target = self.target(index)
        path, size = self.image_path(index), map_size(target)
        image = self.read_image(path, size)
        return Sample(image, target, self.image_id(index), size, path)

    def image_path(self, index: int) -> Path:
        return inside(self.images, str(self.names[index]))

    def image_id(self, index: int) -> int | str:
        """The image's name without folders and ending."""
        return Path(str(self.names[index])).stem


def map_size(target: Target) -> Size:
    """(height, width) of the maps of a truth."""
    maps = target.semantic if target.masks is None else target.masks
    assert maps is not None
    return maps.shape[-2], maps.shape[-1]


def number(ids: NDArray[Any], known: NDArray[Any]) -> NDArray[Any]:
    """Places of ids in a list, from 1.

    Args:
        ids: whole numbers [H, W].
        known: int [N], sorted.

    Returns:
        the smallest type that holds N, [H, W]; 0 where the id is not in the list.
    """
    kind = torch.uint8 if len(known) < 256 else torch.int32
    if not len(known):
        return np.zeros(ids.shape, dtype=np.uint8)
    arrays = (np.ascontiguousarray(array, dtype=np.int32) for array in (known, ids))
    listed, found = map(torch.from_numpy, arrays)
    place = torch.searchsorted(listed, found, out_int32=True).clamp_(max=len(known) - 1)
    hit = listed[place] == found
    return place.add_(1).mul_(hit).to(kind).numpy()


def objects(numbers: NDArray[Any], labels: NDArray[Any], crowd: NDArray[Any]) -> Target:
    """The truth of objects that do not overlap; those without a pixel are left out.

    Args:
        numbers: uint8 or int32 [H, W], k = the k-th object, from 1; 0 = none.
        labels: whole numbers [N].
        crowd: bool [N].
    """
    from scipy.ndimage import find_objects

    count = len(labels)
    found = find_objects(numbers, count) if count else []
    seen = np.array([place is not None for place in found], dtype=bool)
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in filter(None, found)]
    areas = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
    return Target(
        labels=torch.from_numpy(labels[seen].astype(np.int64)),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        masks=split_masks(torch.from_numpy(numbers), torch.from_numpy(1 + np.flatnonzero(seen))),
        crowd=torch.from_numpy(crowd[seen].astype(bool)),
        area=torch.from_numpy(areas[seen].astype(np.float32)),
    )


def classes_of(numbers: NDArray[Any], labels: NDArray[Any]) -> Target:
    """The label map of objects that do not overlap: the class of each pixel, IGNORE for none."""
    table = np.concatenate([[IGNORE], labels]).astype(np.uint8)
    return Target(semantic=torch.from_numpy(table[numbers]))


def paired_names(images: Path, maps: Path) -> NDArray[Any]:
    """Names of the images in a folder, each of which has a PNG of its name in the other.

    Raises:
        DataError: there is no image, or a map is missing.
    """
    names = list_images(images)
    if not names:
        raise DataError(f"{images}: no images in this folder{folders_below(images)}")
    check_maps(maps, set(list_images(maps)), {name: f"{Path(name).stem}.png" for name in names})
    return np.array(names)


def folders_below(folder: Path) -> str:
    """The end of a message that there are no images: perhaps they lie deeper."""
    below = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not below:
        return ""
    return f"; it has the folder '{below[0]}', but images must lie side by side: move them up"


def check_maps(folder: Path, there: set[str], maps: dict[str, str]) -> None:
    """Every image has its map, of its own.

    Args:
        there: names of the files in `folder`.
        maps: the map's name for each image.

    Raises:
        DataError: maps are missing, or one is of two images, which then share an id, too.
    """
    missing = [(image, map_) for image, map_ in maps.items() if map_ not in there]
    if missing:
        image, map_ = missing[0]
        raise DataError(
            f"{folder / map_}: no label map for the image {image} "
            f"({len(missing)} of {len(maps)} are missing)"
        )
    owners: dict[str, str] = {}
    for image, map_ in maps.items():
        if (other := owners.setdefault(map_, image)) != image:
            raise DataError(
                f"{folder / map_}: is the label map of {other} and of {image}; take one out"
            )
