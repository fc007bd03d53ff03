"""Files that a run keeps, whole or not at all; `model.safetensors` is the one to carry away."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitdense.config import Part, dump, loads
from vitdense.models.base import Model

FORMAT = "vitdense"

PARTIAL, ASIDE = ".partial", ".aside"
"""How names end of what is being written, and of a folder that is being replaced."""


class CheckpointError(Exception):
    """A file is no checkpoint, or not of this model: names the file, the fault and the remedy."""


@dataclass(slots=True)
class Meta:
    """What `model.safetensors` says about its weights.

    Attributes:
        config: the resolved config as YAML; its `data.transforms` is the preprocessing.
        classes: names, in the order of the labels.
        category_ids: the data set's own id of each class.
        task: what the model answers.
        step: optimizer steps it was trained for.
        metrics: its numbers on the validation split.
        version: of vitdense, that wrote it.
        image_classes: names of the labels of whole images that it also answers with.
    """

    config: str
    classes: list[str]
    category_ids: list[int]
    task: str
    step: int
    metrics: dict[str, float | None]
    version: str
    image_classes: list[str] = field(default_factory=list)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file or folder beside `path`, then put it in its place: whole or not.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; what was there stays.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        for item in (*partial.rglob("*"), partial):
            _sync(item)
        _move(partial, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        with contextlib.suppress(OSError):
            remove(partial)
        raise CheckpointError(f"{path}: cannot be written: {_reason(error)}") from error


def _move(partial: Path, path: Path) -> None:
    """Put `partial` in the place of `path`; a folder that is there is moved aside first."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}{ASIDE}")
        remove(aside)
        path.rename(aside)
        partial.rename(path)
        remove(aside)
    else:
        partial.replace(path)


def _sync(path: Path) -> None:
    """Wait until the disk has the content of a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":  # has no such thing
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What the system says, which may hide behind other errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; raises CheckpointError."""
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state in place; raises OSError."""
    # through a file of Python's: torch's own says nothing of why it failed
    with path.open("wb") as file:
        torch.save(state, file)


BROKEN = (
    *(OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(struct.error, zlib.error, pickle.UnpicklingError),
)
"""What libraries raise for a file with a wrong byte, depending on where that is."""


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state, tensors on the CPU; runs no code from the file.

    Raises:
        CheckpointError: the file is absent, torn, or none of vitdense.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: not found; there is nothing to resume, leave out --resume")
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()  # torch itself does not look at the sums
        if torn is not None:
            raise CheckpointError(f"{path}: is torn: {torn} in it is not what was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: is torn, or no checkpoint of vitdense ({error})") from error
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: is no checkpoint of vitdense ({reason})") from error


def save_model(path: Path, model: nn.Module, meta: Meta) -> None:
    """Write a model's weights and what is needed to use them into one safetensors file."""
    save_weights(path, model.state_dict(), meta)


def save_weights(path: Path, weights: dict[str, Tensor], meta: Meta) -> None:
    """The same from a `state_dict`; raises CheckpointError if it cannot be written."""
    fields = {name: value for name, value in asdict(meta).items() if name != "config"}
    metadata = {"format": "pt", "config": meta.config, FORMAT: json.dumps(fields)}
    save_tensors(path, _separate(weights), metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomic(path, write)


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, those that share memory apart, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        separate[name] = tensor if whole else tensor.clone()
        seen.add(storage.data_ptr())
    return separate


def read_meta(path: Path | str) -> Meta:
    """The metadata of a `model.safetensors`, without its weights.

    Raises:
        CheckpointError: the file is absent or none of vitdense.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise CheckpointError(f"{path}: is a folder; name the model.safetensors in it")
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: not found")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no safetensors file ({error})") from error
    if FORMAT not in metadata or "config" not in metadata:
        raise CheckpointError(
            f"{path}: was not written by vitdense, it has no config in its metadata; to start from "
            "other weights, set model.backbone.weights in a config"
        )
    return Meta(config=metadata["config"], **json.loads(metadata[FORMAT]))


def load_weights(path: Path | str, model: nn.Module) -> None:
    """Fill `model` with the weights of a safetensors file; raises CheckpointError."""
    fill(model, read_weights(path), path)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no safetensors file ({error})") from error


def fill(
    model: nn.Module,
    weights: dict[str, Tensor],
    path: Path | str,
    remedy: str = "build the model from the config that trained them",
) -> None:
    """Give `model` the weights that were read from `path`; every name and shape must match.

    Args:
        remedy: what to do if they do not.

    Raises:
        CheckpointError: they do not; names the first few.
    """
    faults = _mismatches(model.state_dict(), weights)
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{path}: its weights are not this model's: {'; '.join(faults[:5])}{more}; {remedy}"
        )
    model.load_state_dict(weights)


def load_model(path: Path | str, overrides: Iterable[str] = ()) -> tuple[Model, Meta]:
    """Build the model that a `model.safetensors` describes, on the CPU, in evaluation mode.

    The file is enough: nothing is downloaded, and no data set is needed.

    Args:
        overrides: of its config, `inference.window=512` and the like; the metadata has them too.

    Raises:
        CheckpointError: the file is absent, not of vitdense, or its weights do not fit.
        ConfigError: its config names a part that is not installed, or overrides are wrong.
    """
    meta = read_meta(path)
    config = loads(meta.config, str(path), overrides)
    part = without_weights(config.model)
    model = make_model(part, len(meta.classes), len(meta.image_classes))
    load_weights(path, model)
    return model.eval(), replace(meta, config=dump(config))


def make_model(part: Part, num_classes: int, image_classes: int) -> Model:
    """The model for so many classes, and labels of whole images if it can have any."""
    if image_classes and part.takes("image_classes"):
        return part(num_classes, image_classes)
    return part(num_classes)


def without_weights(part: Part) -> Part:
    """The same part, its backbone built from random weights where it would fetch or read some."""
    return changed(part, "backbone", {"pretrained": False, "weights": None})


def changed(part: Part, kind: str, values: dict[str, Any]) -> Part:
    """The same part with other values of the options that it, or a part within it, has.

    Args:
        kind: of the parts whose options are changed.
    """
    values_here = values if part.kind == kind else {}
    options = {
        name: changed(value, kind, values)
        if isinstance(value, Part)
        else values_here.get(name, value)
        for name, value in part.options.items()
    }
    return replace(part, options=options)


def shorten(names: Iterable[str]) -> list[str]:
    """All names, those that differ only in numbers as one with its count: `layers.*.bias (6)`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(name)
    return [
        those[0] if len(those) == 1 else f"{pattern} ({len(those)})"
        for pattern, those in groups.items()
    ]


def _mismatches(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    faults = [f"{name} is missing" for name in ours.keys() - theirs.keys()]
    faults += [f"{name} is unknown" for name in theirs.keys() - ours.keys()]
    faults += [
        f"{name} is {list(theirs[name].shape)} in the file, {list(ours[name].shape)} in the model"
        for name in ours.keys() & theirs.keys()
        if ours[name].shape != theirs[name].shape
    ]
    return sorted(faults)
