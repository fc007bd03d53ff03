"""Families of public models that `vitdense convert` can read.

To add a family, write one file in this folder with one subclass of `Family`; it is found by itself:

    class MyDetr(Family):
        title = "transformers' MyDETR"

        def recognises(self, source):
            return source.model_type == "my_detr"           # or: "transformer.x" in source.weights

        def plan(self, source):
            c = source.config                                # config.json, or the args of a .pth
            backbone = backbones.plan(source)                # timm's name and options
            head = {"name": "my_detr", "width": c["d_model"], "queries": c["num_queries"]}
            model = {"backbone": backbone, "head": head}
            return Plan(model, from_labels(c), preparation.detection(source, usual=640))

        def fill(self, source, weights):
            backbones.fill(source, weights, within="model.backbone.", into="backbone.")
            weights.drop(r"anchors|valid_mask", "is computed")
            weights.rename(NAMES, within="model.", into="head.")  # a table: see names.Rules

`Weights` (names.py) keeps the record: each tensor of the source is renamed, dropped with a reason,
or left over, which is an error. A tensor of ours that nothing fills is an error too, unless
`Plan.fresh` names it. `conversion.py` drops what no model needs (counters, tables) before `fill`,
and cuts the rows of classes that the plan leaves out (COCO's unused ids) after it.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

from vitdense.convert.classes import Classes
from vitdense.convert.names import Weights
from vitdense.convert.source import ConversionError, Source


@dataclass(slots=True)
class Plan:
    """The vitdense model that a source becomes.

    Attributes:
        model: the `model` mapping of a config.
        classes: of the source, and which of them are kept.
        transforms: the `data.transforms` mapping: how images are prepared.
        fresh: our names that the source cannot have, by why: pattern -> reason. They keep their
            initial values, and the report names them.
        dataset: the `data.dataset` that the classes are those of, a name or with options.
        recipe: the sections `train`, `optimizer` and `schedule` of the config to train from it; by
            default those of a detector.
    """

    model: dict[str, Any]
    classes: Classes
    transforms: dict[str, Any]
    fresh: dict[str, str] = field(default_factory=dict)
    dataset: str | dict[str, Any] = "coco"
    recipe: dict[str, Any] = field(default_factory=dict)


class Family:
    """A family of public models.

    Attributes:
        title: what the report calls it.
    """

    title: str

    def recognises(self, source: Source) -> bool:
        """Whether the source is of this family, from its config or the names of its weights."""
        raise NotImplementedError

    def plan(self, source: Source) -> Plan:
        """The model that it becomes.

        Raises:
            ConversionError: it has something that no part of vitdense can do.
        """
        raise NotImplementedError

    def fill(self, source: Source, weights: Weights) -> None:
        """Rename or drop every tensor; our names are those of the whole model's state."""
        raise NotImplementedError


def families() -> list[Family]:
    """One of each family in this folder, by module name."""
    import vitdense.convert as package

    found = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found += [
            value()
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Family)
            and value is not Family
            and value.__module__ == module.__name__
        ]
    return found


def recognise(source: Source) -> Family:
    """The family of a source; raises ConversionError if there is none."""
    known = families()
    for family in known:
        if family.recognises(source):
            return family
    what = f"model_type {source.model_type!r}" if source.model_type else "its names of weights"
    titles = "; ".join(family.title for family in known)
    raise ConversionError(f"{source.name}: {what} is of no family that is known here: {titles}")
