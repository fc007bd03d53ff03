"""Deformable DETR (Zhu et al. 2021), with its two-stage and box-refining variants."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    Predictor,
    cell_centres,
    cell_positions,
    cell_proposals,
)
from vitdense.heads.detection.queries import QueryHead, QueryOutputs
from vitdense.layers.position import box_embedding
from vitdense.losses.classification import FocalLoss
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Size, Target

FINE = 6
"""Levels of a smaller stride are not read by default: stride 8, or 7 after a patch of 14, is."""


@HEADS.register("deformable_detr")
class DeformableDetrHead(QueryHead):
    """Multi-level deformable attention; the best cells of the encoder become queries."""

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        input_levels: list[int] | None = None,  # which to read; by default strides from 8
        num_levels: PositiveInt = 4,  # levels of attention; those missing are made from the last
        width: PositiveInt = 256,  # of the queries and of the cells
        heads: PositiveInt = 8,  # of attention
        points: PositiveInt = 4,  # sampled by each head on each level
        ffn: PositiveInt = 1024,  # hidden width of the feed-forward layers
        encoder_layers: NonNegativeInt = 6,  # layers of deformable attention over the cells
        decoder_layers: PositiveInt = 6,  # layers of queries over the cells
        queries: PositiveInt = 300,  # most objects that an image can have
        dropout: Fraction = 0.1,  # in every transformer layer
        two_stage: bool = True,  # queries are the best cells of the encoder, not learned
        class_aware_proposals: bool = False,  # the first stage tells classes apart
        box_refinement: bool = True,  # each layer corrects the boxes of the one before
        aux_loss: bool = True,  # train every decoder layer, not just the last
        max_detections: PositiveInt = 100,  # best ones kept for each image
        nms: Fraction | None = None,  # overlap from which the lesser box of a class is dropped
    ) -> None:
        super().__init__(levels, num_classes, max_detections, nms)
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        if box_refinement and not aux_loss:
            raise ValueError("aux_loss: box_refinement trains its earlier layers through it")
        self.input_levels = choose_levels(levels, input_levels, num_levels)
        self.two_stage, self.box_refinement, self.aux_loss = two_stage, box_refinement, aux_loss
        self.width, self.num_queries = width, queries
        self.class_aware_proposals = class_aware_proposals
        self.inputs = input_projections(
            [levels[i].channels for i in self.input_levels], width, num_levels
        )
        self.level_embed = nn.Parameter(torch.randn(num_levels, width))
        sizes = (width, heads, ffn, dropout, num_levels, points)
        self.encoder = nn.ModuleList(DeformableEncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DeformableDecoderLayer(*sizes) for _ in range(decoder_layers))
        self._build_queries()
        # without refinement all layers predict from the same references, by one predictor
        count = decoder_layers if box_refinement else 1
        # learned references are points: boxes start at an eighth of the image
        starts = [0.0 if two_stage or i else -2.0 for i in range(count)]
        self.predictors = nn.ModuleList(Predictor(width, num_classes, start) for start in starts)
        self.criterion = SetCriterion(FocalLoss(), class_cost=2.0, class_weight=2.0)

    def _build_queries(self) -> None:
        width = self.width
        if not self.two_stage:
            self.queries = nn.Embedding(self.num_queries, 2 * width)
            self.references = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.references.weight)
            nn.init.zeros_(self.references.bias)
            return
        self.proposal = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.proposer = Predictor(width, self.num_classes if self.class_aware_proposals else 1)
        self.place = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width))

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes logits."""
        maps = self._project(features)
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        centres = cell_centres(shapes, self.level_embed)
        positions = cell_positions(shapes, self.level_embed)[None]
        for layer in self.encoder:
            memory = layer(memory, positions, centres[None], shapes)
        encoder_logits = encoder_boxes = None
        if self.two_stage:
            encoder_logits, encoder_boxes = self._propose(memory, centres, shapes)
            references = self._select(encoder_logits, encoder_boxes)
            embedded = self.place(box_embedding(references, self.width // 2))
            places, queries = embedded.chunk(2, -1)
        else:
            embedded = self.queries.weight[None].expand(len(memory), -1, -1)
            places, queries = embedded.chunk(2, -1)
            references = self.references(places).sigmoid()
        logits, boxes = self._decode(queries, places, references, memory, shapes)
        return QueryOutputs(logits, boxes, self.canvas(features), encoder_logits, encoder_boxes)

    def _project(self, features: list[Tensor]) -> list[Tensor]:
        """float [B, width, H_i, W_i] for each level of attention."""
        last = features[self.input_levels[-1]]
        maps: list[Tensor] = []
        for i, project in enumerate(self.inputs):
            if i < len(self.input_levels):
                maps.append(project(features[self.input_levels[i]]))
            else:
                last = project(last)
                maps.append(last)
        return maps

    def _propose(
        self, memory: Tensor, centres: Tensor, shapes: list[Size]
    ) -> tuple[Tensor, Tensor]:
        """Logits [1, B, S, C] and boxes [1, B, S, 4] that each cell proposes."""
        anchors, usable = cell_proposals(shapes, centres)
        cells = self.proposal(memory.masked_fill(~usable, 0.0))
        logits, boxes = self.proposer(cells, anchors)
        return logits[None], boxes[None]

    def _select(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """The boxes [B, Q, 4] of the best cells; no gradient flows into the choice."""
        count = min(self.num_queries, logits.shape[2])
        best = logits[0].amax(-1).topk(count, dim=1).indices
        return boxes[0].detach().gather(1, best[..., None].expand(-1, -1, 4))

    def _decode(
        self,
        queries: Tensor,
        places: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: list[Size],
    ) -> tuple[Tensor, Tensor]:
        """Logits [L, B, Q, C] and boxes [L, B, Q, 4] of the layers that are trained."""
        logits, boxes = [], []
        for i, layer in enumerate(self.decoder):
            queries = layer(queries, places, references, memory, shapes)
            predict = self.predictors[i if self.box_refinement else 0]
            layer_logits, layer_boxes = predict(queries, references.logit(eps=1e-5))
            logits.append(layer_logits)
            boxes.append(layer_boxes)
            if self.box_refinement:
                references = layer_boxes.detach()
        first = 0 if self.aux_loss else -1
        return torch.stack(logits[first:]), torch.stack(boxes[first:])

    def proposals(self, logits: Tensor, boxes: Tensor) -> Queries:
        """The first stage only tells objects from background unless it is class-aware."""
        return Queries(logits, boxes, agnostic=not self.class_aware_proposals)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair of query and class."""
        scores = logits.sigmoid().flatten(1)
        pairs = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        return scores, pairs % self.num_classes, pairs // self.num_classes


def choose_levels(levels: list[Level], wanted: list[int] | None, most: int) -> list[int]:
    """Indices of the levels to read, finest first.

    Raises:
        ValueError: if one does not exist, or if more are wanted than attention has levels.
    """
    if wanted is None:
        coarse = [i for i, level in enumerate(levels) if level.stride >= FINE]
        return (coarse or list(range(len(levels))))[:most]
    if not wanted or wanted != sorted(set(wanted) & set(range(len(levels)))):
        raise ValueError(
            f"input_levels: must be rising numbers below {len(levels)}, the levels of the pyramid, "
            f"not {wanted}"
        )
    if len(wanted) > most:
        raise ValueError(f"num_levels: must be at least the {len(wanted)} input_levels, not {most}")
    return wanted


def input_projections(channels: list[int], width: int, count: int) -> nn.ModuleList:
    """One projection for each level that is read, then halvings of the last for those missing."""

    def project(incoming: int, kernel: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(incoming, width, kernel, stride, padding=kernel // 2)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, width), width))

    read = [project(each, 1, 1) for each in channels]
    made = [project(channels[-1] if i == 0 else width, 3, 2) for i in range(count - len(channels))]
    return nn.ModuleList([*read, *made])
