"""What a part of each kind must have: told where it is built, before anything runs."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any, get_args

from vitdense.declarations import short_path
from vitdense.registry import REGISTRIES


@dataclass(frozen=True, slots=True)
class Contract:
    """The base class in `base.py` of the kind's room, what subclasses write, and what they set."""

    base: str
    methods: tuple[str, ...]
    facts: tuple[str, ...] = ()


CONTRACTS = {
    "backbone": Contract("Backbone", ("forward",), ("levels",)),
    "neck": Contract("Neck", ("forward",), ("levels",)),
    "head": Contract("Head", ("forward", "loss", "predict"), ("levels", "num_classes", "task")),
    "model": Contract(
        "Model", ("forward", "loss", "predict"), ("backbone", "divisor", "num_classes", "task")
    ),
    "dataset": Contract("Dataset", ("__len__", "__getitem__"), ("classes", "category_ids")),
    "transform": Contract("Policy", ("train", "evaluate")),
    "metric": Contract("Metric", ("update", "compute", "reset"), ("classes", "headline")),
}


def fault(kind: str, part: Any) -> str | None:
    """What a part lacks of what its kind promises, and where to write it; None if nothing."""
    message = _fault(kind, part)
    return message and f"{type(part).__name__}{_place(type(part))} {message}"


def _fault(kind: str, part: Any) -> str | None:
    contract = CONTRACTS[kind]
    home = f"{REGISTRIES[kind].package}.base"
    base = getattr(importlib.import_module(home), contract.base)
    if not isinstance(part, base):
        return f"must derive from {home}.{contract.base}"
    for name in contract.methods:
        if getattr(type(part), name) is getattr(base, name):
            return f"has no method {name}; every {kind} has {', '.join(contract.methods)}"
    for name in contract.facts:
        if not hasattr(part, name):
            return f"does not set `{name}`; do so in __init__, or call super().__init__"
    if kind == "backbone":
        for name in ("mean", "std"):
            if (count := len(getattr(part, name))) != part.in_chans:
                many = f"{count} values in `{name}`"
                return f"has {many}; give one for each of in_chans={part.in_chans}"
    if "task" in contract.facts:
        from vitdense.structures import Task

        if part.task not in get_args(Task):
            return f"has the task {part.task!r}; it must be one of {', '.join(get_args(Task))}"
    return None


def _place(cls: type) -> str:
    try:
        file, line = inspect.getsourcefile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return ""
    return f" at {short_path(file or '')}:{line}"
