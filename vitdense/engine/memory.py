"""The device's memory: what training takes of it, and what to change where it is too small."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from vitdense.config import Config, Part
from vitdense.data.cache import memory_of_machine
from vitdense.engine.promises import check_losses, maps_watched
from vitdense.engine.runtime import autocast, choose_precision, has_bf16, memory_used, to_float
from vitdense.ops.processes import alone
from vitdense.structures import Batch, Size

if TYPE_CHECKING:
    from vitdense.engine.run import Run
    from vitdense.models.base import Model

P = ParamSpec("P")
T = TypeVar("T")

GIB = 2**30

_SHORTAGE = re.compile(r"can't allocate memory|out of memory|_ALLOC_FAILED|Cannot allocate memory")


class OutOfMemory(MemoryError):
    """A device's memory is too small: says for what, with numbers, and what to change."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes that training takes: exact, except for activations, which are those kept for backward.

    Attributes:
        weights: parameters and buffers.
        gradients: of what learns.
        optimizer: its running means.
        average: the model of `train.ema`.
        activations: of one image.
        canvas: of that image.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    canvas: Size

    @property
    def fixed(self) -> int:
        """What is taken whatever the size of a batch."""
        return self.weights + self.gradients + self.optimizer + self.average

    def of(self, images: int) -> int:
        """All that a step from batches of so many images takes."""
        return self.fixed + images * self.activations


