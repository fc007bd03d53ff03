"""Configs in and out: files, overrides, text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitdense.config import layers, nodes
from vitdense.config.errors import ConfigError, Mark, Problem
from vitdense.config.nodes import Node
from vitdense.config.part import Part
from vitdense.config.reader import BAD, Reader
from vitdense.config.schema import NO_WINDOWS, OF_WINDOWS, Choice, Config, Section
from vitdense.declarations import short_path
from vitdense.registry import add_module, suggest


def load(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read and check a config file; nothing is built, and torch is not imported.

    Args:
        overrides: `train.steps=2000` and the like; values in YAML.

    Raises:
        ConfigError: with all problems of all its sections.
    """
    path = Path(path)
    tree = layers.override(layers.read(path), overrides)
    return _check(tree, config_name(path))


def loads(text: str, file: str = "config", overrides: Iterable[str] = ()) -> Config:
    """Check a config given as text; `file` is what messages call it."""
    tree = layers.resolve(nodes.parse(text, file), Path(file))
    return _check(layers.override(tree, overrides), config_name(Path(file)))


def dump(config: Config) -> str:
    """The config as YAML with all defaults; loading it gives an equal config."""
    return nodes.dump(_plain(config))


def config_name(path: Path) -> str:
    """`demo/detection` for `configs/demo/detection.yaml`; else the file's name without suffix."""
    parts = path.resolve().with_suffix("").parts
    if "configs" in parts[:-1]:
        last = len(parts) - 1 - parts[-2::-1].index("configs")
        return "/".join(parts[last:])
    return parts[-1] if parts else "config"


def _check(tree: Node, name: str) -> Config:
    reader = Reader()
    assert isinstance(tree.value, dict)
    _register_imports(tree.value.get("imports"), reader)
    output = Node(f"runs/{name}", tree.mark)
    tree = Node({"output": output, **tree.value}, tree.mark)
    config = reader.section(Config, tree)
    if config is not BAD and config.inference.window is None:
        _refuse_windows(tree.value.get("inference"), reader)
    if reader.problems or config is BAD:
        raise ConfigError(sorted(reader.problems, key=_order))
    config._name = name
    return config


def _refuse_windows(inference: Node | None, reader: Reader) -> None:
    """Report options of windows that the command line gives where there are none.

    The config.yaml of a run has them all, and says `window: null`.
    """
    given = inference.value if inference is not None else None
    for key, child in given.items() if isinstance(given, dict) else ():
        if key in OF_WINDOWS and child.mark.file == layers.COMMAND_LINE:
            reader.report(child.mark, f"inference.{key}", NO_WINDOWS)


def _order(problem: Problem) -> tuple[bool, str, int]:
    return problem.mark.line == 0, problem.mark.file, problem.mark.line


def _register_imports(node: Node | None, reader: Reader) -> None:
    """Make the users' modules known; they are found in the working and the config's folder."""
    if node is not None and isinstance(node.value, list):
        for item in node.value:
            if isinstance(item.value, str):
                _register_import(item.value, item.mark, reader)


def register(modules: Iterable[str]) -> None:
    """Make the parts of one's own modules known, as `imports` does; raises ConfigError."""
    reader = Reader()
    for module in modules:
        _register_import(module, Mark(layers.COMMAND_LINE, 0, f"--imports {module}"), reader)
    if reader.problems:
        raise ConfigError(reader.problems)


def _register_import(module: str, mark: Mark, reader: Reader) -> None:
    folders = [Path.cwd(), Path(mark.file).resolve().parent]
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        add_module(module)
    except ModuleNotFoundError as error:
        reader.unread = True
        near = suggest(module.rpartition(".")[2], (f.stem for d in folders for f in d.glob("*.py")))
        if "/" in module or module.endswith(".py"):
            dotted = ".".join(Path(module).with_suffix("").parts)
            near = f" Name it as Python does: {dotted.lstrip('.')}"
        sought = "on Python's path, in . and beside the config (PYTHONPATH adds folders)"
        message = f"{error}; it was sought {sought}.{near}"
        reader.report(mark, "imports", message)
    except SyntaxError as error:
        reader.unread = True
        place = Mark(short_path(error.filename or module), error.lineno or 0)
        reader.report(mark, "imports", f"{place}: {error.msg}")
    except ValueError as error:
        reader.report(mark, "imports", str(error))


def _plain(value: Any) -> Any:
    """Mappings, lists and scalars; parts become mappings with their name first."""
    if isinstance(value, Part):
        return {"name": value.name, **_plain(value.options)}
    if isinstance(value, Section):
        absent = value.absent if isinstance(value, Choice) else ()
        return {key: _plain(item) for key, item in dict(value).items() if key not in absent}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
