"""Panoptic maps: made from masks that overlap, and compared with each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.ops.restoring import restored
from vitdense.ops.run_length import WORD, nonzero_bytes
from vitdense.structures import Frame, Prediction


def merge_masks(
    classes: Tensor,
    masks: Tensor,
    things: Tensor,
    frame: Frame,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> Prediction:
    """Panoptic segments by the rules of MaskFormer (arXiv 2107.06278, section 3.4).

    Queries that are sure of a class compete for each pixel by score times mask probability. Those
    that lose too much of their mask are dropped. All stuff of a class becomes one segment.

    Args:
        classes: float [Q, C + 1], logits; the last class is "no object".
        masks: float [Q, h, w], logits over the canvas.
        things: bool [C], classes of which every query is a segment of its own.
        frame: where the image lies on the canvas.
        score_threshold: queries whose best class is not more probable than this are left out.
        overlap_threshold: queries that win a smaller share of their own mask are left out.

    Returns:
        a prediction with `panoptic`, `labels` and `scores`; stuff has the score of its best query.
    """
    scores, labels = classes.softmax(-1).max(-1)
    scores, order = scores.sort(descending=True, stable=True)
    labels, masks = labels[order], masks[order]
    kept = (labels < len(things)) & (scores > score_threshold)
    scores, labels, masks = scores[kept], labels[kept], masks[kept]
    if not len(scores):
        void = torch.zeros(frame.original, dtype=torch.int64, device=masks.device)
        return Prediction(scores=scores, labels=labels, panoptic=void)
    contest = _compete(masks, scores, frame)
    numbers, segments = _number(contest.kept(overlap_threshold), labels, things)
    panoptic = torch.where(contest.inside, numbers[contest.winner], 0)
    return Prediction(scores=scores[segments], labels=labels[segments], panoptic=panoptic)


@dataclass(slots=True)
class _Contest:
    """Which query wins which pixel.

    Attributes:
        winner: int64 [H, W], the query that wins.
        inside: bool [H, W], whether the pixel is in the winner's own mask.
        areas: int64 [K], pixels of each query's mask.
    """

    winner: Tensor
    inside: Tensor
    areas: Tensor

    def kept(self, overlap_threshold: float) -> Tensor:
        """Queries that keep enough of their mask, bool [K]."""
        won, left = (self._count(where) for where in (torch.ones_like(self.inside), self.inside))
        return (left > 0) & (won >= overlap_threshold * self.areas)

    def _count(self, where: Tensor) -> Tensor:
        """Pixels of each winner, int64 [K]."""
        counts = torch.zeros_like(self.areas)
        return counts.scatter_add_(0, self.winner.flatten(), where.flatten().long())


def _compete(masks: Tensor, scores: Tensor, frame: Frame) -> _Contest:
    winner = torch.empty(frame.original, dtype=torch.int64, device=masks.device)
    inside = torch.empty(frame.original, dtype=torch.bool, device=masks.device)
    areas = torch.zeros(len(masks), dtype=torch.int64, device=masks.device)
    for rows, part in restored(masks, frame):
        own = part >= 0
        strongest = (part.sigmoid() * scores[:, None, None]).max(0).indices
        winner[rows] = strongest
        inside[rows] = own.gather(0, strongest[None])[0]
        areas += own.view(torch.uint8).sum((1, 2), dtype=torch.int32)  # bools are slow to sum
    return _Contest(winner, inside, areas)


def _number(kept: Tensor, labels: Tensor, things: Tensor) -> tuple[Tensor, Tensor]:
    """Number the segments.

    Returns:
        int64 [K], the number of each query in the panoptic map, 0 = none; and int64 [S], the first
        query of each segment.
    """
    numbers, segments = [], []
    stuff: dict[int, int] = {}
    facts = torch.stack([kept.long(), labels, things[labels].long()], dim=1).tolist()
    for query, (is_kept, label, is_thing) in enumerate(facts):
        known = 0 if is_thing else stuff.get(label, 0)
        if is_kept and not known:
            segments.append(query)
            known = len(segments)
            stuff[label] = known
        numbers.append(known if is_kept else 0)
    return labels.new_tensor(numbers), labels.new_tensor(segments)


def common_runs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of pixels, row after row, within which both maps are constant.

    Colors are then looked up once for each run, not for each pixel. Fast, because bytes are
    compared and results are read eight at a time.

    Args:
        first, second: colors [H, W, 3] or whole numbers [H, W], both of one type.

    Returns:
        int64 [R], the first pixel of each run, and int64 [R], its length.
    """
    pixels = first.shape[0] * first.shape[1]
    one, other = (maps.contiguous().view(torch.uint8).flatten() for maps in (first, second))
    size = len(one) // max(pixels, 1)
    number = max(len(one) - size, 0)
    changed = torch.empty(number + -number % WORD, dtype=torch.bool, device=one.device)
    changed[number:] = False
    torch.ne(one[size:], one[:number], out=changed[:number])
    changed[:number] |= other[size:] != other[:number]
    places = nonzero_bytes(changed.view(torch.int64))
    if size > 1:
        places = (places // size).unique_consecutive()
    starts = F.pad(places + 1, (1, 0))[:pixels]
    return starts, F.pad(starts, (0, 1), value=pixels).diff()
