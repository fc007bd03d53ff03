"""Using a trained model: predictions for images, files of them, and numbers over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdense.inference.predictor import Predictor

__all__ = ["load"]


def load(path: Path | str, device: str = "auto", overrides: Iterable[str] = ()) -> Predictor:
    """A trained model, ready to use: `vitdense.load("model.safetensors")("photo.jpg")`.

    Args:
        path: the `model.safetensors` of a run; nothing beside it is needed.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        overrides: of the model's config, as `["inference.window=512", "inference.flip=true"]`.

    Raises:
        CheckpointError: the file is absent, or not one of vitdense.
        ConfigError: an override is wrong.
        ValueError: the model cannot answer in windows or views, or not in such windows.
    """
    from vitdense.inference.predictor import Predictor

    return Predictor.load(Path(path), device, overrides)
