"""Masks in original pixels, from logits that are resized a few rows at a time to save memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitdense.ops.rows import chunks, numbers_at_once, restore_rows
from vitdense.structures import Frame


def restored(maps: Tensor, frame: Frame) -> Iterator[tuple[slice, Tensor]]:
    """Yield maps in original pixels, a few rows at a time.

    Args:
        maps: float [N, h, w] over the canvas.

    Yields:
        which rows, and the maps there, float32 [N, rows, W].
    """

    def read(first: int, last: int) -> Tensor:
        return maps[:, first:last].float()

    size = (maps.shape[1], maps.shape[2])
    if len(maps):
        for first, last in chunks(len(maps), frame, maps.device):
            yield slice(first, last), restore_rows(read, size, frame, first, last)


def restore_masks(logits: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Masks in original pixels, and the mean probability of their pixels.

    Args:
        logits: float [N, h, w] over the canvas.

    Returns:
        bool [N, H, W], where the logits are above 0; float [N] in 0..1, the mean of the sigmoid
        within each mask, 0 for an empty one.
    """
    masks = torch.empty(len(logits), *frame.original, dtype=torch.bool, device=logits.device)
    total = torch.zeros(len(logits), device=logits.device)
    area = torch.zeros(len(logits), device=logits.device)
    for rows, part in restored(logits, frame):
        inside = part > 0
        masks[:, rows] = inside
        counted = inside.float()  # on a CPU bools are slow to multiply and to sum
        total += (part.sigmoid() * counted).sum((1, 2))
        area += counted.sum((1, 2))
    return masks, total / area.clamp(min=1)


def restore_products(embeddings: Tensor, pixels: Tensor, frame: Frame) -> Tensor:
    """Masks in original pixels whose logits are dot products of embeddings and pixel features.

    Args:
        embeddings: float [N, M].
        pixels: float [M, h, w] over the canvas.

    Returns:
        bool [N, H, W], where the logits are above 0.
    """
    masks = embeddings.new_empty(len(embeddings), *frame.original, dtype=torch.bool)
    step = max(1, numbers_at_once(pixels.device) // pixels[0].numel())
    for some, found in zip(embeddings.split(step), masks.split(step), strict=True):
        logits = torch.einsum("nm,mhw->nhw", some, pixels)
        for rows, part in restored(logits, frame):
            torch.gt(part, 0, out=found[:, rows])
    return masks
