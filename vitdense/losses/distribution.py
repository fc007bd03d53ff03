"""Losses of boxes whose edges are distributions over bins (Peng et al. 2025, D-FINE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.losses.classification import ClassLoss, QueryWeight
from vitdense.losses.divisors import mean_count, objects
from vitdense.losses.matcher import Truths, full_precision
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.ops.boxes import cxcywh_to_xyxy, overlaps

TEMPERATURE = 5.0
"""Of the softmax in distillation: earlier layers learn softened distributions of the last."""


class DistributionCriterion(SetCriterion):
    """The set criterion with two terms for queries whose `details` hold distributions.

    The details are `edges`, float [L, B, Q, 4, N + 1], logits over bins for left, top, right and
    bottom, and `origins`, float [L, B, Q, 4], the boxes (cxcywh) that the edges move. The first of
    the L predictions is the box before it is refined; its edges do not count.

    - `fgl` (fine-grained localization): the two bins around the true distance are to be likely.
    - `ddf` (decoupled distillation focal): all layers are to agree with the last one.

    Args:
        distances: of the bins, rising, as `edge_distances` gives them.
        scale: see `edge_distances`.
    """

    def __init__(
        self,
        class_loss: ClassLoss,
        *,
        distances: list[float],
        scale: float,
        class_cost: float,
        class_weight: float,
        fgl_weight: float = 0.15,
        ddf_weight: float = 1.5,
    ) -> None:
        super().__init__(class_loss, class_cost=class_cost, class_weight=class_weight)
        self.distances, self.scale = distances, scale
        self.weights |= {"fgl": fgl_weight, "ddf": ddf_weight}

    def terms(
        self, queries: Queries, truths: Truths, matches: Tensor, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """The terms of the set criterion; `fgl` and `ddf` too for queries with distributions."""
        terms = super().terms(queries, truths, matches, normalizer)
        if not queries.details:
            return terms
        edges = full_precision(queries.details["edges"])
        origins = full_precision(queries.details["origins"])
        index, found = matches.clamp(min=0), matches >= 0
        truth = cxcywh_to_xyxy(truths.boxes.to(edges.dtype))
        boxes = full_precision(queries.boxes).detach()
        iou, _ = overlaps(cxcywh_to_xyxy(pick(boxes, index)), truth)
        quality = iou * found
        # the first layer, one row for each group, is the box before it is refined
        later = (torch.arange(len(edges), device=edges.device) >= queries.groups).to(edges.dtype)
        targets = edge_distances(pick(origins, index), truth, self.scale)
        bins = torch.tensor(self.distances, dtype=edges.dtype).to(edges.device, non_blocking=True)
        fgl = between_bins(pick(edges, index), targets, bins).sum(-1) * quality
        logits = full_precision(queries.logits)
        ddf = distillation(edges, logits, index, found, quality, queries.groups)
        return terms | {"fgl": later * fgl.sum((1, 2)) / normalizer, "ddf": later * ddf}


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Values [L, B, Q, ...] of the queries [L, B, T], as [L, B, T, ...]."""
    shape = (*index.shape, *values.shape[3:])
    return values.gather(2, index[(...,) + (None,) * (values.ndim - 3)].expand(shape))


def edge_distances(origins: Tensor, boxes: Tensor, scale: float) -> Tensor:
    """How far the edges of `boxes` lie outside of those of `origins`.

    Args:
        origins: float [..., 4], cxcywh.
        boxes: float [..., 4], xyxy.
        scale: the unit is the width or height of the origin divided by this.

    Returns:
        float [..., 4] for left, top, right and bottom, negative inside.
    """
    centre, size = origins.chunk(2, -1)
    unit = size.clamp(min=1e-16) / scale
    before, after = (centre - boxes[..., :2]) / unit, (boxes[..., 2:] - centre) / unit
    return torch.cat((before, after), -1) - scale / 2


def between_bins(logits: Tensor, targets: Tensor, bins: Tensor) -> Tensor:
    """Cross-entropy to the two bins around each target, by how near each is.

    Args:
        logits: float [..., N + 1]; targets: float [...]; bins: float [N + 1], rising.

    Returns:
        float [...]; targets beyond the outermost bins count as on them.
    """
    below = (torch.bucketize(targets, bins, right=True) - 1).clamp(0, len(bins) - 2)
    low, high = bins[below], bins[below + 1]
    share = ((targets - low) / (high - low)).clamp(0, 1)
    chances = logits.log_softmax(-1)
    near = chances.gather(-1, torch.stack((below, below + 1), -1))
    return -(near[..., 0] * (1 - share) + near[..., 1] * share)


def distillation(
    edges: Tensor, logits: Tensor, index: Tensor, found: Tensor, quality: Tensor, groups: int
) -> Tensor:
    """Divergence of every layer's distributions from those of the last layer, float [L].

    Each query is weighed: a matched one by its IoU, another by its score in the last layer. The
    means over matched and over other queries are weighed by the square roots of their numbers.

    Args:
        edges: float [L, B, Q, 4, N + 1], logits over bins.
        logits: float [L, B, Q, C], of classes.
        index, found, quality: [L, B, T], the query of each truth, whether it has one, their IoU.
        groups: G, each layer is G rows of L, one for each group of queries.
    """
    teacher, scores = (
        x.detach()[-groups:].repeat(len(x) // groups, *[1] * (x.ndim - 1)) for x in (edges, logits)
    )
    divergence = F.kl_div(
        (edges / TEMPERATURE).log_softmax(-1),
        (teacher / TEMPERATURE).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum((-1, -2))
    places = torch.where(found, index, edges.shape[2])  # truths without a query: behind the end
    weights = F.pad(scores.sigmoid().amax(-1), (0, 1)).scatter(2, places, quality)[..., :-1]
    matched = F.pad(torch.zeros_like(weights), (0, 1)).scatter(2, places, 1.0)[..., :-1]
    losses = TEMPERATURE**2 * weights * divergence / 4  # a mean over the edges
    total = torch.zeros(len(edges), dtype=edges.dtype, device=edges.device)
    share = torch.zeros_like(total)
    queries = edges.shape[2]
    for kind, share_of in ((matched, (1.0, 0.0)), (1 - matched, (0.0, 1.0))):
        here = kind[0].sum()  # the same in every layer
        count = mean_count(here, QueryWeight(objects, queries, *share_of), losses)
        total = total + (losses * kind).sum((1, 2)) / count.where(count > 0, 1).sqrt()
        share = share + count.sqrt()
    return total / share
