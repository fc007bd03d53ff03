"""The true masks of a batch, and their values at points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitdense.losses.matcher import copy_to_host
from vitdense.losses.points import sample_masks
from vitdense.structures import IGNORE, Target, Task


@dataclass(slots=True)
class MaskTruths:
    """The truth of a batch; labels are padded to the image with most masks, masks are not.

    Attributes:
        labels: int64 [B, T].
        counts: how many of the T are real in each image.
        masks: bool [N, H, W], those of the first image, then of the second, ...
        void: bool [B, H, W], pixels that are not judged; None = all are.
    """

    labels: Tensor
    counts: list[int]
    masks: Tensor
    void: Tensor | None = None

    @classmethod
    def from_targets(cls, targets: list[Target], task: Task) -> Self:
        """One mask per object, per segment, or per class that the image has.

        - `instance`: every pixel is judged, those in no mask are background.
        - `panoptic`: pixels in no mask are void: unlabelled, or padding.
        - `semantic`: one mask for all pixels of a class, those with IGNORE are void. Which classes
          there are makes the host wait for the device.

        Raises:
            ValueError: the targets lack what the task needs.
        """
        if task == "semantic":
            return cls._from_semantic(targets)
        labels = [target.labels for target in targets if target.labels is not None]
        masks = [target.masks for target in targets if target.masks is not None]
        if not len(labels) == len(masks) == len(targets):
            raise ValueError(
                f"targets: the task {task} is learnt from masks, and these have none; set `masks: "
                f"true` of the data set coco, or `task: {task}` of one that has it"
            )
        void = torch.stack([~each.any(0) for each in masks]) if task == "panoptic" else None
        return cls._collect(labels, masks, void)

    @classmethod
    def _from_semantic(cls, targets: list[Target]) -> Self:
        maps = [target.semantic for target in targets if target.semantic is not None]
        if len(maps) != len(targets):
            raise ValueError(
                "targets: the task semantic is learnt from label maps, and these have none; set "
                "`task: semantic` of a data set that has it"
            )
        semantic = torch.stack(maps).long()
        present = torch.zeros(len(maps), IGNORE + 1, device=semantic.device, dtype=torch.bool)
        present.scatter_(1, semantic.flatten(1), True)
        found = [np.flatnonzero(row) for row in copy_to_host(present[:, :IGNORE]).numpy()]
        labels = [torch.from_numpy(each).to(semantic.device, non_blocking=True) for each in found]
        masks = [map_ == each[:, None, None] for map_, each in zip(semantic, labels, strict=True)]
        return cls._collect(labels, masks, semantic == IGNORE)

    @classmethod
    def _collect(cls, labels: list[Tensor], masks: list[Tensor], void: Tensor | None) -> Self:
        padded = pad_sequence(labels, batch_first=True)
        return cls(padded, [len(each) for each in labels], torch.cat(masks), void)

    def pairs(self, matches: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """The matched pairs of every layer without the padding; the host waits for nothing.

        Args:
            matches: int64 [L, B, T], the query of each truth; -1 for padding, and for those that
                found none because their image has more than `queries`.
            queries: of each image.

        Returns:
            of M pairs the image, int64 [M], and in each layer the query and the index in `masks`,
            int64 [L, M].
        """
        kept = [min(count, queries) for count in self.counts]
        starts = [sum(self.counts[:image]) for image in range(len(kept))]
        images = [image for image, count in enumerate(kept) for _ in range(count)]
        image, first, rank = self._to_device(
            images, [starts[image] for image in images], [r for count in kept for r in range(count)]
        )
        matched_first = (matches < 0).byte().argsort(dim=2, stable=True)
        truth = matched_first[:, image, rank]
        found = matches[:, image].gather(2, truth[..., None])[..., 0]
        return image, found, first + truth

    def sample_all(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """All masks, each at the points of its image.

        Args:
            points: float [B, P, 2] in 0..1 of the canvas.

        Returns:
            float [B, T, P] in 0..1; how far each point counts, float [B, P] in 0..1 or None.
        """
        (image,) = self._to_device([i for i, count in enumerate(self.counts) for _ in range(count)])
        rows = torch.arange(len(image), device=points.device)
        share = sample_masks(self.masks, rows, points[image])
        truth = pad_sequence(list(share.split(self.counts)), batch_first=True)
        if self.void is None:
            return truth, None
        every = torch.arange(len(points), device=points.device)
        weight = 1 - sample_masks(self.void, every, points, extend=True)
        return _undiluted(truth, weight[:, None]), weight

    def sample(self, images: Tensor, rows: Tensor, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some masks, each at points of its own.

        Args:
            images, rows: int64 [R], the image and the index in `masks` of each.
            points: float [R, P, 2] in 0..1 of the canvas.

        Returns:
            float [R, P] in 0..1; how far each point counts, float [R, P] in 0..1 or None.
        """
        share = sample_masks(self.masks, rows, points)
        if self.void is None:
            return share, None
        weight = 1 - sample_masks(self.void, images, points, extend=True)
        return _undiluted(share, weight), weight

    def _to_device(self, *numbers: list[int]) -> tuple[Tensor, ...]:
        # a tensor that is made on a GPU makes the host wait
        device = self.labels.device
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True).unbind()


def classes_shown(target: Target) -> int:
    """How many classes the label map of an image has; waits for its device."""
    if target.semantic is None:
        return 0
    return int((target.semantic.unique() != IGNORE).sum())


def _undiluted(share: Tensor, weight: Tensor) -> Tensor:
    """Values among the judged pixels alone, so that a mask does not fade towards void."""
    return (share / weight.clamp(min=1e-6)).clamp(max=1)
