"""Precision and recall from matched detections, accumulated as pycocotools does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitdense.metrics.matching import Matches, Rules

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
    order = (-matches.scores).argsort(stable=True)
    labels, regrouped = matches.labels[order].sort(stable=True)
    order = order[regrouped]
    classes, sizes = len(matches.positives), (len(rules.areas), len(rules.limits))
    shape = (len(rules.thresholds), len(RECALLS), classes, *sizes)
    precision = matches.scores.new_full(shape, -1.0)
    curves = Curves(precision, precision[:, 0].clone(), precision.clone())
    for m, limit in enumerate(rules.limits):
        kept = order[matches.ranks[order] < limit]
        line = _Line(matches, kept, classes)
        for a in range(sizes[0]):
            for t in range(shape[0]):
                bit = a * shape[0] + t
                rows = line.curve(bit, matches.positives[:, a])
                curves.precision[t, :, :, a, m] = rows[0].T
                curves.recall[t, :, a, m] = rows[1]
                curves.scores[t, :, :, a, m] = rows[2].T
    return Curves(curves.precision.cpu(), curves.recall.cpu(), curves.scores.cpu())


class _Line:
    """Detections by class and descending score, from which each bit's curves are read."""

    def __init__(self, matches: Matches, kept: Tensor, classes: int) -> None:
        self.labels, self.scores = matches.labels[kept], matches.scores[kept]
        self.matched, self.ignored = matches.matched[kept], matches.ignored[kept]
        every = torch.arange(classes, device=kept.device)
        self.first = torch.searchsorted(self.labels, every)
        self.found = torch.searchsorted(self.labels, every, right=True) > self.first
        self.levels = self.scores.new_tensor(RECALLS)

    def curve(self, bit: int, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Precision [K, R], recall [K] and scores [K, R].

        Only right detections are looked at: at all others neither recall rises nor precision.
        """
        counted = (self.ignored >> bit & 1) ^ 1
        hits = (counted & self.matched >> bit).nonzero()[:, 0]
        labels = self.labels[hits]
        count = torch.zeros_like(positives).index_add_(0, labels, torch.ones_like(labels))
        seen = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
        number = torch.arange(1, len(hits) + 1, device=hits.device)
        number = (number - (count.cumsum(0) - count)[labels]).double()
        so_far = (seen[hits + 1] - seen[self.first[labels]]).double()
        precision = number / (so_far + torch.finfo(torch.float64).eps)
        level = torch.searchsorted(self.levels, number / positives[labels], right=True) - 1
        cells = labels * len(RECALLS) + level
        best = self._best_beyond(precision, cells, 0.0)
        scores = self._best_beyond(self.scores[hits], cells, -math.inf)
        scores = torch.where(scores.isinf(), 0.0, scores)
        if len(self.scores):
            # Recall 0 is reached by the first detection, whatever it is.
            top = self.scores[self.first.clamp(max=len(self.scores) - 1)]
            scores[:, 0] = torch.where(self.found, top, 0.0)
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
