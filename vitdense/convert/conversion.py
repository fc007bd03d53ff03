"""`vitdense convert`: from public weights to a `model.safetensors` and a config."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitdense
from vitdense import config as configs
from vitdense.config import Config
from vitdense.config.nodes import dump as to_yaml
from vitdense.convert.family import Family, Plan, recognise
from vitdense.convert.names import Weights
from vitdense.convert.report import Report
from vitdense.convert.source import ConversionError, Source, read
from vitdense.engine import checkpoint
from vitdense.engine.checkpoint import Meta
from vitdense.engine.classes import class_axes
from vitdense.models.base import Model

PLACES: dict[str, dict[str, str]] = {
    "coco": {"root": "data/coco", "train": "train2017", "val": "val2017"},
    "coco_panoptic": {"root": "data/coco", "train": "train2017", "val": "val2017"},
    "ade20k": {"root": "data/ADEChallengeData2016", "train": "training", "val": "validation"},
}
"""Where the data sets of public models usually lie, and what their splits are called."""

USELESS = {
    r"\.num_batches_tracked$": "counts batches in training",
    r"\.relative_position_index$": "is computed",
    r"\.mask_token$": "stands for hidden patches in pretraining",
}
"""Tensors that no model needs, and why; a family does not see them."""

DETECTION: dict[str, Any] = {
    "train": {"epochs": 12, "batch_size": 8},
    "optimizer": {"lr": 1e-4, "weight_decay": 1e-4, "backbone_scale": 0.1},
}
"""How a model is trained further, unless its plan says otherwise."""


def convert(source: str, out: Path | str, partial: bool = False) -> Report:
    """Convert public weights to `out`, and write a config to train from them beside it.

    Args:
        source: a folder of transformers, a .safetensors, .pth, .bin or .pkl file, or a hub id.
        partial: accept tensors that have no place in our model, and start those of ours that the
            source lacks from new values; the report names them.

    Returns:
        what became of each tensor.

    Raises:
        ConversionError: the source cannot be read, is of no known family, or does not fit.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out: {out} must end in .safetensors")
    found = read(source)
    family = recognise(found)
    model, config, report = build(family, found, out, partial)
    checkpoint.save_model(out, model, _meta(config, report, model))
    start = {"init": out, "new_head": not any(name.startswith("head.") for name in report.mapped)}
    config = config.model_copy(update={"train": config.train.model_copy(update=start)})
    checkpoint.write_text(out.with_suffix(".yaml"), configs.dump(config))
    return report


def build(
    family: Family, source: Source, out: Path, partial: bool = False
) -> tuple[Model, Config, Report]:
    """The model with the source's weights, its config, and what became of each tensor.

    Raises:
        ConversionError: something is left over or missing, and `partial` is not set.
    """
    try:
        plan = family.plan(source)
        config = make_config(plan, out)
        make = checkpoint.without_weights(config.model)
        weights = Weights(source.weights)
        for pattern, why in USELESS.items():
            weights.drop(pattern, why)
        family.fill(source, weights)
    except ConversionError:
        raise
    except (ValueError, KeyError) as error:
        raise ConversionError(f"{source.name}: as {family.title}: {error}") from error
    torch.manual_seed(0)
    model: Model = make(len(plan.classes.names))
    _cut_rows(weights, model, make, plan)
    report = fill(model, weights, plan)
    report.source, report.family, report.out, report.classes = (
        source.name, family.title, str(out), plan.classes
    )  # fmt: skip
    if report.faults and not partial:
        raise ConversionError(
            f"{source.name}: as {family.title}, its weights do not make the model:\n"
            f"{report.faults_text()}\n--partial converts it nevertheless: what is missing then "
            "starts from new values, and what is left over is left out"
        )
    return model.eval(), config, report


def fill(model: Model, weights: Weights, plan: Plan) -> Report:
    """Give the model all weights that fit, and say which do not."""
    ours = model.state_dict()
    report = Report(dropped=dict(weights.dropped))
    fitting: dict[str, Tensor] = {}
    for name, tensor in weights.found.items():
        origin = ", ".join(weights.origin[name])
        if name not in ours:
            report.unknown[origin] = f"would be {name}, which the model has not"
        elif ours[name].shape != tensor.shape:
            report.unknown[origin] = (
                f"is {list(tensor.shape)}, and {name} is {list(ours[name].shape)}"
            )
        else:
            fitting[name] = tensor.to(ours[name].dtype)
            report.mapped[name] = tensor.numel()
    report.unknown |= dict.fromkeys(weights.left, "is of no use that is known")
    for name in ours:
        if name not in fitting and not name.endswith("num_batches_tracked"):
            why = _why_fresh(name, plan.fresh)
            if why is None:
                report.missing.append(name)
            else:
                report.fresh[name] = why
    model.load_state_dict(fitting, strict=False)
    return report


def make_config(plan: Plan, out: Path) -> Config:
    """A whole config around the planned model: to evaluate it, and to train from it."""
    dataset = plan.dataset
    tree: dict[str, Any] = {
        "model": plan.model,
        "data": {
            "dataset": plan.dataset,
            **PLACES[dataset["name"] if isinstance(dataset, dict) else dataset],
            "transforms": plan.transforms,
        },
        **(plan.recipe or DETECTION),
        "output": f"runs/{out.stem}",
    }
    return configs.loads(to_yaml(tree), file=str(out))


def _cut_rows(weights: Weights, model: Model, make: Callable[[int], Model], plan: Plan) -> None:
    """Cut the rows of unused classes from the source's classifiers; rows behind them stay."""
    rows, count = plan.classes.rows, plan.classes.count
    if rows == list(range(count)):
        return
    for name, where in class_axes(model, make).items():
        tensor = weights.found.get(name)
        if tensor is not None and tensor.shape[where.axis] == count + where.extra:
            weights.found[name] = where.rows(tensor, rows, count)


def _why_fresh(name: str, reasons: dict[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if re.search(pattern, name)), None)


def _meta(config: Config, report: Report, model: Model) -> Meta:
    assert report.classes is not None
    return Meta(
        config=configs.dump(config),
        classes=report.classes.names,
        category_ids=report.classes.category_ids,
        task=model.task,
        step=0,
        metrics={},
        version=vitdense.__version__,
    )