def demand(config: Config, model: Model, batch: Batch, precision: torch.dtype) -> Demand:
    """What training would take, from one forward pass that leaves no trace in the model.

    Args:
        batch: of training, on the model's device, as heavy as batches come.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes([*model.parameters(), *model.buffers()])
    means = 2 if config.optimizer.name == "adamw" else int(config.optimizer.momentum > 0)
    return Demand(
        weights=weights,
        gradients=_bytes(learning),
        optimizer=means * _bytes(learning),
        average=weights if config.train.ema is not None else 0,
        activations=saved_for_backward(model, batch, precision) // len(batch.images),
        canvas=(batch.images.shape[-2], batch.images.shape[-1]),
    )


def saved_for_backward(model: Model, batch: Batch, precision: torch.dtype) -> int:
    """Bytes of the tensors that autograd keeps for backward, without parameters and buffers."""
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with alone(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with autocast(batch.images.device, precision), maps_watched(model):
                outputs = model(batch.images, batch.targets)
            losses = model.loss(to_float(outputs), batch.targets)
        check_losses(model, losses)
        del outputs, losses
    finally:
        for module, mode in modes:
            module.training = mode
        for name, buffer in model.named_buffers():  # batch norms have counted this pass
            buffer.copy_(buffers[name])
    return sum(found.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device; None where that is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    machine = memory_of_machine()
    return None if machine is None else machine[0]


def is_shortage(error: BaseException) -> bool:
    """Whether it says that memory is too small, of whatever device."""
    if isinstance(error, OutOfMemory):
        return False  # it has been explained
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SHORTAGE.search(str(error)))


class _Latest(Iterator[Batch]):
    """Batches, of which it remembers the latest."""

    batch: Batch | None = None

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches

    def __next__(self) -> Batch:
        self.batch = None
        self.batch = next(self.batches)
        return self.batch


def explained_training(
    step: Callable[[Run, Iterator[Batch]], None],
) -> Callable[[Run, Iterator[Batch]], None]:
    """Decorate a training step: where memory runs out, it raises OutOfMemory with advice."""

    @wraps(step)
    def explained(run: Run, batches: Iterator[Batch]) -> None:
        latest = _Latest(batches)
        try:
            step(run, latest)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            size = None if latest.batch is None else tuple(latest.batch.images.shape)
            device = run.runtime.device
            raise OutOfMemory(training_advice(run.config, run.step, size, device)) from error

    return explained


def explained_answer(
    answer: Callable[Concatenate[Model, Batch, P], T],
) -> Callable[Concatenate[Model, Batch, P], T]:
    """The same for the prediction of a batch."""

    @wraps(answer)
    def explained(model: Model, batch: Batch, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return answer(model, batch, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            device = next(model.parameters(), batch.images).device
            raise OutOfMemory(answer_advice(model, tuple(batch.images.shape), device)) from error

    return explained


def training_advice(
    config: Config, step: int, shape: Sequence[int] | None, device: torch.device
) -> str:
    """What was too much, in numbers, and what takes less.

    Args:
        shape: of the images, [B, C, H, W]; None if they were still being read.
    """
    settings = config.train
    where = f"step {step}: {_usage(device)}"
    if shape is None:
        return (
            f"{where} while batches were read; take fewer processes (data.workers), or free memory "
            "that others use"
        )
    images, _, height, width = shape
    ways = []
    if images > 1:
        # the same number of images per step, as nearly as halves give it
        half = images // 2
        times = round(images * settings.accumulate / half)
        ways.append(f"train.batch_size={half} train.accumulate={times}: a step in smaller parts")
    if choose_precision(settings.precision, device) == torch.float32:
        name = "bf16" if device.type != "cuda" or has_bf16() else "fp16"
        ways.append(f"train.precision={name}: half of the activations")
    ways += [
        f"{path}=true: activations are computed again in backward"
        for path in switches(config.model, "model", "checkpointing")
    ]
    ways += smaller_canvases(config.data.transforms)
    if images > 1:
        ways.append("train.batch_size=auto: as many as fit")
    listed = "".join(f"\n  {way}" for way in ways)
    return (
        f"{where} by {images} image{'s' * (images > 1)} on a canvas of {height} x {width} "
        f"(train.batch_size {settings.batch_size}, precision {settings.precision}). "
        f"Take one or more of these:{listed}"
    )


def answer_advice(model: Model, shape: Sequence[int], device: torch.device) -> str:
    """What was too much in evaluation and prediction, and what takes less."""
    images, _, height, width = shape
    ways = []
    if images > 1:
        ways.append(
            f"fewer images at a time: train.batch_size={images // 2} in train and eval, "
            "--batch-size in predict, batch_size= in Python"
        )
    if model.task == "semantic":
        ways.append("windows: inference.window=512, and inference.batch_size=1 for one at a time")
    ways += ["train.precision=bf16", "smaller images: the size in data.transforms"]
    listed = "".join(f"\n  {way}" for way in ways)
    return (
        f"prediction: {_usage(device)} by {images} image{'s' * (images > 1)} on a canvas of "
        f"{height} x {width}. Take one or more of these:{listed}"
    )


def switches(part: Part, path: str, option: str) -> list[str]:
    """Dotted names of an option, in a part and those within it, where it is off."""
    found = [f"{path}.{option}"] if part.options.get(option) is False else []
    for name, value in part.options.items():
        if isinstance(value, Part):
            found += switches(value, f"{path}.{name}", option)
    return found


def smaller_canvases(transforms: Part) -> list[str]:
    """Options of the images' size, at three quarters."""
    for key in ("crop", "size"):
        size = transforms.options.get(key)
        if isinstance(size, int):
            less = max(32, size * 3 // 4 // 32 * 32)
            return [f"data.transforms.{key}={less}: smaller images"] if less < size else []
    return ["smaller images: the size in data.transforms"]


def _usage(device: torch.device) -> str:
    used = memory_used(device)
    text = "" if used is None else f" ({used:.1f} GiB in use by this process at most"
    if text and device.type == "cuda":
        text += f", of {torch.cuda.get_device_properties(device).total_memory / GIB:.1f}"
    elif text and (machine := memory_of_machine()) is not None:
        text += f", {machine[0] / GIB:.1f} of the machine's {machine[1] / GIB:.1f} free now"
    return f"the memory of {device} is too small{text + ')' if text else ''}"
