"""DETR (Carion et al. 2020, "End-to-End Object Detection with Transformers")."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.queries import QueryHead, QueryOutputs
from vitdense.layers.attention import Attention
from vitdense.layers.mlp import MLP, FeedForward
from vitdense.layers.position import sine_position
from vitdense.losses.classification import SoftmaxLoss
from vitdense.losses.set_criterion import SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


class DetrEncoderLayer(nn.Module):
    """Every cell attends to every cell."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, cells: Tensor, positions: Tensor) -> Tensor:
        """float [B, S, width], [1, S, width] -> [B, S, width]."""
        placed = cells + positions
        cells = self.norm(cells + self.dropout(self.attention(placed, placed, cells)))
        return self.feed_forward(cells)


class DetrDecoderLayer(nn.Module):
    """Queries attend to each other, then to every cell."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, queries: Tensor, places: Tensor, keys: Tensor, cells: Tensor) -> Tensor:
        """Update the queries.

        Args:
            queries, places: float [B, Q, width], content and learned position.
            keys, cells: float [B, S, width], the memory with and without positions.
        """
        placed = queries + places
        update = self.self_attention(placed, placed, queries)
        queries = self.self_norm(queries + self.dropout(update))
        update = self.cross_attention(queries + places, keys, cells)
        queries = self.cross_norm(queries + self.dropout(update))
        return self.feed_forward(queries)


@HEADS.register("detr")
class DetrHead(QueryHead):
    """The classic: learned queries, global attention on one level, softmax with "no object"."""

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        level: int = -1,  # which level of the pyramid it reads; -1 is the coarsest
        width: PositiveInt = 256,  # of the queries and of the cells
        heads: PositiveInt = 8,  # of attention
        ffn: PositiveInt = 2048,  # hidden width of the feed-forward layers
        encoder_layers: NonNegativeInt = 6,  # layers of self-attention over the cells
        decoder_layers: PositiveInt = 6,  # layers of queries over the cells
        queries: PositiveInt = 100,  # most objects that an image can have
        dropout: Fraction = 0.1,  # in every transformer layer
        aux_loss: bool = True,  # train every decoder layer, not just the last
        max_detections: PositiveInt = 100,  # best ones kept for each image
        nms: Fraction | None = None,  # overlap from which the lesser box of a class is dropped
    ) -> None:
        super().__init__(levels, num_classes, max_detections, nms)
        if not -len(levels) <= level < len(levels):
            raise ValueError(f"level: the pyramid has {len(levels)} levels, so not {level}")
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        self.level, self.width, self.aux_loss = level, width, aux_loss
        self.input = nn.Conv2d(levels[level].channels, width, 1)
        sizes = (width, heads, ffn, dropout)
        self.encoder = nn.ModuleList(DetrEncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DetrDecoderLayer(*sizes) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Embedding(queries, width)
        self.classes = nn.Linear(width, num_classes + 1)
        self.boxes = MLP(width, width, width, 4)
        self.criterion = SetCriterion(SoftmaxLoss(), class_cost=1.0, class_weight=1.0)

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes + 1 logits, "no object" last."""
        cells = self.input(features[self.level])
        height, width = cells.shape[-2:]
        # like a parameter, not like the cells: under autocast those are too coarse for angles
        positions = sine_position(height, width, self.width, offset=0, like=self.queries.weight)
        cells = cells.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            cells = layer(cells, positions[None])
        queries = torch.stack(self._decode(cells, cells + positions[None]))
        return QueryOutputs(
            logits=self.classes(queries),
            boxes=self.boxes(queries).sigmoid(),
            canvas=self.canvas(features),
        )

    def _decode(self, cells: Tensor, keys: Tensor) -> list[Tensor]:
        places = self.queries.weight[None].expand(len(cells), -1, -1)
        queries = torch.zeros_like(places)
        outputs = []
        for layer in self.decoder:
            queries = layer(queries, places, keys, cells)
            outputs.append(self.norm(queries))
        return outputs if self.aux_loss else outputs[-1:]

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each query with its best class, "no object" apart."""
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        queries = torch.arange(scores.shape[1], device=scores.device).expand_as(labels)
        return scores, labels, queries
