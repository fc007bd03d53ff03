"""Programs that keep the curves of many runs: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitdense.engine.checkpoint import write_text
from vitdense.engine.observers.base import Observer, Record, finite, numbers
from vitdense.engine.pictures import picture_path

PATIENCE = 60.0
"""Seconds that the end of a run waits for a network."""

PROJECT = "vitdense"
"""Of Weights & Biases, experiment of MLflow, unless their environment variables name another."""


class TensorBoard(Observer):
    """Curves for TensorBoard in the run's folder."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = "no curves for TensorBoard; install it by `pip install 'vitdense[log]'`"
            raise ImportError(message) from error
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, record: Record) -> None:
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class Background(Observer):
    """Tells another observer everything in a thread of its own: a network holds up no training.

    The first failure is raised by the call that comes next. The end of the run waits for what is
    not told yet, but not for ever.

    Args:
        member: `start` is called before all else; this and its other methods may block.
    """

    def __init__(self, member: Tracker, patience: float = PATIENCE) -> None:
        self.member, self.patience = member, patience
        self._failure: Exception | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calls.put(member.start)
        self._thread = threading.Thread(target=self._work, name=str(member), daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return str(self.member)

    def log(self, record: Record) -> None:
        self._tell(partial(self.member.log, record))

    def finish(self, results: Record) -> None:
        self._tell(partial(self.member.finish, results))

    def close(self) -> None:
        self._tell(self.member.close)
        self._calls.put(None)
        self._thread.join(self.patience)
        if self._thread.is_alive():
            raise TimeoutError(f"it did not take everything within {self.patience:g} s")
        self._tell(None)

    def _tell(self, call: Callable[[], None] | None) -> None:
        if self._failure is not None:
            raise self._failure
        self._calls.put(call)

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:
                self._failure = error
                return


class Tracker(Observer):
    """An observer in a network, which knows the run by an id that outlives the process.

    Args:
        folder: of the run; the id is kept there.
        name: of the run.
        settings: the resolved config, as nested mappings.
        step: what is resumed from; 0 makes a new run.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], step: int = 0) -> None:
        self.folder, self.name, self.settings = folder, name, settings
        self.path = folder / f"{type(self).__name__.lower()}.id"
        self.id = self.path.read_text().strip() if step and self.path.exists() else None
        self.complete = False

    def start(self) -> None:
        """Reach the server and tell it of the run; may block."""

    def keep(self, identity: str) -> None:
        """Remember the run's id for a resumption."""
        self.id = identity
        write_text(self.path, identity + "\n")


class Wandb(Tracker):
    """Curves, config, pictures and results on Weights & Biases.

    Its own environment variables and settings say where and how: WANDB_PROJECT, WANDB_ENTITY,
    WANDB_MODE, ... Without a key it would ask for one; here it then keeps the run in the folder,
    to be sent by `wandb sync`.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], step: int = 0) -> None:
        try:
            import wandb
        except ImportError as error:
            message = "no Weights & Biases; install it by `pip install 'vitdense[wandb]'`"
            raise ImportError(message) from error
        super().__init__(folder, name, settings, step)
        # its exit hook waits too, where nothing has been sent
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{PATIENCE:g}")
        self.wandb: Any = wandb

    def start(self) -> None:
        theirs = self.wandb.setup().settings
        offline = theirs.mode == "online" and not _has_key(theirs)
        if offline:
            print(
                f"Weights & Biases: nobody is logged in; the run is kept in {self.folder / 'wandb'}"
                ", `wandb sync` sends it",
                file=sys.stderr,
            )
        self.keep(self.id or theirs.run_id or secrets.token_hex(4))
        self.run = self.wandb.init(
            project=theirs.project or PROJECT,
            name=theirs.run_name or self.name,
            id=self.id,
            resume="allow",
            dir=str(self.folder),
            config=self.settings,
            allow_val_change=True,
            mode="offline" if offline else None,
        )

    def log(self, record: Record) -> None:
        values: dict[str, Any] = dict(numbers(record))
        picture = picture_path(self.folder, record["step"])
        if record["kind"] == "evaluation" and picture.exists():
            values["predictions"] = self.wandb.Image(str(picture))
        self.run.log(values, step=record["step"])

    def finish(self, results: Record) -> None:
        self.run.summary.update(finite(results))
        self.complete = True

    def close(self) -> None:
        self.run.finish(exit_code=0 if self.complete else 1)


def _has_key(settings: Any) -> bool:
    """Whether Weights & Biases can log in without asking."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    host = urlsplit(settings.base_url).hostname or ""
    given = os.environ.get("NETRC")
    for path in [given] if given else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, NetrcParseError):
            if netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False


class Mlflow(Tracker):
    """Curves, config and results in MLflow, where MLFLOW_TRACKING_URI says."""

    METRICS, PARAMETERS, LENGTH = 1000, 100, 500
    """Of one request: metrics, parameters; and letters of a parameter."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], step: int = 0) -> None:
        try:
            import mlflow
        except ImportError as error:
            message = "no MLflow; install it by `pip install 'vitdense[mlflow]'`"
            raise ImportError(message) from error
        super().__init__(folder, name, settings, step)
        self.mlflow: Any = mlflow

    def start(self) -> None:
        self.client = self.mlflow.MlflowClient()
        if self.id is not None:
            self.client.update_run(self.id, status="RUNNING")
            return
        run = self.client.create_run(self._experiment(), run_name=self.name)
        self.keep(run.info.run_id)
        parameter = self.mlflow.entities.Param
        values = [
            parameter(_clean(key), str(value)[: self.LENGTH])
            for key, value in flatten(self.settings)
        ]
        for chunk in _chunks(values, self.PARAMETERS):
            self.client.log_batch(self.id, params=chunk)

    def _experiment(self) -> str:
        if identity := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        return known.experiment_id if known is not None else self.client.create_experiment(name)

    def log(self, record: Record) -> None:
        self._log(numbers(record), record["step"])

    def finish(self, results: Record) -> None:
        self._log(numbers({"kind": "results", **results}), results["steps"])
        self.complete = True

    def _log(self, values: dict[str, float], step: int) -> None:
        now, metric = round(1000 * time.time()), self.mlflow.entities.Metric
        metrics = [metric(_clean(key), float(value), now, step) for key, value in values.items()]
        for chunk in _chunks(metrics, self.METRICS):
            self.client.log_batch(self.id, metrics=chunk)

    def close(self) -> None:
        self.client.set_terminated(self.id, "FINISHED" if self.complete else "KILLED")


def _clean(name: str) -> str:
    """A name as MLflow takes it: `evaluation/AP.person _left_`.

    Its store in files has a file or a folder for `evaluation/AP`, not both.
    """
    kind, slash, rest = name.partition("/")
    return re.sub(r"[^\w\-. /]", "_", kind + slash + rest.replace("/", "."))


def _chunks(values: list[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        yield chunk


def flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of dotted keys and values."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
