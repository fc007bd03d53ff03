"""What a run leaves behind when it breaks: the faulty step for `vitdense replay`, or its state."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import vitdense
from vitdense.data.base import DataError
from vitdense.data.loader import ImageError, Unreadable
from vitdense.data.workers import WorkerError
from vitdense.engine import build, checkpoint
from vitdense.engine.sharding import is_sharded
from vitdense.engine.stopping import Stopped, StopSignal
from vitdense.engine.tally import Fault, NonFiniteLoss, holds
from vitdense.structures import Batch, Frame, Target

if TYPE_CHECKING:
    from vitdense.engine.run import Run


def rescued(run: Run, batches: Iterator[Batch], stop: StopSignal) -> Iterator[Batch]:
    """The same batches; where the next one fails, the state is saved before the error goes on.

    A step begins with its batches, so that is between two steps, and can be gone on from. Among
    several processes, that would all have to agree, the latest checkpoint stays.

    Raises:
        Stopped: all processes were told to end, and those that read images did so at once.
    """
    while True:
        try:
            batch = next(batches)
        except Exception as error:
            if run.runtime.world_size == 1 and run.saved != run.step:
                with run.clock.paused():
                    run.save(stopped=True)
                    run.states.wait()
            if stop.requested and isinstance(error, WorkerError):
                raise Stopped(f"stopped, step {run.saved} is saved; go on with --resume") from None
            raise
        yield batch


@contextmanager
def kept(run: Run) -> Iterator[None]:
    """Inside, a loss that is not finite leaves its step behind; errors say how to go on."""
    try:
        yield
    except NonFiniteLoss as error:
        raise keep(run, error) from None
    except DataError as error:
        skip = ", or leave such images out by data.faulty=skip"
        remedy = skip if isinstance(error, ImageError) else ""
        raise type(error)(f"{error}{remedy}. Then {_way_on(run)}") from None


def keep(run: Run, error: NonFiniteLoss) -> NonFiniteLoss:
    """Write what `vitdense replay` needs under `faults/`; returns the error that also says where.

    `model.safetensors` holds the weights with which the step began. Each process writes its own
    batches, `rank_0_batch_0.safetensors`, and what is known of them, `rank_0.json`.
    """
    fault, rank = error.fault, run.runtime.rank
    folder = run.folder / "faults" / f"step_{fault.step:06d}"
    try:
        paths = _save_batches(run, fault, folder)
        facts = {
            **{key: _as_json(value) for key, value in asdict(fault).items()},
            "batches": [path.name for path in paths],
            "rank": rank,
            "processes": run.runtime.world_size,
            "seed": run.config.seed,
            "accumulate": run.config.train.accumulate,
            "device": str(run.runtime.device),
            "precision": str(run.precision).removeprefix("torch."),
            "version": vitdense.__version__,
        }
        checkpoint.write_text(folder / f"rank_{rank}.json", json.dumps(facts, indent=2) + "\n")
        _save_weights(run, fault, folder / "model.safetensors")
    except Exception as other:  # whatever it is, it must not hide the fault
        lost = f"{folder} could not be kept: {other}"
        return NonFiniteLoss(f"{error} ({lost}). Then {_way_on(run)}", fault)
    found = f"`vitdense replay {run.folder}` shows where it arises, from {folder}"
    return NonFiniteLoss(f"{error}. {found}. Then {_way_on(run)}", fault)


def _save_weights(run: Run, fault: Fault, path: Path) -> None:
    """Write the weights with which the step began, if they were held."""
    everyone_knows = fault.grad_norm is not None and not math.isfinite(fault.grad_norm)
    if not holds(run.optimizer) or (is_sharded(run.model) and not everyone_knows):
        return
    state = {**run.model.state_dict(), **hidden_buffers(run.model)}
    weights = {
        key: it.full_tensor() if isinstance(it, DTensor) else it for key, it in state.items()
    }
    # only one process may know of a loss whose gradient a scaler leaves out
    if run.runtime.is_main or not everyone_knows:
        checkpoint.save_weights(path, weights, run.meta())


def _way_on(run: Run) -> str:
    if run.saved:
        return f"go on from step {run.saved} with --resume"
    return "begin again, as there is no checkpoint yet"


def _save_batches(run: Run, fault: Fault, folder: Path) -> list[Path]:
    """The batches of that step, read once more: they follow from its number."""
    accumulate = run.config.train.accumulate
    data = run.config.data.model_copy(update={"workers": 0})
    batches = build.training_loader(
        run.config.model_copy(update={"data": data}),
        run.data,
        run.model,
        run.runtime,
        start=fault.step * accumulate,
        elapsed=lambda: fault.fraction * (run.length.seconds or 0.0),
        report=lambda image: None,
        repeats=run.repeats,
    )
    paths = []
    for number, batch in enumerate(islice(batches, accumulate)):
        path = folder / f"rank_{run.runtime.rank}_batch_{number}.safetensors"
        save_batch(path, batch)
        paths.append(path)
    return paths


def _as_json(value: Any) -> Any:
    """With words for the numbers that JSON has not: "nan", "inf"."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def hidden_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that training reads and `state_dict` lacks, as class weights found in the data."""
    known = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in known}


def save_batch(path: Path, batch: Batch) -> None:
    """Write a batch: `images`, `targets.0.boxes` and so on, and the rest as metadata."""
    tensors = {"images": batch.images}
    for index, target in enumerate(batch.targets):
        for name in (field.name for field in fields(Target)):
            if (value := getattr(target, name)) is not None:
                tensors[f"targets.{index}.{name}"] = value
    rest = {
        "frames": [asdict(frame) for frame in batch.frames],
        "image_ids": batch.image_ids,
        "paths": [str(path) for path in batch.paths],
    }
    own = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    checkpoint.save_tensors(path, own, {"batch": json.dumps(rest)})


def load_batch(path: Path) -> Batch:
    """What `save_batch` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["batch"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    frames = [Frame(**{key: tuple(size) for key, size in it.items()}) for it in rest["frames"]]
    targets = [
        Target(**{
            name.rpartition(".")[2]: value
            for name, value in tensors.items()
            if name.startswith(f"targets.{index}.")
        })
        for index in range(len(frames))
    ]  # fmt: skip
    paths = [Path(path) for path in rest["paths"]]
    return Batch(tensors["images"], targets, frames, rest["image_ids"], paths)


class LeftOut:
    """`skipped.txt`: the images that could not be read, each once, with the reason.

    A run reports them to it. Several processes append to it, and a resumed run goes on with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[tuple[str, str]] = set()

    def __call__(self, image: Unreadable) -> None:
        """Note an image; the first one of a split is also told on the console."""
        key = image.split, image.name
        if key in self._known:
            return
        listed = self._read()
        self._known |= {key} | listed
        if key in listed:
            return
        if image.split not in {split for split, _ in listed}:
            where = f"more of them are in {self.path}"
            print(f"left out: {image.reason}; {where}", file=sys.stderr)
        reason = image.reason.removeprefix(f"{image.name}: ").replace("\n", " ")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{image.split}\t{image.name}\t{reason}\n")

    def numbers(self, split: str) -> dict[str, float]:
        """How many images of a split were left out so far as `skipped`; nothing if none was."""
        count = sum(owner == split for owner, _ in self._read())
        return {"skipped": float(count)} if count else {}

    def _read(self) -> set[tuple[str, str]]:
        if not self.path.exists():
            return set()
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {
            (line.split("\t")[0], line.split("\t")[1]) for line in lines if line.count("\t") > 1
        }
