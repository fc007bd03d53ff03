"""Building timm models: names, the arguments a family takes, weights, and clear errors."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vitdense.backbones.survey import first_line

log = logging.getLogger(__name__)


def check_name(name: str) -> None:
    """Raise ValueError with near names unless timm knows the model."""
    if ":" in name:  # hf-hub:owner/repo and local-dir:path carry their own architecture
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"model: timm has no model named {base!r}{hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(base)]
    if tag and tag not in tags:
        raise ValueError(f"model: {base} has no weights tagged {tag!r}, only {', '.join(tags)}")


def on_meta(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model without weights or memory, in evaluation mode.

    Raises:
        ValueError: the constructor refuses the arguments.
    """
    try:
        with torch.device("meta"), _NoInitialValues():
            model = _construct(name, **arguments)
    except RuntimeError:  # older versions of timm read values of tensors as they build
        with torch.device("cpu"):
            model = _construct(name, **arguments).to("meta")
    return model.eval()


def create(
    name: str, arguments: dict[str, Any], *, pretrained: bool = False, weights: str | None = None
) -> nn.Module:
    """The model, with weights from timm's hub, from a local file, or random.

    Raises:
        ValueError: the weights cannot be had, or do not belong to the model.
    """
    if weights is not None:
        return _from_file(name, arguments, Path(weights))
    if not pretrained:
        return _construct(name, **arguments)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except RuntimeError as error:  # timm has none, or they do not fit
        raise ValueError(
            f"pretrained: {first_line(error)} "
            "Set `pretrained: false`, or `weights: path` to a local file"
        ) from error
    except Exception as error:  # the hub's client and its transport raise many kinds
        raise ValueError(
            f"pretrained: the weights of {name} are neither in the cache nor could they be "
            f"downloaded ({first_line(error)}). Without a network set `weights: path` to a local "
            ".pth or .safetensors file, or `pretrained: false` to start from random weights; "
            "HF_HUB_CACHE names the folder of a filled cache and HF_HUB_OFFLINE=1 uses it at once"
        ) from error


def freeze_norms(model: nn.Module, name: str) -> nn.Module:
    """Replace every batch norm by one whose statistics and weights are constants.

    Raises:
        ValueError: the model has no batch norms.
    """
    from timm.utils.model import freeze_batch_norm_2d

    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError(f"frozen_norms: {name} has no batch norms")
    return freeze_batch_norm_2d(model)


def best_layout(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutional nets, which makes inference a quarter faster."""
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return torch.channels_last if convolutional else torch.contiguous_format


def parameters_of(model: nn.Module) -> set[str]:
    """Names of all arguments that the constructors of the model's class and its bases take."""
    names: set[str] = set()
    for cls in type(model).__mro__:
        parameters = inspect.signature(cls).parameters
        names |= set(parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


class _NoInitialValues(TorchFunctionMode):
    """Skip initialising meta tensors, which would take most of the time of building a model."""

    skipped = {"uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_"}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if func.__name__ in self.skipped and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def _construct(name: str, **arguments: Any) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # initialisers warn about tensors without elements, e.g. of pruned positions
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            return timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError, ValueError, OSError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        option = "options" if "keyword" in str(error) else "model"
        raise ValueError(
            f"{option}: timm cannot build {name} with {given}: {first_line(error)}"
        ) from error


def _from_file(name: str, arguments: dict[str, Any], path: Path) -> nn.Module:
    """A model with the weights of a file; timm converts known layouts and resizes positions."""
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    with _missing_keys() as missing:
        try:
            model = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **arguments
            )
        except Exception as error:  # unpickling and loading raise many kinds
            raise ValueError(f"weights: cannot load {path} into {name}: {error}") from error
    if 2 * len(missing) > len(model.state_dict()):
        some = ", ".join(missing[:3])
        raise ValueError(f"weights: {path} does not belong to {name}: it lacks {some}, ...")
    if missing:
        log.warning("%s lacks %s: they start from random values", path, ", ".join(missing))
    return model


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Collect the keys that timm misses in a file; it tells them only to its log."""
    found: list[str] = []

    class Collector(logging.Handler):
        """Reads the names out of timm's line."""

        def emit(self, record: logging.LogRecord) -> None:
            match = re.match(r"Missing keys \((.*?)\)", record.getMessage())
            if match:
                found.extend(match[1].split(", "))

    logger = logging.getLogger("timm.models._builder")
    level, propagate, collector = logger.level, logger.propagate, Collector()
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate
