"""COCO's run-length encoding (RLE) of many masks at once, on any device.

Pixels are counted down the columns, and strings equal pycocotools', byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.structures import Size

WORD = 8
"""Bytes that are compared at once: bool masks are read as int64."""

DIGITS = 8
"""Characters of 5 bits that a run has at most: enough for 2**35 pixels and a sign."""


@dataclass(slots=True)
class RunLengths:
    """N masks of any sizes.

    Attributes:
        edges: int32 [E], for each mask pairs of pixels: the first of a run, and the one behind it.
        starts: int64 [N + 1]; mask i has the edges from starts[i] up to starts[i + 1].
        sizes: int64 [N, 2], height and width.
    """

    edges: Tensor
    starts: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str) -> RunLengths:
        """The same on a device."""
        return RunLengths(self.edges.to(device), self.starts.to(device), self.sizes.to(device))

    def owners(self) -> Tensor:
        """int64 [E], the mask of each edge."""
        every = torch.arange(len(self), device=self.edges.device)
        return every.repeat_interleave(self.starts.diff(), output_size=len(self.edges))

    def parts(self) -> list[RunLengths]:
        """The masks in parts of at most about MOST_EDGES edges, which are views."""
        found = []
        for part in chunks(self.starts.diff(), MOST_EDGES):
            starts = self.starts[part.start : part.stop + 1]
            first, last = starts[[0, -1]].tolist()
            found.append(RunLengths(self.edges[first:last], starts - first, self.sizes[part]))
        return found

    def areas(self) -> Tensor:
        """int64 [N], pixels of each mask."""
        return torch.cat([self.starts[:0], *(_areas(part) for part in self.parts())])

    def boxes(self) -> Tensor:
        """int64 [N, 4], the tight xyxy around each mask; zeros around an empty one."""
        none = self.starts[:0].reshape(0, 4)
        return torch.cat([none, *(_boxes(part) for part in self.parts())])

    def select(self, index: Tensor) -> RunLengths:
        """The masks at int64 positions, in their order."""
        lengths = self.starts.diff()[index]
        starts = F.pad(lengths.cumsum(0), (1, 0))
        places = spread(self.starts[index], lengths)
        return RunLengths(self.edges[places], starts, self.sizes[index])

    def counts(self) -> tuple[Tensor, Tensor]:
        """COCO's uncompressed `counts`: lengths of runs, of background and mask in turn.

        Returns:
            int64 [R], runs of all masks, and int64 [N + 1], where those of each mask begin.
        """
        pixels, lengths = self.sizes.prod(1), self.starts.diff()
        final = self.edges[(self.starts[1:] - 1).clamp(min=0)].long() if len(self.edges) else pixels
        # What is left after the last edge is a run too, unless nothing is.
        tail = ((lengths == 0) | (final != pixels)).long()
        starts = F.pad((lengths + tail).cumsum(0), (1, 0))
        stops = pixels.new_empty(len(self.edges) + int(tail.sum()))
        stops[starts[1:] - 1] = pixels
        stops[spread(starts[:-1], lengths)] = self.edges.long()
        runs = stops.diff(prepend=stops.new_zeros(1))
        runs[starts[:-1]] = stops[starts[:-1]]
        return runs, starts

    def strings(self) -> list[str]:
        """The `counts` of COCO's compressed RLE, one per mask."""
        return [text for part in self.parts() for text in _strings(part)]


