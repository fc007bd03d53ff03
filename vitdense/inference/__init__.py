"""Using a trained model: predictions for images, files of them, and numbers over a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdense.inference.predictor import Predictor

__all__ = ["load"]


def load(path: Path | str, device: str = "auto") -> Predictor:
    """A trained model, ready to use: `vitdense.load("model.safetensors")("photo.jpg")`.

    Args:
        path: the `model.safetensors` of a run; nothing beside it is needed.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...

    Raises:
        CheckpointError: the file is absent, or not one of vitdense.
    """
    from vitdense.inference.predictor import Predictor

    return Predictor.load(Path(path), device)
