"""The objects of many images in flat tensors, as the matching takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitdense.ops import run_length
from vitdense.ops.run_length import RunLengths


@dataclass(slots=True)
class Objects:
    """Objects of many images: truth or detections, in the order of their files.

    Attributes:
        images: int64 [N], index of the image.
        labels: int64 [N], classes 0..C-1.
        boxes: float64 [N, 4], x, y, width and height in original pixels, as in COCO's files.
        areas: float64 [N], square pixels, chooses the area range.
        scores: float64 [N]; of truth 1.
        crowd: bool [N], regions that are ignored; of detections, those that are not wrong if no
            truth takes them.
        rows: int64 [N], which of `masks` and of `bands` is the object's.
        masks: the masks where they are compared; they stay where they are when objects are sorted.
        bands: the pixels near their outlines, where those are compared too.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    areas: Tensor
    scores: Tensor
    crowd: Tensor
    rows: Tensor
    masks: RunLengths | None = None
    bands: RunLengths | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor) -> Objects:
        """Those at int64 positions, in their order."""
        # On a CPU several times as fast as self.boxes[index].
        return replace(
            self, **{name: getattr(self, name).index_select(0, index) for name in _TENSORS}
        )

    def to(self, device: torch.device | str) -> Objects:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        masks = None if self.masks is None else self.masks.to(device)
        bands = None if self.bands is None else self.bands.to(device)
        return replace(self, **moved, masks=masks, bands=bands)


_TENSORS = ("images", "labels", "boxes", "areas", "scores", "crowd", "rows")


def by_score(scores: Tensor) -> Tensor:
    """Positions of float64 [N] by descending score, equal ones in their order, NaN at the end.

    On a CPU whole numbers are sorted five times as fast as others, so it sorts their bits.
    """
    bits = (scores + 0.0).view(torch.int64)  # -0.0 + 0.0 is 0.0
    bits = torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)
    bits = bits.masked_fill(scores.isnan(), torch.iinfo(torch.int64).min)
    return (~bits).argsort(stable=True)


def join(parts: Sequence[Objects]) -> Objects:
    """All objects of several; of none, none."""
    if not parts:
        return empty()
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
    masks = _join_runs([part.masks for part in parts])
    bands = _join_runs([part.bands for part in parts])
    if masks is not None:
        sizes = [0 if part.masks is None else len(part.masks) for part in parts]
        before = torch.tensor([0, *sizes]).cumsum(0).tolist()
        rows = [part.rows + first for part, first in zip(parts, before, strict=False)]
        columns["rows"] = torch.cat(rows)
    return replace(parts[0], **columns, masks=masks, bands=bands)


def _join_runs(parts: list[RunLengths | None]) -> RunLengths | None:
    """All masks of several, or None if any has none."""
    there = [part for part in parts if part is not None]
    return run_length.join(there) if len(there) == len(parts) else None


def empty() -> Objects:
    """No objects."""
    none, whole = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    masks = RunLengths(whole.int(), whole.new_zeros(1), whole.reshape(0, 2))
    return Objects(
        whole, whole, none.reshape(0, 4), none, none, none.bool(), whole, masks, bands=masks
    )
