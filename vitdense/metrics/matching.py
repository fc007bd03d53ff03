"""COCO's greedy matching of detections to truth, for all images and classes at once.

Each detection, best first, takes the free truth that it overlaps most, once for every area range
and IoU threshold. These are 40 independent games on the same pairs: each is one bit of an int64,
and what is a loop over games elsewhere is one bitwise operation here. Images and classes are
independent too: step s plays the s-th pair of every image and class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitdense.metrics.objects import Objects, by_score
from vitdense.metrics.overlaps import MaskOverlaps, box_overlaps
from vitdense.ops.run_length import RunLengths, chunks, spread

IOU_THRESHOLDS = (*(0.5 + step * ((0.95 - 0.5) / 9) for step in range(9)), 0.95)
"""0.5, 0.55, ..., 0.95, to the bit as numpy's linspace gives them to pycocotools."""

AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""All, small, medium and large, in square pixels, both ends included."""

MOST_PAIRS = 1 << 20
"""Pairs of detection and truth whose overlap is computed at once: some 200 MB."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is counted.

    Attributes:
        thresholds: ascending overlaps from which a detection is right.
        areas: ranges of the truth's area.
        limits: ascending; best detections of an image and class that count.
        class_agnostic: take all objects for one class.
    """

    thresholds: tuple[float, ...] = IOU_THRESHOLDS
    areas: tuple[tuple[float, float], ...] = AREAS
    limits: tuple[int, ...] = (1, 10, 100)
    class_agnostic: bool = False


@dataclass(slots=True)
class Matches:
    """Detections with what became of them, by image, class and descending score.

    Bit a * T + t of `matched` and `ignored` is that of area range a and threshold t of T.

    Attributes:
        images, labels, ranks: int64 [N]; the rank counts within image and class from 0.
        scores: float64 [N].
        matched, ignored: int64 [N].
        positives: int64 [classes, areas], objects to be found.
    """

    images: Tensor
    labels: Tensor
    ranks: Tensor
    scores: Tensor
    matched: Tensor
    ignored: Tensor
    positives: Tensor


def match(truth: Objects, detections: Objects, classes: int, rules: Rules) -> Matches:
    """Match detections to truth; by masks if the objects have them, and by bands if they have both.

    The smaller of the two overlaps counts then. Detections of equal score keep their order, and of
    truths that overlap a detection equally it takes the last, as in pycocotools. Memory is bounded
    but for a few numbers per object.
    """
    truth = _in_groups(truth, rules)
    if rules.class_agnostic:  # of equal scores that of the first class comes first
        classes, detections = 1, _in_groups(detections, rules)
    detections, ranks = _best(detections, classes, rules.limits[-1])
    counts = [~outside for outside in _not_counted(truth, rules)]
    regular = _bits(counts, rules)
    owner = truth.images * classes + truth.labels
    group = detections.images * classes + detections.labels
    pairs = _pairs(truth, owner, detections, group, rules.thresholds[0])
    matched, ignored = _play(pairs, owner, truth.crowd, regular, len(detections), rules)
    outside = _bits(_not_counted(detections, rules), rules)
    positives = torch.zeros(classes, len(rules.areas), dtype=torch.int64, device=ranks.device)
    return Matches(
        images=detections.images,
        labels=detections.labels,
        ranks=ranks,
        scores=detections.scores,
        matched=matched,
        ignored=ignored | (~matched & outside),
        positives=positives.index_add_(0, truth.labels, torch.stack(counts, 1).long()),
    )


def _in_groups(objects: Objects, rules: Rules) -> Objects:
    """Sorted by image, then class; the rest keeps its order."""
    order = objects.labels.argsort(stable=True)
    order = order[objects.images[order].argsort(stable=True)]
    objects = objects.select(order)
    if rules.class_agnostic:
        objects.labels = torch.zeros_like(objects.labels)
    return objects


def _best(detections: Objects, classes: int, limit: int) -> tuple[Objects, Tensor]:
    """Those that count, by descending score within their groups, and their ranks there."""
    order = by_score(detections.scores)
    group = (detections.images * classes + detections.labels).index_select(0, order)
    group, regrouped = group.sort(stable=True)
    ranks = places(group)
    kept = (ranks < limit).nonzero()[:, 0]
    order = order.index_select(0, regrouped.index_select(0, kept))
    return detections.select(order), ranks.index_select(0, kept)


def places(group: Tensor) -> Tensor:
    """How far each of sorted int64 [N] stands from the first that is equal."""
    sizes = group.unique_consecutive(return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=len(group))
    return torch.arange(len(group), device=group.device) - first


def _not_counted(objects: Objects, rules: Rules) -> list[Tensor]:
    """bool [N] for each area range: crowds, and those outside the range."""
    areas = objects.areas
    return [objects.crowd | (areas < low) | (areas > high) for low, high in rules.areas]


def _bits(flags: list[Tensor], rules: Rules) -> Tensor:
    """bool [N] of each area range as int64 [N], each flag at all thresholds of its range."""
    size = len(rules.thresholds)
    bits = torch.zeros_like(flags[0], dtype=torch.int64)
    for area, flag in enumerate(flags):
        bits |= flag * (((1 << size) - 1) << (size * area))
    return bits


@dataclass(slots=True)
class _Pairs:
    """Detections and truths of one image and class that overlap enough for the lowest threshold."""

    detection: Tensor
    truth: Tensor
    overlap: Tensor


def _pairs(
    truth: Objects, owner: Tensor, detections: Objects, group: Tensor, lowest: float
) -> _Pairs:
    groups, counts = owner.unique_consecutive(return_counts=True)
    low = torch.searchsorted(group, groups)
    many = torch.searchsorted(group, groups, right=True) - low
    busy, sizes = spread(low, many), counts.repeat_interleave(many)
    first = (counts.cumsum(0) - counts).repeat_interleave(many)
    by_mask = _by_runs(detections.masks, truth.masks, lowest)
    by_band = _by_runs(detections.bands, truth.bands, lowest)
    found = [(busy[:0], busy[:0], detections.scores[:0])]
    for part in chunks(sizes, MOST_PAIRS):
        one = busy[part].repeat_interleave(sizes[part])
        other = spread(first[part], sizes[part])
        crowd = truth.crowd[other]
        if by_mask:
            overlap = by_mask(detections.rows[one], truth.rows[other], crowd)
        else:
            boxes = detections.boxes.index_select(0, one), truth.boxes.index_select(0, other)
            overlap = box_overlaps(*boxes, crowd)
        near = (overlap >= lowest).nonzero()[:, 0]
        one, other, overlap = one[near], other[near], overlap[near]
        if by_band:
            bands = by_band(detections.rows[one], truth.rows[other], crowd[near])
            overlap = overlap.minimum(bands)
            near = (overlap >= lowest).nonzero()[:, 0]
            one, other, overlap = one[near], other[near], overlap[near]
        found.append((one, other, overlap))
    return _Pairs(*(torch.cat(column) for column in zip(*found, strict=True)))


def _by_runs(
    detections: RunLengths | None, truth: RunLengths | None, lowest: float
) -> MaskOverlaps | None:
    if detections is None or truth is None:
        return None
    return MaskOverlaps(detections, truth, lowest)


def _play(
    pairs: _Pairs, owner: Tensor, crowd: Tensor, regular: Tensor, detections: int, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Bits of the detections that found a truth, and of those whose truth is ignored."""
    entries = _turns(pairs, regular, rules)
    group = owner[entries[1]]
    turns, order = places(group).sort(stable=True)
    detection, other, games, ignored = (column.index_select(0, order) for column in entries)
    free = torch.full_like(regular, -1)
    stays = torch.where(crowd, -1, 0)  # any number of detections may lie in a crowd
    matched = torch.zeros(detections, dtype=torch.int64, device=group.device)
    spared = matched.clone()
    ends = torch.bincount(turns).cumsum(0).tolist()
    for a, b in zip([0, *ends], ends, strict=False):
        one, its = detection[a:b], other[a:b]
        hit = games[a:b] & free[its] & ~matched[one]
        matched[one] |= hit
        spared[one] |= hit & ignored[a:b]
        free[its] &= ~hit | stays[its]
    return matched, spared


def _turns(pairs: _Pairs, regular: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs in the order of play: detection, truth, the bits played for, and -1 if ignored.

    A detection first tries the truths that count, by descending overlap, then the ignored ones.
    """
    size, areas = len(rules.thresholds), len(rules.areas)
    levels = pairs.overlap.new_tensor([min(level, 1 - 1e-10) for level in rules.thresholds])
    passed = torch.searchsorted(levels, pairs.overlap, right=True)
    games = ((1 << passed) - 1) * sum(1 << (size * area) for area in range(areas))
    # Of equal overlaps the last truth comes first.
    order = (-pairs.overlap.flip(0)).argsort(stable=True)
    order = len(order) - 1 - order
    detection, other, games = pairs.detection[order], pairs.truth[order], games[order]
    counts = regular[other]
    columns = (
        torch.cat([detection, detection]),
        torch.cat([other, other]),
        torch.cat([games & counts, games & ~counts]),
        torch.cat([torch.zeros_like(games), torch.full_like(games, -1)]),
    )
    order = (columns[0] * 2 - columns[3]).argsort(stable=True)
    order = order[columns[2][order] != 0]
    detection, other, games, ignored = (column[order] for column in columns)
    return detection, other, games, ignored
