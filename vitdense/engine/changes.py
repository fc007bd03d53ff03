"""What changed in the config of a run that goes on, and what that means for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitdense.config import nodes

NOTHING = "no effect on the results"

ROUNDING = "may round differently: equal up to the last digits"

EVALUATION = "numbers from here on are not comparable with those before; the best so far stays best"

EFFECTS = {
    "model": "the new model must fit the checkpoint's weights, or it is refused",
    "data": "other images, or other preprocessing, from here on",
    "data.val": EVALUATION,
    "data.rare": "another order of the images: some of this pass may repeat or be skipped",
    "data.workers": NOTHING,
    "data.cache": NOTHING,
    "data.faulty": "for files that cannot be read from here on",
    "train": "applies from here on",
    "train.steps": "another length: schedule and evaluations stretch to it",
    "train.epochs": "another length: schedule and evaluations stretch to it",
    "train.minutes": "another length: schedule and evaluations stretch to it",
    "train.init": "only used at the start of a run: ignored",
    "train.new_head": "only used at the start of a run: ignored",
    "train.batch_size": "another order of the images: some of this pass may repeat or be skipped; "
    "the learning rate stays",
    "train.accumulate": "another order of the images: some of this pass may repeat or be skipped; "
    "the learning rate stays",
    "train.precision": ROUNDING,
    "train.compile": ROUNDING,
    "train.channels_last": ROUNDING,
    "train.shard": ROUNDING,
    "train.ema": "the average goes on with it; a new one starts from the weights",
    "train.evaluations": "evaluations come at other steps from here on",
    "train.best": EVALUATION,
    "train.observers": NOTHING,
    "train.checkpoint_every": NOTHING,
    "train.keep": NOTHING,
    "train.pictures": NOTHING,
    "optimizer": "applies from here on; the state of the optimizer stays",
    "optimizer.name": "the new optimizer starts without state: expect a bump in the loss",
    "schedule": "the learning rate jumps to the new curve",
    "inference": EVALUATION,
    "metric": EVALUATION,
    "imports": NOTHING,
    "output": NOTHING,
    "seed": "other random numbers and another order of the images from here on",
    "device": ROUNDING,
    "images": "the training split has another number of them, in another order: some of "
    "this pass may repeat or be skipped",
    "processes": "another order of the images: some of this pass may repeat or be skipped; a step "
    "learns from another number of them",
}
"""What a change means, by the key or the nearest section above it."""


@dataclass(frozen=True, slots=True)
class Change:
    """A key with another value than before; a key that is not there is shown as `-`."""

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"

    @property
    def effect(self) -> str:
        """What it means, by the nearest key that is known."""
        key = self.key
        while key not in EFFECTS:
            key = key.rpartition(".")[0]
        return EFFECTS[key]


def changes(old: str, new: str) -> list[Change]:
    """Between two resolved configs as YAML, key by key."""
    before, after = (nodes.parse(text, "config.yaml").plain() for text in (old, new))
    for config in (before, after):  # a folder may be named relative to another one
        config["output"] = str(Path(config["output"]).resolve())
    return list(_differences(before, after))


def _differences(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    if old == new:
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield Change(key, _show(old), _show(new))
    elif old.get("name") != new.get("name"):  # another part, whose options are others
        yield Change(f"{key}.name", _show(old.get("name")), _show(new.get("name")))
    else:
        for name in {**new, **old}:
            below = f"{key}.{name}" if key else name
            if name in old and name in new:
                yield from _differences(old[name], new[name], below)
            else:
                yield Change(below, _show(old.get(name, ABSENT)), _show(new.get(name, ABSENT)))


ABSENT = object()


def _show(value: Any) -> str:
    if value is ABSENT:
        return "-"
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    return value if isinstance(value, str) else json.dumps(value)


def table(found: list[Change]) -> str:
    """A line for each change, what it means in a second column."""
    sides = [str(change) for change in found]
    width = min(60, max(map(len, sides), default=0))
    return "\n".join(
        f"  {side:<{width}}  {change.effect}" for side, change in zip(sides, found, strict=True)
    )
