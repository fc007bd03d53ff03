"""The folder of a run before it starts: what it holds, and whether it can be written."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitdense import config as configs
from vitdense.config import Config
from vitdense.engine.changes import NOTHING, Change, changes, table
from vitdense.engine.observers import describe
from vitdense.engine.runtime import Runtime
from vitdense.engine.states import States, entries_in


def prepare(config: Config, resume: bool, runtime: Runtime) -> dict[str, Any] | None:
    """Check the folder, say what a resumed run starts from; returns the results if it is finished.

    Raises:
        ValueError: the folder cannot be written, or holds a run that is not to be resumed.
    """
    outcome: Any = None
    if runtime.is_main:
        try:
            outcome = results(config) if resume else None
            if outcome is None:
                check(config.output, resume)
                States(config.output / "checkpoints").clean()
                if resume:
                    tell(config)
            else:
                tell_results(config, outcome)
        except Exception as error:  # the others wait to be told
            outcome = error
    outcome = runtime.agree(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    found: dict[str, Any] | None = outcome
    return found


def check(folder: Path, resume: bool) -> None:
    """Refuse to overwrite a run, and to write where that is impossible; raises ValueError."""
    kept = [*entries_in(folder / "checkpoints"), *folder.glob("results.json")]
    if kept and not resume:
        raise ValueError(
            f"output: {folder} already holds a run ({kept[-1].relative_to(folder)}); continue it "
            f"with --resume, or write elsewhere with output={folder}-2"
        )
    place = folder / "checkpoints"
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"output: {folder} cannot be written: {error.strerror}; make it writable, or write "
            "elsewhere with output=another/folder"
        ) from error


def results(config: Config) -> dict[str, Any] | None:
    """The results of a run that is finished, unless the config wants something else of it.

    Raises:
        ValueError: it wants more, and the checkpoints to go on from are gone.
    """
    folder = config.output
    if not (folder / "results.json").exists() or not (folder / "config.yaml").exists():
        return None
    if all(change.effect == NOTHING for change in changes_of(config)):
        found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return found
    if not entries_in(folder / "checkpoints"):
        raise ValueError(
            f"output: {folder} holds a finished run without its checkpoints, which cannot go on; "
            f"start from its model, by train.init={folder}/model.safetensors output={folder}-2"
        )
    return None


def tell_results(config: Config, found: dict[str, Any]) -> None:
    """Say that there is nothing to do, and what there is."""
    numbers = describe({"kind": "evaluation", **found})
    print(f"{config.output}: is finished, there is nothing to do: {numbers}", file=sys.stderr)


def tell(config: Config) -> None:
    """Say what a resumed run starts from, and what of its config has changed."""
    folder = config.output
    if not (folder / "config.yaml").exists():
        print(f"{folder}: holds no run to resume; one starts here", file=sys.stderr)
    elif not entries_in(folder / "checkpoints"):
        print(f"{folder}: holds no checkpoint yet; starts from the beginning", file=sys.stderr)
    elif found := changes_of(config):
        print(f"{folder}: continues with a changed config:\n{table(found)}", file=sys.stderr)


def changes_of(config: Config) -> list[Change]:
    """What differs from the config that the run in the folder has had so far."""
    text = (config.output / "config.yaml").read_text(encoding="utf-8")
    return changes(text, configs.dump(config))
