"""Which observers a run has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from vitdense.config import Config, dump
from vitdense.engine.observers.base import Observer, Observers
from vitdense.engine.observers.console import console
from vitdense.engine.observers.files import JsonLines, Tables
from vitdense.engine.observers.trackers import Background, Mlflow, TensorBoard, Wandb


def choose(
    config: Config, step: int, fraction: float, headline: str, evaluated: int | None = None
) -> Observers:
    """JSON lines, those that the config names, and the console.

    Args:
        step: that the run goes on from; what was written of later ones is dropped.
        fraction: of the run that is done.
        headline: the number by which the best model is chosen.
        evaluated: step of the latest evaluation that is not done again; by default `step`.
    """
    folder = config.output
    tracked: tuple[Any, ...] = (folder, config.name, yaml.safe_load(dump(config)), step)
    known: dict[str, Callable[[], Observer]] = {
        "csv": lambda: Tables(folder, step, evaluated),
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", step),
        "wandb": lambda: Background(Wandb(*tracked)),
        "mlflow": lambda: Background(Mlflow(*tracked)),
    }
    return Observers(
        [
            lambda: JsonLines(folder / "metrics.jsonl", step, evaluated),
            *(known[name] for name in dict.fromkeys(config.train.observers)),
            lambda: console(config.name, fraction, headline),
        ]
    )
