"""What `vitdense replay` does: a faulty step once more, with an eye on every module."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import detect_anomaly

from vitdense.config import Config, loads
from vitdense.engine import checkpoint, faults, runtime
from vitdense.engine.checkpoint import CheckpointError
from vitdense.engine.optim import freeze
from vitdense.engine.summary import as_table
from vitdense.engine.trace import Call, Trace
from vitdense.losses.divisors import one_step
from vitdense.models.base import Model
from vitdense.structures import Batch

ROWS = 6
"""Modules in a table: the first that is faulty, and those before it."""

Facts = dict[str, Any]
"""What a process has noted of the step."""


@dataclass(frozen=True, slots=True)
class Step:
    """A faulty step that a run has left, and the model as it was when the step began."""

    folder: Path
    config: Config
    model: Model
    device: torch.device
    precision: torch.dtype


def replay(folder: Path, overrides: Iterable[str] = ()) -> str:
    """Run a faulty step again, forward and backward, and say where it first breaks; a report.

    Nothing is written, and no data set is needed.

    Args:
        folder: of a run, whose latest fault it is, or one under its `faults/`.
        overrides: of the run's config, to see whether they help: `train.precision=fp32`.

    Raises:
        ValueError: there is no fault in the folder.
        CheckpointError: its files are absent or torn.
    """
    folder = find(folder)
    step = load(folder, overrides)
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rank_*.json")]
    ranks.sort(key=lambda facts: (finite(facts["terms"]), facts["rank"]))
    names = [folder / name for facts in ranks for name in facts["batches"]]
    reports = []
    with one_step([faults.load_batch(name).targets for name in names]):
        for facts in ranks:
            report, broken = play(step, facts)
            if broken:
                return report
            reports.append(report)
    return "\n\n".join(reports)


def find(folder: Path) -> Path:
    """The folder of a fault; raises ValueError if there is none."""
    places = [folder, *sorted(folder.glob("faults/step_*"), key=lambda it: int(it.name[5:]))]
    found = [place for place in places if any(place.glob("rank_*.json"))]
    if not found:
        raise ValueError(
            f"folder: {folder} holds no faulty step; name the folder of a run that stopped because "
            "its loss was not finite, or one under its faults/"
        )
    return found[-1]


def load(folder: Path, overrides: Iterable[str]) -> Step:
    """The model with the weights and buffers with which the step began."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise CheckpointError(
            f"{path}: not found; the process that writes it was lost, or its device has no fused "
            "optimizer, which alone keeps the weights of a faulty step"
        )
    meta = checkpoint.read_meta(path)
    config = loads(meta.config, str(path), overrides)
    part = checkpoint.without_weights(config.model)
    model = checkpoint.make_model(part, len(meta.classes), len(meta.image_classes))
    weights = checkpoint.read_weights(path)
    for name, buffer in faults.hidden_buffers(model).items():
        kept = weights.pop(name, buffer)
        if kept.shape == buffer.shape:
            buffer.copy_(kept)
    checkpoint.fill(model, weights, path)
    freeze(model, config.optimizer.backbone_scale, config.optimizer.scales)
    device = runtime.choose_device(config.device)
    precision = runtime.choose_precision(config.train.precision, device)
    return Step(folder, config, model.to(device).train(), device, precision)


def play(step: Step, facts: Facts) -> tuple[str, bool]:
    """The batches of one process in their order; a report, and whether it is faulty here too."""
    model, lines = step.model, headline(step, facts)
    model.progress = facts["fraction"]
    model.zero_grad(set_to_none=True)
    runtime.seed_step(facts["seed"], facts["step"], facts["rank"])
    for number, name in enumerate(facts["batches"]):
        batch = faults.load_batch(step.folder / name).to(step.device)
        trace = Trace(model)
        terms = attempt(step, batch, trace, len(facts["batches"]))
        if len(facts["batches"]) > 1:
            lines += ["", f"batch {number + 1} of {len(facts['batches'])}"]
        before = facts["terms"][number]
        rows = [(key, _short(before[key]), _short(value)) for key, value in terms.items()]
        lines += ["", *as_table([("loss", "in the run", "here"), *rows])]
        lost = [key for key, it in model.named_parameters() if it.grad is not None
                and not it.grad.isfinite().all()]  # fmt: skip
        if lost or not finite(terms):
            return "\n".join([*lines, "", *explain(trace, lost)]), True
    where = f"{facts['device']} in {facts['precision']}, by vitdense {facts['version']}"
    lines += [
        "",
        f"here all is finite: loss, and gradients of all parameters; the run was on {where}",
    ]
    return "\n".join(lines), False


def attempt(step: Step, batch: Batch, trace: Trace, batches: int) -> dict[str, float]:
    """Forward, loss, and backward if that is finite; the terms of the loss."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        noting = detect_anomaly(check_nan=False)  # of which line each gradient is
    with noting, trace:
        with runtime.autocast(step.device, step.precision):
            outputs = step.model(batch.images, batch.targets)
        losses = step.model.loss(runtime.to_float(outputs), batch.targets)
        terms = {name: float(value.detach()) for name, value in losses.items()}
        # fp16 has a scaler, that leaves out gradients that are not finite
        if finite(terms) and step.precision != torch.float16:
            trace.turn()
            (torch.stack(list(losses.values())).sum() / batches).backward()
    return terms


def _short(value: float | str) -> str:
    return f"{float(value):.6g}"


def finite(value: Any) -> bool:
    """Whether all numbers in it are, those that JSON has as words too."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return math.isfinite(float(value))


def headline(step: Step, facts: Facts) -> list[str]:
    """Which step it is, and of which images."""
    rank = f", process {facts['rank']} of {facts['processes']}" if facts["processes"] > 1 else ""
    precision = str(step.precision).removeprefix("torch.")
    images = [image for batch in facts["images"] for image in batch]
    more = [f"  and {len(images) - 8} more"] if len(images) > 8 else []
    return [
        f"step {facts['step']}{rank}, on {step.device} in {precision}, from {step.folder}",
        *(f"  {image}" for image in images[:8]),
        *more,
    ]


def explain(trace: Trace, lost: list[str]) -> list[str]:
    """A table that ends in the first module that is faulty, and the operations behind it."""
    backward = bool(lost)
    calls = trace.gradients if backward else trace.calls
    first = next((i for i, call in enumerate(calls) if call.outputs.nans), None)
    if first is None:
        first = next((i for i, call in enumerate(calls) if call.outputs.infinite), None)
    until = len(calls) if first is None else first + 1
    shown = calls[max(0, until - ROWS) : until]
    title = ("gradient of the output of", "", "") if backward else ("module", "input", "output")
    lines = as_table([title, *(_row(call, backward) for call in shown)])
    if first is not None:
        lines[-1] += "  <- first"
    elif not backward:
        lines += ["", "every module gives finite numbers: it is the loss that does not"]
    for kind, operation in (("infinite", trace.infinite), ("nan", trace.nan)):
        if operation is not None:
            lines += ["", f"first {kind} number: {operation}"]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        lines += ["", f"gradients that are not finite: {', '.join(lost[:5])}{more}"]
    return lines


def _row(call: Call, backward: bool) -> tuple[str, str, str]:
    if backward:
        return call.module, str(call.outputs), ""
    return call.module, "-" if call.inputs is None else str(call.inputs), str(call.outputs)
