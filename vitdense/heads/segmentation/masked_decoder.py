"""Mask2Former's transformer decoder: each query looks where its mask is."""

from __future__ import annotations

from torch import Tensor, nn

from vitdense.layers.attention import Attention
from vitdense.layers.linear import Linear
from vitdense.layers.mlp import MLP, FeedForward
from vitdense.layers.position import sine_position
from vitdense.layers.resize import resize
from vitdense.structures import Size


class MaskedDecoderLayer(nn.Module):
    """Queries attend to the cells within their masks, then to each other."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.cross_attention = Attention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self, queries: Tensor, places: Tensor, cells: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """Update the queries.

        Args:
            queries, places: float [B, Q, width] and [1, Q, width], content and position.
            cells, positions: float [B, S, width] and [1, S, width] of one level.
            mask: bool [B, 1, Q, S], which cells each query may see.
        """
        update = self.cross_attention(queries + places, cells + positions, cells, mask)
        queries = self.cross_norm(queries + self.dropout(update))
        placed = queries + places
        update = self.self_attention(placed, placed, queries)
        return self.feed_forward(self.self_norm(queries + self.dropout(update)))


class MaskPredictor(nn.Module):
    """Class and mask of each query, by the same weights after every layer.

    Args:
        classes: logits of a query, "no object" included.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = Linear(width, classes)
        self.masks = MLP(width, width, width, width)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """float [B, Q, width] -> logits [B, Q, classes], and embeddings of masks [B, Q, width]."""
        normed = self.norm(queries)
        return self.classes(normed), self.masks(normed)


class MaskedDecoder(nn.Module):
    """Learned queries that attend to one level after the other, in turn, each within the mask that
    it predicts (Cheng et al. 2022, Mask2Former, section 3.2.1).

    Args:
        classes: logits of a query, "no object" included.
        levels: how many maps are attended to.
    """

    def __init__(
        self,
        classes: int,
        queries: int,
        levels: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.queries = nn.Embedding(queries, width)
        self.places = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(levels, width)
        self.layers = nn.ModuleList(
            MaskedDecoderLayer(width, heads, hidden, dropout) for _ in range(layers)
        )
        self.predictor = MaskPredictor(width, classes)

    def forward(self, maps: list[Tensor], features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Predict before the first layer and after each.

        Args:
            maps: float [B, width, H_i, W_i], coarsest first.
            features: float [B, width, H, W], what masks are made of.

        Returns:
            logits [B, Q, classes] and embeddings of masks [B, Q, width], each `layers` + 1 times;
            `draw_masks` makes masks of the latter.
        """
        cells = [
            x.flatten(2).transpose(1, 2) + embed
            for x, embed in zip(maps, self.level_embed.weight, strict=True)
        ]
        shapes: list[Size] = [(x.shape[-2], x.shape[-1]) for x in maps]
        positions = [self._positions(shape) for shape in shapes]
        small = [resize(features.detach(), shape) for shape in shapes]
        queries, places = (
            it.weight[None].expand(len(features), -1, -1) for it in (self.queries, self.places)
        )
        logits, embeddings = ([it] for it in self.predictor(queries))
        for index, layer in enumerate(self.layers):
            level = index % len(maps)
            mask = attention_mask(embeddings[-1].detach(), small[level])
            queries = layer(queries, places, cells[level], positions[level], mask)
            for found, new in zip((logits, embeddings), self.predictor(queries), strict=True):
                found.append(new)
        return logits, embeddings

    def _positions(self, shape: Size) -> Tensor:
        weight = self.level_embed.weight
        return sine_position(*shape, weight.shape[-1], offset=0, like=weight)[None]


def draw_masks(embeddings: Tensor, features: Tensor) -> Tensor:
    """Logits of masks: float [B, Q, width], [B, width, H, W] -> [B, Q, H, W]."""
    return (embeddings @ features.flatten(2)).unflatten(-1, features.shape[-2:])


def attention_mask(embeddings: Tensor, features: Tensor) -> Tensor:
    """Which cells lie in each query's mask; all of them where the mask is empty.

    Masks are linear in the features, and so is resizing: features that were resized once give the
    resized masks of every layer.

    Args:
        embeddings: float [B, Q, width].
        features: float [B, width, h, w], resized to the level.

    Returns:
        bool [B, 1, Q, h * w].
    """
    inside = draw_masks(embeddings, features).flatten(2) >= 0
    return (inside | ~inside.any(-1, keepdim=True))[:, None]
