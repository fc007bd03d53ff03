"""Precision and recall from matched detections, accumulated as pycocotools does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.metrics.matching import Matches, Rules
from vitdense.metrics.objects import by_score

RECALLS = (*(0.01 * step for step in range(100)), 1.0)
"""101 levels, to the bit as numpy's linspace gives them to pycocotools."""


@dataclass(slots=True)
class Curves:
    """Over T thresholds, R recall levels, K classes, A area ranges and M limits; -1 if undefined.

    Attributes:
        precision: float64 [T, R, K, A, M], the best at this recall or beyond.
        recall: float64 [T, K, A, M], the highest that is reached.
        scores: float64 [T, R, K, A, M], of the detection that reaches the recall.
    """

    precision: Tensor
    recall: Tensor
    scores: Tensor


def accumulate(matches: Matches, rules: Rules) -> Curves:
    """Curves over all images, whose order decides between equal scores."""
    order = by_score(matches.scores)
    order = order.index_select(0, matches.labels.index_select(0, order).argsort(stable=True))
    classes, sizes = len(matches.positives), (len(rules.areas), len(rules.limits))
    shape = (len(rules.thresholds), len(RECALLS), classes, *sizes)
    precision = matches.scores.new_full(shape, -1.0)
    curves = Curves(precision, precision[:, 0].clone(), precision.clone())
    for m, limit in enumerate(rules.limits):
        kept = order[matches.ranks.index_select(0, order) < limit]
        line = _Line(matches, kept, classes)
        for a in range(sizes[0]):
            before = line.wrong_before(a * shape[0])
            for t in range(shape[0]):
                rows = line.curve(a * shape[0] + t, before, matches.positives[:, a])
                curves.precision[t, :, :, a, m] = rows[0].T
                curves.recall[t, :, a, m] = rows[1]
                curves.scores[t, :, :, a, m] = rows[2].T
    return Curves(curves.precision.cpu(), curves.recall.cpu(), curves.scores.cpu())


class _Line:
    """Detections by class and descending score, from which each bit's curves are read.

    Those that match at no threshold are wrong at all or at none: they are counted once for each
    area range. Only the others, a small part, are looked at for each bit.
    """

    def __init__(self, matches: Matches, kept: Tensor, classes: int) -> None:
        labels, scores, matched, self.ignored_all = (
            column.index_select(0, kept)
            for column in (matches.labels, matches.scores, matches.matched, matches.ignored)
        )
        every = torch.arange(classes, device=kept.device)
        self.first = torch.searchsorted(labels, every)
        found = torch.searchsorted(labels, every, right=True) > self.first
        # Recall 0 is reached by the first detection, whatever it is.
        top = torch.cat([scores, scores.new_zeros(1)]).index_select(0, self.first)
        self.top = torch.where(found, top, 0.0)
        self.quiet = matched == 0
        self.busy = (~self.quiet).nonzero()[:, 0]
        self.labels, self.scores, self.matched, self.ignored = (
            column.index_select(0, self.busy)
            for column in (labels, scores, matched, self.ignored_all)
        )
        self.first_busy = torch.searchsorted(self.labels, every)
        self.levels = self.scores.new_tensor(RECALLS)

    def wrong_before(self, bit: int) -> Tensor:
        """int64 [busy], how many of its class before each match nothing and count, as at a bit."""
        wrong = self.quiet & (self.ignored_all >> bit & 1 == 0)
        seen = F.pad(wrong.cumsum(0), (1, 0))
        start = seen.index_select(0, self.first)
        return seen.index_select(0, self.busy) - start.index_select(0, self.labels)

    def curve(self, bit: int, before: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Precision [K, R], recall [K] and scores [K, R]; `before` is that of its area range.

        Only right detections are looked at: at all others neither recall rises nor precision.
        """
        counted = (self.ignored >> bit & 1) ^ 1
        hits = (counted & self.matched >> bit).nonzero()[:, 0]
        labels = self.labels.index_select(0, hits)
        count = torch.zeros_like(positives).index_add_(0, labels, torch.ones_like(labels))
        number = torch.arange(1, len(hits) + 1, device=hits.device)
        number = (number - (count.cumsum(0) - count).index_select(0, labels)).double()
        seen = F.pad(counted.cumsum(0), (1, 0))
        start = seen.index_select(0, self.first_busy).index_select(0, labels)
        so_far = (before + seen[1:]).index_select(0, hits) - start
        precision = number / (so_far.double() + torch.finfo(torch.float64).eps)
        recall = number / positives.index_select(0, labels)
        level = torch.searchsorted(self.levels, recall, right=True) - 1
        cells = labels * len(RECALLS) + level
        best = self._best_beyond(precision, cells, 0.0)
        scores = self._best_beyond(self.scores.index_select(0, hits), cells, -math.inf)
        scores = torch.where(scores.isinf(), 0.0, scores)
        scores[:, 0] = self.top
        recall = count / positives.clamp(min=1).double()
        none = positives == 0
        return (
            best.masked_fill(none[:, None], -1),
            recall.masked_fill(none, -1),
            scores.masked_fill(none[:, None], -1),
        )

    def _best_beyond(self, values: Tensor, cells: Tensor, floor: float) -> Tensor:
        """[K, R], the highest value at each recall level or at a higher one."""
        table = self.scores.new_full((len(self.first) * len(RECALLS),), floor)
        table = table.scatter_reduce_(0, cells, values, "amax").view(-1, len(RECALLS))
        return table.flip(1).cummax(1)[0].flip(1)
