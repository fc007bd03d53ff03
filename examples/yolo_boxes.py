"""A data set of one's own: boxes in YOLO's text files.

root/classes.txt             one class name per line
root/images/<split>/a.jpg
root/labels/<split>/a.txt    one object per line: class, then centre x, centre y, width, height as
                             fractions of the image; without a file the image has no objects
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vitdense import DATASETS, Dataset
from vitdense.data.base import DataError
from vitdense.data.images import list_images
from vitdense.structures import Sample, Size, Target


@DATASETS.register("yolo_boxes")
class YoloBoxes(Dataset):
    """Boxes in YOLO's text files."""

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: str = "classes.txt",  # the file of class names under root
    ) -> None:
        super().__init__(root, split)
        self.folder = self.root / "images" / split
        self.names = list_images(self.folder)
        if not self.names:
            raise DataError(f"{self.folder}: no images; set data.root and the split")
        self.classes = (self.root / classes).read_text(encoding="utf-8").split("\n")
        self.classes = [name.strip() for name in self.classes if name.strip()]
        self.category_ids = list(range(len(self.classes)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        path = self.folder / self.names[index]
        image = self.read_image(path)
        size = (image.shape[1], image.shape[2])
        labels, boxes = self._read(self.root / "labels" / self.split / f"{path.stem}.txt", size)
        return Sample(image, Target(labels=labels, boxes=boxes), path.stem, size, path)

    def _read(self, file: Path, size: Size) -> tuple[Tensor, Tensor]:
        """int64 [N] and xyxy pixels, float32 [N, 4]."""
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        try:
            numbers = [[float(word) for word in line.split()] for line in text.splitlines()]
            rows = torch.tensor(numbers).reshape(-1, 5)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{file}: give five numbers per line ({error})") from None
        labels, centres, sides = rows[:, 0].long(), rows[:, 1:3], rows[:, 3:]
        if len(labels) and int(labels.max()) >= len(self.classes):
            raise DataError(f"{file}: class {int(labels.max())}, but {len(self.classes)} names")
        corners = torch.cat([centres - sides / 2, centres + sides / 2], 1).clamp(0, 1)
        return labels, corners * torch.tensor([size[1], size[0]] * 2)
