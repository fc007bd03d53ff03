"""The decoder that deformable heads share: each layer updates the queries and their boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import Predictor
from vitdense.layers.mlp import MLP
from vitdense.layers.position import box_embedding
from vitdense.losses.set_criterion import Queries
from vitdense.structures import Size


class Decoder(nn.Module):
    """Queries look at the cells layer by layer; each layer predicts a class and a box.

    Args:
        layers: of the kind `DeformableDecoderLayer`.
        predictors: one for each layer, or one for all.
        place: makes positions [B, Q, width] of the queries from their references [B, Q, 4]; None
            if the caller gives the positions.
        norm: applied to each layer's queries before the predictor reads them.
        refine: each layer corrects the boxes of the layer before, and looks around them; otherwise
            every layer corrects, and looks around, the first references.
        look_twice: "look forward twice" (Zhang et al. 2023, DINO, section 3.5): the loss of a box
            also trains the box of the layer before, but none further back.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        predictors: Iterable[Predictor],
        *,
        place: nn.Module | None = None,
        norm: nn.Module | None = None,
        refine: bool = True,
        look_twice: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.predictors = nn.ModuleList(predictors)
        self.place, self.norm = place, norm
        self.refine, self.look_twice = refine, look_twice

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: list[Size],
        *,
        places: Tensor | None = None,
        mask: Tensor | None = None,
        groups: int = 1,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Queries:
        """Decode.

        Args:
            queries: float [B, Q, width].
            references: float [B, Q, 2 or 4], points or boxes (cxcywh) in 0..1.
            memory: float [B, S, width], the cells of all levels.
            shapes: (height, width) of each level.
            places: float [B, Q, width], positions of the queries, unless `place` makes them.
            mask: bool [Q, Q], which other queries (columns) each may see.
            groups: how many groups the queries consist of; they do not see each other.
            embed: makes mask embeddings [B, Q, M] of each layer's queries; None without masks.

        Returns:
            predictions of every layer; their `details` have the `embeddings`, if there are any.
        """
        logits, boxes, embeddings = [], [], []
        looked_at = references
        for i, layer in enumerate(self.layers):
            if self.place is not None and (i == 0 or self.refine):
                places = self.place(looked_at)
            queries = layer(queries, places, looked_at, memory, shapes, mask, groups)
            predict = cast(Predictor, self.predictors[i if len(self.predictors) > 1 else 0])
            read = queries if self.norm is None else self.norm(queries)
            deltas = predict.boxes(read)
            logits.append(predict.classes(read))
            boxes.append(predict.move(references, deltas))
            if embed is not None:
                embeddings.append(embed(read))
            if self.refine and i + 1 < len(self.layers):
                # from queries without the norm, as in DINO's code and weights
                if self.norm is not None:
                    deltas = predict.boxes(queries)
                moved = predict.move(looked_at, deltas)
                looked_at = moved.detach()
                references = moved if self.look_twice else looked_at
        details = {"embeddings": torch.stack(embeddings)} if embeddings else {}
        return Queries(torch.stack(logits), torch.stack(boxes), details=details)


class SinePlace(nn.Module):
    """Positions of queries from the sine embedding of their boxes (Liu et al. 2022, DAB-DETR)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = MLP(2 * width, width, width)

    def forward(self, boxes: Tensor) -> Tensor:
        """float [..., 4], cxcywh in 0..1 -> [..., width]."""
        x, y, w, h = boxes.unbind(-1)  # y goes first in the public weights
        embedded = box_embedding(torch.stack((y, x, w, h), -1), self.width // 2)
        return self.mlp(embedded.to(boxes.dtype))
