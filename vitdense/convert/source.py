"""Reading public weights: folders of transformers, hub ids, .safetensors, .pth, .bin, .pkl."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitdense.engine import checkpoint

WHOLE = "model.safetensors"
SHARDS = "model.safetensors.index.json"
OLD = "pytorch_model.bin"
OLD_SHARDS = "pytorch_model.bin.index.json"

STATES = (("ema", "module"), ("ema_model",), ("model",), ("state_dict",), ("model_state_dict",))
"""Keys under which training states keep weights; an average (EMA) is preferred."""


class ConversionError(Exception):
    """A source cannot be read or become a model: names it, the fault and the remedy."""


@dataclass(slots=True)
class Source:
    """A public model as it was found.

    Attributes:
        name: the path or id that was given.
        weights: on the CPU, by the source's names.
        config: transformers' config.json, or what a .pth keeps beside its weights: the arguments
            that it was trained with, or OpenMMLab's `meta`.
        preprocessor: transformers' preprocessor_config.json, if there is one.
    """

    name: str
    weights: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """What transformers calls the architecture; None if the source is not of transformers."""
        return self.config.get("model_type")


def require(config: dict[str, Any], name: str, /, **usual: Any) -> None:
    """Refuse options that our model does not have.

    Args:
        config: options of the source; what it leaves out has its usual value.
        name: whose they are, for the message.
        usual: the only value of each option that can be converted.

    Raises:
        ConversionError: an option has another value.
    """
    for key, value in usual.items():
        if config.get(key, value) != value:
            raise ConversionError(
                f"{name}: {key} is {config[key]!r}; only {value!r} can be converted"
            )


def read(name: str) -> Source:
    """Read a folder, a file or a hub id; no code in it is run.

    Raises:
        ConversionError: there is nothing there, or nothing that can be read safely.
    """
    path = Path(name)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _read_hub(name)
    raise ConversionError(f"{name}: there is no such file or folder, and it is no id of the hub")


def _read_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder}: has no config.json; give a folder of transformers")
    source = Source(str(folder), {}, _read_json(folder / "config.json"))
    if (folder / "preprocessor_config.json").is_file():
        source.preprocessor = _read_json(folder / "preprocessor_config.json")
    for whole, shards in ((WHOLE, SHARDS), (OLD, OLD_SHARDS)):
        if (folder / whole).is_file():
            source.weights = read_weights(folder / whole)[0]
            return source
        if (folder / shards).is_file():
            for file in sorted(set(_read_json(folder / shards)["weight_map"].values())):
                source.weights |= read_weights(folder / file)[0]
            return source
    raise ConversionError(f"{folder}: has neither {WHOLE} nor {OLD}")


def _read_file(path: Path) -> Source:
    """A single file; the config.json beside a .safetensors or .bin belongs to it."""
    if path.suffix == ".safetensors" and _is_ours(path):
        raise ConversionError(
            f"{path}: is a model of vitdense already, for eval, predict and train.init"
        )
    weights, arguments = read_weights(path)
    source = Source(str(path), weights, arguments)
    beside = path.with_name("config.json")
    if not arguments and path.suffix in {".safetensors", ".bin"} and beside.is_file():
        source.config = _read_json(beside)
        preprocessor = path.with_name("preprocessor_config.json")
        source.preprocessor = _read_json(preprocessor) if preprocessor.is_file() else {}
    return source


def _is_ours(path: Path) -> bool:
    try:
        checkpoint.read_meta(path)
    except checkpoint.CheckpointError:
        return False
    return True


def _read_hub(name: str) -> Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except EntryNotFoundError as error:
            if type(error).__name__ == "LocalEntryNotFoundError":  # no network, and not cached
                raise
            return None

    try:
        config = fetch("config.json")
        if config is None:
            raise ConversionError(f"{name}: this repository of the hub has no config.json")
        fetch("preprocessor_config.json")
        for whole, shards in ((WHOLE, SHARDS), (OLD, OLD_SHARDS)):
            if fetch(whole) is not None:
                break
            if (index := fetch(shards)) is not None:
                for file in set(_read_json(index)["weight_map"].values()):
                    fetch(file)
                break
    except ConversionError:
        raise
    except Exception as error:  # the client and its transport raise many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConversionError(
            f"{name}: there is no such file or folder, and it could not be fetched from the hub "
            f"({reason}); download it elsewhere and give the folder, or fill the cache that "
            "HF_HUB_CACHE names"
        ) from error
    source = _read_folder(config.parent)
    source.name = name
    return source


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the arguments that are kept beside them; runs no code from it.

    Raises:
        ConversionError: it cannot be read, or only by running code.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), {}
        except SafetensorError as error:
            raise ConversionError(f"{path}: is no safetensors file ({error})") from error
    content = _unpickle(path) if path.suffix == ".pkl" else _load(path)
    weights = _find_state(content)
    if not weights:
        raise ConversionError(f"{path}: holds no weights under a name that is known")
    said = content if isinstance(content, dict) else {}
    arguments = said.get("args") or said.get("meta") or {}
    return weights, vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no file of torch raises nearly anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ConversionError(f"{path}: is no file of weights ({reason})") from error
        raise ConversionError(
            f"{path}: cannot be read without running code from it: it wants {wanted[1]}; save its "
            "tensors alone, with torch.save(model.state_dict(), ...)"
        ) from error


class _Arrays(pickle.Unpickler):
    """Knows the constructors of numpy's arrays, and nothing else."""

    ALLOWED = frozenset(
        f"{module}.{name}"
        for module, names in {
            "numpy": ("ndarray", "dtype"),
            "numpy.core.multiarray": ("_reconstruct", "scalar"),
            "numpy._core.multiarray": ("_reconstruct", "scalar"),
            "numpy._core.numeric": ("_frombuffer",),
            "numpy.core.numeric": ("_frombuffer",),
            "_codecs": ("encode",),
            "collections": ("OrderedDict",),
        }.items()
        for name in names
    )

    def find_class(self, module: str, name: str) -> Any:
        """A constructor; raises UnpicklingError for any that arrays do not need."""
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> Any:
    """A pickle of detectron2: names and numpy arrays."""
    try:
        with path.open("rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise ConversionError(
            f"{path}: is no pickle of plain arrays ({error}); nothing in it was run"
        ) from error


def _find_state(content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors in a training state, without the wrapper's prefix."""
    for keys in (*STATES, ()):
        state = content
        for key in keys:
            state = state.get(key) if isinstance(state, dict) else None
        tensors = _tensors(state)
        if tensors:
            return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {}


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        return {}
    found = {}
    for name, value in state.items():
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            value = torch.from_numpy(value.copy()) if value.dtype.kind in "fiub" else None
        if isinstance(value, Tensor):
            found[str(name)] = value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: is no JSON ({error})") from error
