"""Checks of the parts that answer: heads and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitdense.engine.runtime import autocast, to_float
from vitdense.heads.base import Head
from vitdense.models.base import Model
from vitdense.structures import Level, Prediction, Size, Target
from vitdense.testing import probes
from vitdense.testing.predictions import agreement, check_prediction, check_semantic_logits
from vitdense.testing.probes import require

CPU = torch.device("cpu")


def check_head(
    cls: Callable[..., Head],
    *,
    levels: Sequence[Level] = probes.PYRAMID,
    num_classes: int = 3,
    canvas: Size = (64, 96),
    **options: Any,
) -> None:
    """Assert what every head must keep.

    The same output type in training and in evaluation; the same scalar loss terms always; finite
    gradients on every parameter, also for targets without objects and for one image; an image
    alone = the same in a batch; predictions of the right types inside the original image, for
    each task; semantic logits over the canvas where there are any; bfloat16 autocast; copies.

    Args:
        cls: the class, or a function that builds the part.
        levels, num_classes: the facts it is built with.
        canvas: (height, width) of the images under the features; a multiple of every stride.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """

    def inputs(count: int) -> list[Tensor]:
        return probes.make_maps(levels, canvas, count)

    def build() -> Head:
        return cls(list(levels), num_classes, **options)

    name = getattr(cls, "__name__", type(cls).__name__)
    with probes.seeded():
        probes.check_contract("head", build())
        _Subject(name, build, inputs, canvas, num_classes).check()


def check_model(
    cls: Callable[..., Model],
    *,
    num_classes: int = 3,
    image_classes: int = 0,
    canvas: Size | None = None,
    **options: Any,
) -> None:
    """Assert what every model must keep: what `check_head` says, from uint8 images.

    Args:
        cls: the class, or a function that builds the part.
        num_classes: the fact it is built with.
        image_classes: another, for models that also label whole images: 0 or 3.
        canvas: (height, width) of the images; by default small multiples of its divisor.
        options: what a config would set.

    Raises:
        AssertionError: says what is broken and how to mend it.
    """
    name = getattr(cls, "__name__", type(cls).__name__)
    with probes.seeded():
        facts = (num_classes, image_classes) if image_classes else (num_classes,)
        model = cls(*facts, **options)
        probes.check_contract("model", model)
        require(
            isinstance(getattr(model, "divisor", None), int) and model.divisor > 0,
            f"{name}.divisor must be a positive int, set in __init__: the loader pads to it",
        )
        size = canvas or tuple(max(1, side // model.divisor) * model.divisor for side in (64, 96))

        def inputs(count: int) -> Tensor:
            return torch.randint(256, (count, model.in_chans, *size), dtype=torch.uint8)

        def build() -> Model:
            return cls(*facts, **options)

        _Subject(name, build, inputs, (size[0], size[1]), num_classes, image_classes).check()


@dataclass
class _Subject:
    """A head or a model with what it eats: both answer to the same interface."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], Any]
    canvas: Size
    num_classes: int
    image_classes: int = 0

    def check(self) -> None:
        """All checks, the simplest first."""
        module = self.build()
        self._check_facts(module)
        probes.check_state(self.name, module)
        probes.shake(module)
        keys = self._check_training(module)
        self._check_autocast(module, keys)
        self._check_types(module)
        self._check_predictions(module)
        self._check_batch_and_copies(module)

    def targets(self, *objects: int) -> list[Target]:
        return [probes.make_target(self.canvas, self.num_classes, count) for count in objects]

    def _check_facts(self, module: Any) -> None:
        require(
            module.num_classes == self.num_classes,
            f"{self.name}.num_classes must be the number it was built with",
        )

    def _check_training(self, module: nn.Module) -> set[str]:
        """Losses and gradients for full, empty and single targets; returns the names of terms."""
        keys: set[str] | None = None
        for objects, situation in (
            ((3, 2), "for two images with objects"),
            ((3, 0), "for a batch in which one image has no objects and ignores all pixels"),
            ((0, 0), "for targets without objects whose pixels are all ignored"),
            ((2,), "for a batch of one image"),
        ):
            targets = self.targets(*objects)
            if objects == (3, 2):  # label maps may come in either type
                for target in targets:
                    assert target.semantic is not None
                    target.semantic = target.semantic.long()
            losses = self._step(module, targets, situation)
            keys = keys or set(losses)
            require(
                keys == set(losses),
                f"{self.name}.loss: the terms are {sorted(keys)} for two images with objects but "
                f"{sorted(losses)} {situation}. Return every term always, zero where it has no "
                "target: all processes must log the same ones",
            )
            torch.stack(list(losses.values())).sum().backward()
            probes.check_gradients(self.name, module, situation)
        return keys or set()

    def _step(
        self,
        module: Any,
        targets: list[Target],
        situation: str,
        precision: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        module.train()
        with probes.noting(f"{self.name}: forward and loss {situation}"):
            with autocast(CPU, precision):
                outputs = module(self.inputs(len(targets)), targets)
            losses = module.loss(to_float(outputs), targets)
        require(
            isinstance(losses, dict) and losses and all(isinstance(k, str) for k in losses),
            f"{self.name}.loss must return a dict of named terms; it returned {losses!r:.80}",
        )
        for key, term in losses.items():
            where = f"{self.name}.loss: term '{key}'"
            require(
                isinstance(term, Tensor) and term.ndim == 0,
                f"{where} must be a scalar tensor {situation}; take its mean or sum. "
                f"It is {tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__}",
            )
            require(
                term.isfinite(),
                f"{where} is {term.item()} {situation}. Divide by max(count, 1), "
                "and return `0 * outputs.sum()` where nothing is counted",
            )
            require(
                term.requires_grad,
                f"{where} is cut from the graph {situation}: it has no gradient. "
                "Return `0 * outputs.sum()` in place of a constant",
            )
        return losses

    def _check_autocast(self, module: Any, keys: set[str]) -> None:
        situation = "after a forward under bfloat16 autocast"
        losses = self._step(module, self.targets(3, 2), situation, torch.bfloat16)
        require(keys == set(losses), f"{self.name}.loss: other terms {situation}: {sorted(losses)}")
        torch.stack(list(losses.values())).sum().backward()
        probes.check_gradients(self.name, module, situation)
        predictions = self._predict(module, self.inputs(2), torch.bfloat16)
        self._check_each(module, predictions, situation)

    def _check_types(self, module: nn.Module) -> None:
        inputs = self.inputs(2)
        kinds = {
            "training": probes.kind(module.train()(inputs, self.targets(2, 1))),
            "training without targets": probes.kind(module(inputs)),
            "evaluation": probes.kind(module.eval()(inputs)),
        }
        require(
            kinds["training"] == kinds["evaluation"] == kinds["training without targets"],
            f"{self.name}.forward must return the same type in training and in evaluation; it "
            + ", ".join(f"returns {value} in {key}" for key, value in kinds.items())
            + ". Decode in predict, not in forward",
        )

    def _check_predictions(self, module: nn.Module) -> None:
        self._check_each(module, self._predict(module, self.inputs(2)), "in evaluation")
        if module.task == "semantic":
            self._check_logits(module)

    def _check_batch_and_copies(self, module: nn.Module) -> None:
        inputs = self.inputs(2)
        together = self._predict(module, inputs)

        def same(other: nn.Module) -> bool:
            pairs = zip(together, self._predict(other, inputs), strict=True)
            return all(agreement(a, b) > 0.98 for a, b in pairs)

        probes.check_copies(self.name, module, self.build, same)
        single = inputs[:1] if isinstance(inputs, Tensor) else [item[:1] for item in inputs]
        alone = self._predict(module, single)
        require(
            agreement(together[0], alone[0]) > 0.98,
            f"{self.name}: an image alone gets another answer than the same image in a batch. "
            "Nothing may be shared between images in evaluation (no batch statistics, "
            "no selection over the whole batch)",
        )

    def _predict(
        self, module: Any, inputs: Any, precision: torch.dtype = torch.float32
    ) -> list[Prediction]:
        count = len(inputs) if isinstance(inputs, Tensor) else len(inputs[0])
        frames = probes.make_frames(self.canvas, count)
        module.eval()
        with torch.no_grad(), probes.noting(f"{self.name}: forward and predict"):
            with autocast(CPU, precision):
                outputs = module(inputs)
            predictions = module.predict(to_float(outputs), frames)
        require(
            isinstance(predictions, list) and len(predictions) == len(frames),
            f"{self.name}.predict must return a list with one Prediction per frame",
        )
        return predictions

    def _check_logits(self, module: Any) -> None:
        with torch.no_grad():
            outputs = module.eval()(self.inputs(2))
        try:
            logits = module.semantic_logits(outputs)
        except NotImplementedError:  # only windows, flips and scales need it
            return
        name = f"{self.name}.semantic_logits"
        check_semantic_logits(name, logits, 2, self.num_classes, self.canvas)

    def _check_each(self, module: Any, predictions: list[Prediction], situation: str) -> None:
        frames = probes.make_frames(self.canvas, len(predictions))
        for prediction, frame in zip(predictions, frames, strict=True):
            name = f"{self.name}.predict {situation}"
            check_prediction(name, prediction, module.task, frame, self.num_classes)
            scores = prediction.image_scores
            require(
                self.image_classes == (0 if scores is None else len(scores)),
                f"{name}: image_scores must hold one number for each of the image classes",
            )
