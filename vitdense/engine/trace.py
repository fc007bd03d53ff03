"""Watching a model compute: which module and operation first gives numbers that are not finite."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

FILLS = re.compile(r"empty|full|fill|scalar_tensor|constant_pad|lift_fresh|resize|set_")
"""Operations whose infinite numbers are meant, or whose numbers mean nothing yet."""

FRAME = re.compile(r'File "(.+)", line (\d+), in \S+\n\s*(.*)')


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers in some tensors: smallest and largest of the finite ones, and how many are not.

    Attributes:
        low, high: None if none is finite.
    """

    low: float | None
    high: float | None
    nans: int
    infinite: int
    count: int

    @classmethod
    def of(cls, value: Any) -> Range | None:
        """Of all tensors in a value; None if there are no numbers."""
        found = [tensor.detach() for tensor in tensors(value) if tensor.numel()]
        if not found:
            return None
        nans = infinite = count = 0
        ends: list[float] = []
        for tensor in found:
            finite = tensor.isfinite()
            bad = tensor.numel() - int(finite.sum())
            holes = int(tensor.isnan().sum()) if bad else 0
            nans, infinite = nans + holes, infinite + bad - holes
            count += tensor.numel()
            good = tensor[finite] if bad else tensor
            if good.numel():
                ends += [float(good.min()), float(good.max())]
        if not ends:
            return cls(None, None, nans, infinite, count)
        return cls(min(ends), max(ends), nans, infinite, count)

    def __str__(self) -> str:
        text = "" if self.low is None else f"{self.low:.4g} .. {self.high:.4g}"
        bad = ((self.nans, "nan"), (self.infinite, "inf"))
        holes = [f"{number} {word} of {self.count}" for number, word in bad if number]
        return ", ".join([text] * bool(text) + holes)


@dataclass(frozen=True, slots=True)
class Call:
    """What went into a module and came out; or the gradient of what came out."""

    module: str
    inputs: Range | None
    outputs: Range


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of torch that was given finite numbers, and gave others."""

    name: str
    module: str
    inputs: Range | None
    outputs: Range
    place: str

    def __str__(self) -> str:
        of = "" if self.inputs is None else f" of {self.inputs}"
        within = f", in {self.module}" if self.module else ""
        return f"{self.name}{of} gives {self.outputs}{within}; {self.place}"


class Trace(TorchDispatchMode):
    """Inside, every call of a module of `model`, and the first operations that break.

    Attributes:
        calls: in the order in which they end, so that a module comes after its parts.
        gradients: of what came out of the modules, in the order in which they are known.
        nan, infinite: the first operation of each kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.gradients: list[Call] = []
        self.nan: Operation | None = None
        self.infinite: Operation | None = None
        self._open: list[str] = []
        self._hooks: list[Any] = []
        self._backward = self._silent = False

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            if name:
                self._hooks.append(module.register_forward_pre_hook(partial(self._begin, name)))
                self._hooks.append(
                    module.register_forward_hook(partial(self._end, name), with_kwargs=True)
                )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def turn(self) -> None:
        """From here on it goes backward."""
        self._backward = True

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self._open.append(name)

    def _end(self, name: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        self._open.pop()
        if self._backward:  # activation checkpointing computes again
            return
        self._silent = True
        given, made = Range.of((args, kwargs)), Range.of(outputs)
        self._silent = False
        if made is not None:
            self.calls.append(Call(name, given, made))
        for tensor in tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._note_gradient, name))

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        self._silent = True
        made = Range.of(gradient)
        self._silent = False
        if made is not None:
            self.gradients.append(Call(name, None, made))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if self._silent or (self.nan and self.infinite) or FILLS.search(func.__name__):
            return outputs
        bad = [it for it in tensors(outputs) if it.is_floating_point() and not it.isfinite().all()]
        if bad:
            self._judge(func, (args, kwargs), Range.of(outputs))
        return outputs

    def _judge(self, func: Any, inputs: Any, made: Range | None) -> None:
        """Take note if it is the first of its kind, and not what came in."""
        assert made is not None
        given = Range.of(inputs)
        place = _backward_place() if self._backward else _forward_place()
        module = self._open[-1] if self._open else ""
        operation = Operation(str(func.overloadpacket.__name__), module, given, made, place)
        if made.nans and self.nan is None and not (given and given.nans):
            self.nan = operation
        elif made.infinite and self.infinite is None and not (given and given.infinite):
            self.infinite = operation


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, field.name) for field in fields(value)])


def _forward_place() -> str:
    """The line that called torch."""
    frames = [(f.filename, f.lineno or 0, f.line or "") for f in traceback.extract_stack()]
    return _last([frame for frame in frames if frame[0] != __file__])


def _backward_place() -> str:
    """The line whose gradient is being computed, as `detect_anomaly` has noted it."""
    current = getattr(torch._C, "_current_autograd_node", None)
    node = current() if current else None
    noted = node.metadata.get("traceback_", []) if node is not None else []
    found = [FRAME.search(text) for text in noted]
    return _last([(it[1], int(it[2]), it[3]) for it in found if it])


def _last(frames: list[tuple[str, int, str]]) -> str:
    """The innermost frame that is not torch's own."""
    own = str(Path(torch.__file__).parent)
    ours = [frame for frame in frames if not frame[0].startswith(own)]
    if not ours:
        return "its line is unknown"
    file, line, code = ours[-1]
    roots = [root for root in sys.path if root and file.startswith(f"{root}/")]
    short = file.removeprefix(f"{max(roots, key=len)}/") if roots else file
    return f"{short}:{line}: `{code.strip()}`"
