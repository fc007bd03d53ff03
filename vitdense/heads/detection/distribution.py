"""Boxes as distributions that layers refine (Peng et al. 2025, D-FINE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import EPS, DeformableDecoderLayer
from vitdense.layers.deformable_attention import DeformableAttention
from vitdense.layers.mlp import MLP
from vitdense.losses.set_criterion import Queries
from vitdense.structures import Size

REACH = 0.5
"""The last bin but one moves an edge by half of the box, the last by the whole of it."""

LIMIT = 10.0
"""Positions of queries are kept in -LIMIT..LIMIT, as in the public models."""


class DistributionDecoder(nn.Module):
    """A box from the first layer; then every layer adds to the logits of how far its edges move.

    Args:
        layers: of the kind `DeformableDecoderLayer`; D-FINE's are `GatedDecoderLayer`.
        bins: N, an even number; edges move by one of N + 1 distances.
        scale: distances are in widths and heights of the first box over this; the greater, the
            finer are the bins around 0.
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
        self.first = MLP(width, width, width, 4)
        self.predictors = nn.ModuleList(
            DistributionPredictor(width, num_classes, bins) for _ in self.layers
        )
        self.distances, self.scale = bin_distances(bins, scale), scale
        _start_at_zero(self.first)

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
            L + 1 predictions for L layers: before the first is refined and after each layer; with
            the `details` that `DistributionCriterion` wants.
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
    """Class, edges, and how far the edges can be trusted, of the queries of one layer.

    Args:
        top: that many of an edge's chances, and their mean, tell how sure it is.
    """

    def __init__(self, width: int, num_classes: int, bins: int, top: int = 4) -> None:
        super().__init__()
        self.top = top
        self.classes = nn.Linear(width, num_classes)
        self.edges = MLP(width, width, width, 4 * (bins + 1))
        self.trust = MLP(4 * (top + 1), 64, 1)
        nn.init.constant_(self.classes.bias, -math.log(99))
        _start_at_zero(self.edges)
        _start_at_zero(self.trust)

    def forward(
        self, queries: Tensor, before: Tensor, edges: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict.

        Args:
            queries, before: float [B, Q, width], of this layer and of the one before.
            edges: float [B, Q, 4, N + 1], logits of the layer before.

        Returns:
            logits [B, Q, C] by the query alone, those that also tell how well its box is known,
            and the new logits of the edges.
        """
        edges = edges + self.edges(queries + before).unflatten(-1, (4, -1))
        chances = edges.softmax(-1).topk(self.top, -1).values
        known = torch.cat((chances, chances.mean(-1, keepdim=True)), -1).flatten(-2)
        scores = self.classes(queries)
        return scores, scores + self.trust(known), edges


class GatedDecoderLayer(DeformableDecoderLayer):
    """A layer whose queries weigh what they were against what they see, without projections."""

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
        """Both weighed by gates that see both."""
        old, new = self.gates(torch.cat((queries, update), -1)).sigmoid().chunk(2, -1)
        return self.cross_norm(old * queries + new * update)


def bin_distances(bins: int, scale: float) -> list[float]:
    """W(n), section 4.1: the distances of the N + 1 bins, dense around 0.

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
    """Boxes [..., 4], cxcywh, whose edges lie so far outside of those of the origins.

    Args:
        distances: float [..., 4] for left, top, right and bottom, as of `edge_distances`.
    """
    centre, size = origins.chunk(2, -1)
    before, after = (distances / scale * torch.cat((size, size), -1)).chunk(2, -1)
    return torch.cat((centre + (after - before) / 2, (size + before + after).clamp(min=0)), -1)


def _start_at_zero(mlp: MLP) -> None:
    *_, weight, bias = mlp.parameters()
    nn.init.zeros_(weight)
    nn.init.zeros_(bias)
