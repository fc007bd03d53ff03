"""Dense prediction with any timm ViT or Swin: boxes, masks, semantic and panoptic maps."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use: torch alone takes seconds, and `vitdense --help` needs none of it.
_HOMES = {
    "BACKBONES": "vitdense.registry",
    "NECKS": "vitdense.registry",
    "HEADS": "vitdense.registry",
    "MODELS": "vitdense.registry",
    "DATASETS": "vitdense.registry",
    "TRANSFORMS": "vitdense.registry",
    "METRICS": "vitdense.registry",
    "Backbone": "vitdense.backbones.base",
    "Neck": "vitdense.necks.base",
    "Head": "vitdense.heads.base",
    "Model": "vitdense.models.base",
    "Dataset": "vitdense.data.base",
    "Policy": "vitdense.data.base",
    "Metric": "vitdense.metrics.base",
    "load": "vitdense.inference",
}

__all__ = [
    "BACKBONES",
    "DATASETS",
    "HEADS",
    "METRICS",
    "MODELS",
    "NECKS",
    "TRANSFORMS",
    "Backbone",
    "Dataset",
    "Head",
    "Metric",
    "Model",
    "Neck",
    "Policy",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from vitdense.backbones.base import Backbone
    from vitdense.data.base import Dataset, Policy
    from vitdense.heads.base import Head
    from vitdense.inference import load
    from vitdense.metrics.base import Metric
    from vitdense.models.base import Model
    from vitdense.necks.base import Neck
    from vitdense.registry import BACKBONES, DATASETS, HEADS, METRICS, MODELS, NECKS, TRANSFORMS


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitdense' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
