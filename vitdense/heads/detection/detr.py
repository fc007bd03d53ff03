"""DETR (Carion et al. 2020), with the queries of Conditional DETR and of DAB-DETR."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.conditional_transformer import ConditionalDecoderLayer
from vitdense.heads.detection.deformable_transformer import Predictor
from vitdense.heads.detection.detr_queries import (
    BoxQueries,
    LearnedQueries,
    PointQueries,
    xavier,
)
from vitdense.heads.detection.detr_transformer import DetrDecoderLayer, DetrEncoderLayer
from vitdense.heads.detection.queries import QueryHead, QueryOutputs
from vitdense.layers.conv import Conv
from vitdense.layers.linear import Linear
from vitdense.layers.mlp import MLP
from vitdense.layers.position import sine_position
from vitdense.losses.classification import FocalLoss, SoftmaxLoss
from vitdense.losses.set_criterion import SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target

KINDS = ("learned", "conditional", "dab")
"""Values of `query_kind`."""


@HEADS.register("detr")
class DetrHead(QueryHead):
    """DETR: learned queries, and global attention on one level.

    - `learned` queries are vectors; classes compete with "no object" in a softmax (DETR).
    - `conditional` queries have a point each, around which they look (Meng et al. 2021).
    - `dab` queries are boxes that every layer corrects (Liu et al. 2022).

    The last two have independent classes, trained by focal loss.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        level: int = -1,  # which level of the pyramid it reads; -1 is the coarsest
        query_kind: Literal["learned", "conditional", "dab"] = "learned",  # vectors, points, boxes
        width: PositiveInt = 256,  # channels of the queries and of the maps
        heads: PositiveInt = 8,  # attention heads
        ffn: PositiveInt = 2048,  # hidden width of the feed-forward layers
        encoder_layers: NonNegativeInt = 6,  # layers of self-attention over the cells
        decoder_layers: PositiveInt = 6,  # layers in which queries attend to the maps
        queries: PositiveInt = 100,  # most objects that an image can have
        dropout: Fraction = 0.1,  # in every transformer layer
        aux_loss: bool = True,  # train every decoder layer, not just the last
        max_detections: PositiveInt = 100,  # best ones kept for each image
        score_threshold: Fraction = 0.0,  # drops lower scores; keep 0 to measure AP
        nms: Fraction | None = None,  # IoU from which a class's lower-scoring box is dropped
    ) -> None:
        super().__init__(levels, num_classes, max_detections, nms, score_threshold)
        if not -len(levels) <= level < len(levels):
            raise ValueError(f"level: the pyramid has {len(levels)} levels, so not {level}")
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        if query_kind not in KINDS:
            raise ValueError(f"query_kind: is {query_kind!r}, not one of {', '.join(KINDS)}")
        if query_kind == "dab" and not aux_loss:
            raise ValueError("aux_loss: dab queries train the moves of earlier layers through it")
        self.level, self.width, self.aux_loss = level, width, aux_loss
        self.query_kind = query_kind
        self.input = Conv(levels[level].channels, width, 1)
        sizes = (width, heads, ffn, dropout)
        self._build_encoder(encoder_layers, sizes)
        self._build_decoder(decoder_layers, sizes, queries)
        self._build_predictors()

    def _build_encoder(self, count: int, sizes: tuple[int, int, int, float]) -> None:
        is_dab = self.query_kind == "dab"
        self.activation = nn.PReLU if is_dab else nn.ReLU
        self.temperature = 20 if is_dab else 10000
        self.encoder = nn.ModuleList(
            DetrEncoderLayer(*sizes, self.activation()) for _ in range(count)
        )
        # DAB-DETR scales the positions of the cells by what their content asks for
        self.scale = xavier(MLP(*[self.width] * 3)) if is_dab and count else None

    def _build_decoder(self, count: int, sizes: tuple[int, int, int, float], queries: int) -> None:
        self.queries: LearnedQueries | BoxQueries
        if self.query_kind == "learned":
            self.queries = LearnedQueries(queries, self.width)
            self.decoder = nn.ModuleList(DetrDecoderLayer(*sizes) for _ in range(count))
        else:
            kind = BoxQueries if self.query_kind == "dab" else PointQueries
            self.queries = kind(queries, self.width, count)
            self.decoder = nn.ModuleList(
                ConditionalDecoderLayer(*sizes, i == 0, self.activation()) for i in range(count)
            )
        self.norm = nn.LayerNorm(self.width)

    def _build_predictors(self) -> None:
        if self.query_kind == "learned":
            self.classes = Linear(self.width, self.num_classes + 1)
            self.boxes = MLP(self.width, self.width, self.width, 4)
            self.criterion = SetCriterion(SoftmaxLoss(), class_cost=1.0, class_weight=1.0)
        else:
            predictor = Predictor(self.width, self.num_classes)
            self.classes, self.boxes = predictor.classes, predictor.boxes
            weight = 1.0 if self.query_kind == "dab" else 2.0  # as in the code of each paper
            self.criterion = SetCriterion(FocalLoss(), class_cost=2.0, class_weight=weight)

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes logits; for learned queries one more, "no object"."""
        cells = self.input(features[self.level])
        height, width = cells.shape[-2:]
        # in the type of a parameter: under autocast that of the cells is too coarse for angles
        positions = sine_position(
            height,
            width,
            self.width,
            offset=0,
            like=self.queries.weight,
            temperature=self.temperature,
        )[None]
        cells = self._encode(cells.flatten(2).transpose(1, 2), positions)
        queries, references = self._decode(cells, positions)
        return QueryOutputs(
            logits=self.classes(queries),
            boxes=(self.boxes(queries) + references).sigmoid(),
            canvas=self.canvas(features),
        )

    def _encode(self, cells: Tensor, positions: Tensor) -> Tensor:
        for layer in self.encoder:
            placed = positions if self.scale is None else positions * self.scale(cells)
            cells = layer(cells, placed)
        return cells

    def _decode(self, cells: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [L, B, Q, width], and logits [L, B, Q, 4] that their boxes are relative to."""
        keys = cells + positions if self.query_kind == "learned" else positions
        looked_at = references = self.queries.references()
        content = references.new_zeros(len(cells), references.shape[1], self.width)
        outputs, anchors = [], []
        for i, layer in enumerate(self.decoder):
            if i:
                references, looked_at = self.queries.refine(looked_at, content, self.boxes)
            guides = self.queries(looked_at, content, first=i == 0)
            content = layer(content, *guides, keys, cells)
            outputs.append(self.norm(content))
            anchors.append(references.expand(len(cells), -1, -1))
        start = 0 if self.aux_loss else -1
        return torch.stack(outputs[start:]), torch.stack(anchors[start:])

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair of query and class; for learned queries, each query with its best class."""
        if self.query_kind != "learned":
            return super().candidates(logits)
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # "no object" apart
        queries = torch.arange(scores.shape[1], device=scores.device).expand_as(labels)
        return scores, labels, queries
