"""Linear head: norm and one 1x1 convolution on the backbone's maps."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead, SemanticOutputs
from vitdense.heads.segmentation.blocks import Classifier
from vitdense.layers.norm import make_norm
from vitdense.layers.resize import resize
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("linear")
class LinearHead(SemanticHead):
    """Norm, dropout and a linear classifier of each pixel: the baseline for a frozen plain ViT.

    As in DINOv2's linear evaluation (arXiv 2304.07193); the norm is worth 10 points of mIoU.
    Each map has a classifier at its own size, and the logits are summed at the finest. This equals
    one classifier on the concatenated maps, because resizing is linear, and takes less memory.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        maps: Literal["all", "last"] = "all",  # which it reads; last = the deepest or coarsest
        norm: Literal["auto", "batch", "sync", "group", "layer", "none"] = "auto",  # of each map
        dropout: Fraction = 0.1,  # of whole channels
        losses: dict[str, PositiveFloat] | None = None,  # weights by name; null = cross_entropy
        class_weights: list[NonNegativeFloat]
        | Literal["inverse", "median"]
        | None = None,  # for the entropies: one per class, or by how rare they are
        label_smoothing: Fraction = 0.0,  # for the cross entropy
    ) -> None:
        super().__init__(levels, num_classes, losses, class_weights, label_smoothing)
        self.count = len(levels) if maps == "all" else 1
        widths = [level.channels for level in levels[-self.count :]]
        self.norms = nn.ModuleList(
            nn.Identity() if norm == "none" else make_norm(norm, width) for width in widths
        )
        self.classifiers = nn.ModuleList(
            Classifier(width, num_classes, dropout, bias=index == 0)
            for index, width in enumerate(widths)
        )

    def forward(
        self, features: list[Tensor], targets: list[Target] | None = None
    ) -> SemanticOutputs:
        """Logits at the stride of the finest map that is read."""
        parts = zip(self.classifiers, self.norms, features[-self.count :], strict=True)
        finest, *coarser = [classifier(norm(map_)) for classifier, norm, map_ in parts]
        enlarged = (resize(logits, finest.shape[-2:]) for logits in coarser)
        return SemanticOutputs(sum(enlarged, start=finest))