def _strings(masks: RunLengths) -> list[str]:
    runs, starts = masks.counts()
    values = runs.clone()
    relative = _places(starts, len(runs)) > 2
    values[2:] -= torch.where(relative[2:], runs[:-2], 0)
    shifts = 5 * torch.arange(DIGITS, device=runs.device)
    digits = (values[:, None] >> shifts) & 31
    rest = values[:, None] >> (shifts + 5)
    more = torch.where((digits & 16) > 0, rest != -1, rest != 0)
    used = F.pad(more[:, :-1], (1, 0), value=True).cumprod(1).bool()
    letters = (digits + 32 * more + 48).to(torch.uint8)[used].cpu().numpy().tobytes().decode()
    ends = F.pad(used.sum(1).cumsum(0), (1, 0))[starts].tolist()
    return [letters[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def _areas(masks: RunLengths) -> Tensor:
    spans = masks.edges[1::2].long() - masks.edges[::2]
    return masks.starts.new_zeros(len(masks)).index_add_(0, masks.owners()[::2], spans)


def _boxes(masks: RunLengths) -> Tensor:
    owner = masks.owners()[::2]
    height = masks.sizes[owner, 0]
    first, last = masks.edges[::2], masks.edges[1::2] - 1
    left, right = first // height, last // height
    # A run over several columns touches both the last row and the first.
    top = torch.where(left == right, first % height, 0)
    bottom = torch.where(left == right, last % height, height - 1)
    index = owner[:, None].expand(-1, 2)
    corners = torch.stack([left, top], 1), torch.stack([right, bottom], 1) + 1
    none = masks.sizes.new_zeros(len(masks), 2)
    near = none.scatter_reduce(0, index, corners[0], "amin", include_self=False)
    return torch.cat([near, none.scatter_reduce(0, index, corners[1], "amax")], 1)


def encode(masks: Tensor) -> RunLengths:
    """Run lengths of bool masks [N, H, W], without a loop; needs about as much memory again.

    Raises:
        ValueError: an image has 2**31 pixels or more.
    """
    count, height, width = masks.shape
    device, stride = masks.device, height * width + 1
    if stride > torch.iinfo(torch.int32).max:
        raise ValueError(f"an image of {height} * {width} pixels is too large for run lengths")
    sizes = torch.tensor([height, width], device=device).repeat(count, 1)
    if masks.numel() == 0:
        return RunLengths(sizes.new_zeros(0).int(), sizes.new_zeros(count + 1), sizes)
    masks = masks.bool()
    above = F.pad(masks[:, -1, :-1], (1, 0))  # of a column's first pixel: the last column's last
    top = (masks[:, 0] != above).flatten().nonzero().squeeze(1)
    end = masks[:, -1, -1].nonzero().squeeze(1)
    image, row, column = _changes(masks)
    keys = torch.cat(
        [
            image * stride + column * height + row,
            top // width * stride + top % width * height,
            end * stride + stride - 1,
        ]
    ).sort()[0]
    starts = torch.searchsorted(keys, torch.arange(count + 1, device=device) * stride)
    return RunLengths((keys % stride).int(), starts, sizes)


def _changes(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of the pixels that differ from the one above: int64 [M] each."""
    _, height, width = masks.shape
    if width % WORD:
        masks = F.pad(masks, (0, -width % WORD))
    masks = masks.contiguous()
    words = (masks.clone() if masks.storage_offset() % WORD else masks).view(torch.int64)
    place = nonzero_bytes((words[:, 1:] ^ words[:, :-1]).flatten())
    per_row = words.shape[2] * WORD
    line, column = place // per_row, place % per_row
    return line // (height - 1) if height > 1 else line, line % max(height - 1, 1) + 1, column


def nonzero_bytes(words: Tensor) -> Tensor:
    """Positions of the bytes of int64 [N] that are not 0, int64 [M]; most words should be 0."""
    place = words.nonzero().squeeze(1)
    inner = words.index_select(0, place).view(torch.uint8).nonzero().squeeze(1)
    return (place.index_select(0, inner >> 3) << 3) + (inner & 7)


def from_counts(runs: Tensor, starts: Tensor, sizes: Tensor) -> RunLengths:
    """Masks from COCO's uncompressed `counts`.

    Args:
        runs: int64 [R], of all masks one after the other, each beginning with background.
        starts: int64 [N + 1], where the runs of each mask begin.
        sizes: int64 [N, 2], height and width.

    Raises:
        ValueError: runs of a mask are negative or do not cover its image; says of which.
    """
    stops = runs.cumsum(0)
    before = F.pad(stops, (1, 0))[starts]
    wrong = before.diff() != sizes.prod(1)
    wrong[torch.bucketize((runs < 0).nonzero().squeeze(1), starts[1:], right=True)] = True
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"RLE number {index} does not cover its image of {sizes[index].tolist()} pixels, "
            "height and width"
        )
    lengths = starts.diff()
    owner = torch.arange(len(sizes), device=runs.device).repeat_interleave(lengths)
    place = _places(starts, len(runs))
    # Pairs only: a last run of background ends no pair.
    keep = place < lengths[owner] // 2 * 2
    edges = (stops - before[owner])[keep].int()
    return RunLengths(edges, F.pad((lengths // 2 * 2).cumsum(0), (1, 0)), sizes)


def from_strings(strings: Sequence[str | bytes], sizes: Sequence[Size]) -> RunLengths:
    """Masks from the `counts` of COCO's compressed RLEs, and (height, width) of each.

    Raises:
        ValueError: a string is no compressed RLE, or does not cover its image; says which.
    """
    data = [text.encode() if isinstance(text, str) else bytes(text) for text in strings]
    shape = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    if not data:
        return RunLengths(torch.zeros(0).int(), torch.zeros(1).long(), shape)
    codes = torch.frombuffer(bytearray(b"".join(data) or b"0"), dtype=torch.uint8).long() - 48
    ends = torch.tensor([len(text) for text in data]).cumsum(0)
    final = codes & 32 == 0
    wrong = torch.tensor([not text for text in data]) | ~final[(ends - 1).clamp(min=0)]
    wrong[torch.bucketize(((codes < 0) | (codes > 63)).nonzero().squeeze(1), ends, right=True)] = 1
    if wrong.any():
        raise ValueError(f"`counts` of RLE number {int(wrong.nonzero()[0])} is no compressed RLE")
    last = final.nonzero().squeeze(1)
    lengths = last.diff(prepend=last.new_tensor([-1]))
    starts = F.pad(torch.bucketize(ends - 1, last) + 1, (1, 0))
    return from_counts(_relative(_numbers(codes, last, lengths), starts), starts, shape)


def _numbers(codes: Tensor, last: Tensor, lengths: Tensor) -> Tensor:
    """Decode signed numbers, written in 5 bits a code, lowest first; each ends at its `last`."""
    owner = torch.arange(len(last)).repeat_interleave(lengths)
    place = torch.arange(len(codes)) - (last - lengths + 1)[owner]
    if (lengths > DIGITS).any():
        raise ValueError("`counts` of a compressed RLE has a run of more than 2**35 pixels")
    values = lengths.new_zeros(len(last)).index_add_(0, owner, (codes & 31) << (5 * place))
    return values - (((codes[last] & 16) > 0).long() << (5 * lengths))


def _relative(values: Tensor, starts: Tensor) -> Tensor:
    """Undo that strings hold all runs but the first three as differences to the one before last."""
    place = _places(starts, len(values))
    owner = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    runs = values.clone()
    for chain in (place % 2 == 1, (place % 2 == 0) & (place > 0)):
        sums = F.pad(torch.where(chain, values, 0).cumsum(0), (1, 0))
        runs = torch.where(chain, sums[1:] - sums[starts[:-1]][owner], runs)
    return runs


def join(parts: Sequence[RunLengths]) -> RunLengths:
    """The masks of all parts, in one."""
    lengths = torch.cat([part.starts.diff() for part in parts])
    return RunLengths(
        torch.cat([part.edges for part in parts]),
        F.pad(lengths.cumsum(0), (1, 0)),
        torch.cat([part.sizes for part in parts]),
    )


def spread(starts: Tensor, lengths: Tensor) -> Tensor:
    """All positions within spans, span after span: starts[0], starts[0] + 1, ..., int64."""
    ends = lengths.cumsum(0)
    offsets = (starts - ends + lengths).repeat_interleave(lengths)
    return offsets + torch.arange(len(offsets), device=offsets.device)


MOST_EDGES = 1 << 22
"""How many edges are worked on at once: takes some 200 MB."""


def chunks(sizes: Tensor, most: int) -> list[slice]:
    """Slices of items whose sizes sum to about `most` each."""
    if len(sizes) == 0:
        return []
    ends = sizes.cumsum(0)
    total = max(int(ends[-1]), most - 1)
    marks = torch.arange(most, total + 1, most, device=sizes.device)
    cuts = sorted({0, len(sizes), *torch.searchsorted(ends, marks, right=True).tolist()})
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def _places(starts: Tensor, total: int) -> Tensor:
    """Index of each of `total` elements within its span, int64 [total]."""
    first = starts[:-1].repeat_interleave(starts.diff(), output_size=total)
    return torch.arange(total, device=starts.device) - first
