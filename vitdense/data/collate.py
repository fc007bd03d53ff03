"""Samples to batches, and batches through the pipe between processes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.structures import IGNORE, Batch, Frame, Sample, Size

_ALIGNMENT = 8


def collate(
    samples: list[Sample], *, divisor: int = 1, canvas: Size | None = None, training: bool
) -> list[Batch]:
    """Lay samples on zero-padded canvases.

    Args:
        divisor: canvas sizes are rounded up to multiples of it.
        canvas: the size before rounding; None takes that of the images.
        training: one batch on a common canvas, the truth padded with it; else one batch for each
            size of canvas, the truth left in original pixels.
    """
    sizes = [canvas or sample.size for sample in samples]
    if training:
        common = (max(size[0] for size in sizes), max(size[1] for size in sizes))
        padded = _round_up(common, divisor)
        return [_batch([_pad_truth(sample, padded) for sample in samples], padded)]
    groups: dict[Size, list[Sample]] = defaultdict(list)
    for sample, size in zip(samples, sizes, strict=True):
        groups[_round_up(size, divisor)].append(sample)
    return [_batch(group, padded) for padded, group in groups.items()]


def _round_up(size: Size, divisor: int) -> Size:
    return ceil(size[0] / divisor) * divisor, ceil(size[1] / divisor) * divisor


def _batch(samples: list[Sample], canvas: Size) -> Batch:
    kinds = {sample.image.dtype for sample in samples}
    kind = torch.uint8 if kinds == {torch.uint8} else torch.float32
    images = torch.zeros((len(samples), samples[0].image.shape[0], *canvas), dtype=kind)
    frames = []
    for place, sample in zip(images, samples, strict=True):
        height, width = sample.image.shape[1:]
        place[:, :height, :width] = sample.image
        frames.append(Frame(canvas, (height, width), sample.original))
    return Batch(
        images,
        [sample.target for sample in samples],
        frames,
        [sample.image_id for sample in samples],
        [sample.path for sample in samples],
    )


def _pad_truth(sample: Sample, canvas: Size) -> Sample:
    target = sample.target
    return replace(
        sample,
        target=replace(
            target,
            masks=_pad(target.masks, canvas, 0),
            semantic=_pad(target.semantic, canvas, IGNORE),
        ),
    )


def _pad(maps: Tensor | None, canvas: Size, value: int) -> Tensor | None:
    if maps is None or tuple(maps.shape[-2:]) == canvas:
        return maps
    height, width = maps.shape[-2:]
    return F.pad(maps, (0, canvas[1] - width, 0, canvas[0] - height), value=value)


@dataclass
class PackedBatch:
    """A batch whose tensors lie in one: between processes each tensor costs a file descriptor.

    A batch of 16 images has about 80 tensors, and a process may often open only 1024 files.

    Attributes:
        skeleton: the batch with tensors that have types and shapes but no values.
        data: uint8, the values of all of them.
    """

    skeleton: Batch
    data: Tensor

    @classmethod
    def pack(cls, batch: Batch) -> PackedBatch:
        """Copy all tensors into one, in memory that processes share."""
        tensors = _tensors(batch)
        skeleton = batch._map(lambda tensor: tensor.to("meta"))
        # Here, because where there is too little of it the queue would lose the batch in silence.
        data = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8).share_memory_()
        packed = cls(skeleton, data)
        for place, tensor in zip(_tensors(packed.unpack()), tensors, strict=True):
            place.copy_(tensor)
        return packed

    def unpack(self) -> Batch:
        """The batch again, its tensors views of `data`."""
        position = 0

        def view(like: Tensor) -> Tensor:
            nonlocal position
            start, position = position, position + _room(like)
            return self.data[start : start + like.nbytes].view(like.dtype).view(like.shape)

        return self.skeleton._map(view)

    def pin_memory(self) -> PackedBatch:
        """Called by torch's loader."""
        return PackedBatch(self.skeleton, self.data.pin_memory())


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch._map(found.append)
    return found


def _room(tensor: Tensor) -> int:
    """Bytes, rounded up so that the next tensor starts where any type may."""
    return ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
