"""Counts of pairs of whole numbers in two maps, such as confusion matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from vitdense.ops.run_length import WORD


def joint_histogram(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """How often each pair of numbers occurs; on a GPU the host does not wait for it.

    Args:
        rows, columns: whole numbers [...], 0..R-1 and 0..C-1.
        shape: (R, C).

    Returns:
        int64 [R, C].
    """
    maps = [rows.flatten(), columns.flatten()]
    if rows.device.type == "cpu":
        if max(shape) > 256:
            return _count(maps, shape)
        maps = [side.to(torch.uint8) for side in maps]
        if shape[0] * shape[1] <= 256:
            maps = [torch.add(maps[1], maps[0], alpha=shape[1])]
        return _by_words(maps, shape)
    cells = torch.add(maps[1].long(), maps[0].long(), alpha=shape[1])
    counts = torch.zeros(shape, dtype=torch.int64, device=cells.device)
    # Not bincount, which waits to learn how large its result must be.
    counts.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
    return counts


def _count(maps: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Counts from two maps of rows and columns, or from one map of cells, `row * C + column`."""
    cells = maps[0]
    if len(maps) == 2:
        cells = torch.add(maps[1].int(), maps[0].int(), alpha=shape[1])
    return cells.bincount(minlength=shape[0] * shape[1]).view(shape)


def _by_words(maps: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """`_count` of uint8 [N], faster: where eight pixels in a row are equal, one is counted as 8."""
    whole = len(maps[0]) - len(maps[0]) % WORD
    aligned = [side.clone() if side.storage_offset() % WORD else side for side in maps]
    words = [side[:whole].view(torch.int64) for side in aligned]
    changes = [side ^ (side << 8 | side & 255) for side in words]  # each byte ^ the one before
    mixed = (changes[0] | changes[-1]).nonzero()[:, 0]
    within = [side.index_select(0, mixed).view(torch.uint8) for side in words]
    firsts = _count([side[:whole:WORD] for side in maps], shape)
    alike = firsts - _count([side[::WORD] for side in within], shape)
    return WORD * alike + _count(within, shape) + _count([side[whole:] for side in maps], shape)
