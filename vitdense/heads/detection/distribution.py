"""D-FINE's decoder (Peng et al. 2025): boxes whose edges are distributions over distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import EPS, RARE, DeformableDecoderLayer
from vitdense.layers.deformable_attention import DeformableAttention
from vitdense.layers.mlp import MLP, start_at_zero
from vitdense.losses.set_criterion import Queries
from vitdense.structures import Size

REACH = 0.5
"""The last bin but one moves an edge by this part of the box, the last by twice as much."""

LIMIT = 10.0
"""Position embeddings of queries are clamped to -LIMIT..LIMIT, as in the public models."""

TOP = 4
"""Certainty is read from this many highest probabilities of each edge, and their mean."""


class DistributionDecoder(nn.Module):
    """The first layer predicts a box; every layer then refines how far each of its edges moves.

    How far is a distribution over N + 1 distances ("bins"); a layer adds to its logits, and the
    edge moves by the mean.

    Args:
        layers: of the kind `DeformableDecoderLayer`; D-FINE's are `GatedDecoderLayer`.
        bins: N, an even number.
        scale: the unit of distances is the width or height of the first box divided by this; the
            greater it is, the finer are the bins around 0.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        width: int,
        num_classes: int,
        *,
        bins: int = 32,
        scale: float = 4.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.place = MLP(4, 2 * width, width)
        self.first = start_at_zero(MLP(width, width, width, 4))
        self.predictors = nn.ModuleList(
            DistributionPredictor(width, num_classes, bins) for _ in self.layers
        )
        self.distances, self.scale = bin_distances(bins, scale), scale

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: list[Size],
        *,
        mask: Tensor | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Queries:
        """Decode, with arguments as of `Decoder`.

        Returns:
            L + 1 predictions for L layers: the box of the first layer before it is refined, and
            one after each layer; with the `details` that `DistributionCriterion` reads.
        """
        bins = torch.tensor(self.distances, dtype=references.dtype)
        bins = bins.to(references.device, non_blocking=True)
        edges = [queries.new_zeros(*queries.shape[:2], 4, len(bins))]
        before = torch.zeros_like(queries)
        logits: list[Tensor] = []
        boxes: list[Tensor] = []
        embeddings: list[Tensor] = []
        for layer, predict in zip(self.layers, self.predictors, strict=True):
            places = self.place(references).clamp(-LIMIT, LIMIT)
            queries = layer(queries, places, references, memory, shapes, mask)
            plain, scores, moved = predict(queries, before, edges[-1])
            if not boxes:
                logits.append(plain)
                boxes.append((references.logit(eps=EPS) + self.first(queries)).sigmoid())
                origins = boxes[0].detach()
                embeddings += [embed(queries)] if embed else []
            logits.append(scores)
            embeddings += [embed(queries)] if embed else []
            edges.append(moved)
            boxes.append(move_edges(origins, mean_distances(moved, bins), self.scale))
            references, before = boxes[-1].detach(), queries.detach()
        details = {"edges": torch.stack(edges), "origins": origins.expand(len(boxes), -1, -1, -1)}
        if embeddings:
            details["embeddings"] = torch.stack(embeddings)
        return Queries(torch.stack(logits), torch.stack(boxes), details=details)


class DistributionPredictor(nn.Module):
    """Class and edges of one layer's queries; scores reflect how certain the edges are."""

    def __init__(self, width: int, num_classes: int, bins: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, num_classes)
        self.edges = start_at_zero(MLP(width, width, width, 4 * (bins + 1)))
        self.trust = start_at_zero(MLP(4 * (TOP + 1), 64, 1))
        nn.init.constant_(self.classes.bias, RARE)

    def forward(
        self, queries: Tensor, before: Tensor, edges: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict.

        Args:
            queries, before: float [B, Q, width], of this layer and of the one before.
            edges: float [B, Q, 4, N + 1], logits of the layer before.

        Returns:
            class logits [B, Q, C] of the query alone, class logits that also reflect how certain
            its edges are, and the new logits of the edges.
        """
        edges = edges + self.edges(queries + before).unflatten(-1, (4, -1))
        chances = edges.softmax(-1).topk(TOP, -1).values
        known = torch.cat((chances, chances.mean(-1, keepdim=True)), -1).flatten(-2)
        scores = self.classes(queries)
        return scores, scores + self.trust(known), edges


class GatedDecoderLayer(DeformableDecoderLayer):
    """D-FINE's layer: gates weigh a query against what it saw; the attention has no projections."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        levels: int,
        points: int | Sequence[int],
        *,
        reach: float = 0.5,
    ) -> None:
        super().__init__(width, heads, hidden, dropout, levels, points, reach=reach)
        self.cross_attention = DeformableAttention(
            width, heads, levels, points, reach, project=False
        )
        self.gates = nn.Linear(2 * width, 2 * width)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)

    def merge(self, queries: Tensor, update: Tensor) -> Tensor:
        """Their sum, each weighed by a gate that sees both."""
        old, new = self.gates(torch.cat((queries, update), -1)).sigmoid().chunk(2, -1)
        return self.cross_norm(old * queries + new * update)


def bin_distances(bins: int, scale: float) -> list[float]:
    """Distances of the N + 1 bins, dense around 0: W(n) in section 4.1 of the paper.

    Raises:
        ValueError: if N is odd or less than 4.
    """
    if bins % 2 or bins < 4:
        raise ValueError(f"bins: must be an even number from 4 on, not {bins}")
    step = (REACH * scale + 1) ** (2 / (bins - 2))
    half = [step**i - 1 for i in range(1, bins // 2)] + [2 * REACH * scale]
    return [-distance for distance in reversed(half)] + [0.0] + half


def mean_distances(edges: Tensor, bins: Tensor) -> Tensor:
    """Logits over bins [..., N + 1] -> mean distances [...], in the type of the bins."""
    return edges.to(bins.dtype).softmax(-1) @ bins


def move_edges(origins: Tensor, distances: Tensor, scale: float) -> Tensor:
    """Boxes whose edges are moved outwards; the reverse of `losses.distribution.edge_distances`.

    Args:
        origins: float [..., 4], cxcywh.
        distances: float [..., 4] for left, top, right and bottom, in sizes of the box / `scale`.

    Returns:
        float [..., 4], cxcywh.
    """
    centre, size = origins.chunk(2, -1)
    before, after = (distances / scale * torch.cat((size, size), -1)).chunk(2, -1)
    return torch.cat((centre + (after - before) / 2, (size + before + after).clamp(min=0)), -1)
