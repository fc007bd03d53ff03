"""What `rtdetr` and `dino` share after their encoders: proposals, denoising, decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import Predictor
from vitdense.heads.detection.denoising import Denoising, NoisyQueries
from vitdense.heads.detection.proposals import FirstStage, Proposals, cell_anchors
from vitdense.heads.detection.queries import QueryHead, QueryOutputs
from vitdense.losses.matcher import Truths
from vitdense.losses.set_criterion import Queries
from vitdense.structures import Level, Size, Target


class TwoStageHead(QueryHead):
    """A head whose queries start from an encoder's best cells; in training also from noisy truth.

    Subclasses set `criterion`, and call `decode` with the cells of their encoder.

    Args:
        width: of cells and queries.
        queries: how many.
        decoder: a module that gives `Queries`.
        denoising: makes noisy queries in training; None for none.
        two_stage: the first references are the boxes of the best cells; otherwise they are learned.
        learned_content: the first content is learned; otherwise it is that of the best cells.
        train_all_cells: the first stage learns from every cell, as in Deformable DETR; otherwise
            from the best cells alone, as in DINO and RT-DETR.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        max_detections: int,
        nms: float | None,
        score_threshold: float = 0.0,
        *,
        width: int,
        queries: int,
        decoder: nn.Module,
        denoising: Denoising | None,
        two_stage: bool = True,
        learned_content: bool = False,
        train_all_cells: bool = False,
    ) -> None:
        super().__init__(levels, num_classes, max_detections, nms, score_threshold)
        self.num_queries, self.train_all_cells = queries, train_all_cells
        self.decoder = decoder
        self.denoising = denoising
        self.first_stage = FirstStage(width, Predictor(width, num_classes)) if two_stage else None
        self.references = None if two_stage else _LearnedReferences(queries)
        learned = learned_content or not two_stage
        self.contents = nn.Embedding(queries, width) if learned else None
        if self.contents is not None:
            nn.init.xavier_uniform_(self.contents.weight)

    def decode(
        self,
        memory: Tensor,
        shapes: list[Size],
        canvas: Size,
        targets: list[Target] | None,
        pixels: Tensor | None = None,
    ) -> QueryOutputs:
        """Choose the queries and decode them.

        Args:
            memory: float [B, S, width], the cells of all levels.
            shapes: (height, width) of each level.
            canvas: (height, width) in pixels.
            targets: of which noisy queries are made, in training.
            pixels: float [B, M, h, w], features for masks.
        """
        # a small image may have fewer cells than there are queries
        count = min(self.num_queries, memory.shape[1]) if self.first_stage else self.num_queries
        noisy, mask = self._noisy(targets, canvas, count)
        queries, references, trained = self._start(memory, shapes)
        if noisy is not None:
            queries = torch.cat((noisy.queries.to(queries.dtype), queries), 1)
            references = torch.cat((noisy.references.to(references.dtype), references), 1)
        decoded = self.decoder(queries, references, memory, shapes, mask=mask, embed=self.embed)
        others: dict[str, Queries] = {}
        if trained is not None:
            others["_encoder"] = Queries(trained.logits[None], trained.boxes[None])
        if noisy is not None:
            others["_denoising"], decoded = noisy.split(decoded)
        return QueryOutputs(
            decoded.logits,
            decoded.boxes,
            canvas,
            others=others,
            details=decoded.details,
            pixels=pixels,
        )

    def _start(self, memory: Tensor, shapes: list[Size]) -> tuple[Tensor, Tensor, Proposals | None]:
        """Contents [B, Q, width], references [B, Q, 4], and the proposals that train, if any."""
        batch, best, trained = len(memory), None, None
        if self.first_stage is not None:
            # in the type of a parameter: under autocast that of the cells is too coarse for places
            anchors = cell_anchors(shapes, self.first_stage.predictor.classes.weight)
            if self.train_all_cells:
                trained = self.first_stage(memory, *anchors)
                best = trained.best(self.num_queries)
            else:
                best = trained = self.first_stage.best(memory, *anchors, self.num_queries)
            references = best.boxes.detach()
        else:
            assert self.references is not None
            references = self.references().expand(batch, -1, -1)
        if self.contents is None:
            assert best is not None
            return best.cells.detach(), references, trained
        contents = self.contents.weight[: references.shape[1]]
        return contents.expand(batch, -1, -1), references, trained

    # Its sizes follow from the number of objects: compiled, each would be code of its own. It comes
    # before `_start`: code that is compiled up to here would hand out boxes beside their detached
    # copies, and then torch (2.15) loses their gradient.
    @torch.compiler.disable
    def _noisy(
        self, targets: list[Target] | None, canvas: Size, ordinary: int
    ) -> tuple[NoisyQueries, Tensor] | tuple[None, None]:
        """Noisy queries, and the mask of which queries see each other when these come first."""
        if self.denoising is None or targets is None or not self.training:
            return None, None
        noisy = self.denoising(Truths.from_targets(targets, canvas))
        return noisy, noisy.mask(ordinary)


class _LearnedReferences(nn.Module):
    """Learned boxes: initially at random places, a fifth of the image wide and high."""

    def __init__(self, count: int) -> None:
        super().__init__()
        boxes = torch.cat((torch.rand(count, 2), torch.full((count, 2), 0.2)), 1)
        self.logits = nn.Parameter(boxes.logit(eps=1e-3))

    def forward(self) -> Tensor:
        """float [1, count, 4], cxcywh in 0..1."""
        return self.logits.sigmoid()[None]
