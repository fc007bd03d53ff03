"""A run that is killed again and again ends like one that never was, bit for bit.

    python -m benchmarks.faults --kills 20 --out faults.json

For each variant a small run on `shapes` is killed by SIGKILL at random moments and resumed each
time. Some moments are drawn by time, others by what the run is doing: within a step, an
evaluation, the writing of a checkpoint, of the best model or of a log, while it resumes; one is a
SIGTERM that it may heed. Then weights, average, optimizer, best model, results and logs are
compared with those of a run that was left alone (times and memory aside). With two processes one of
them is killed, then the other. Each life is a fork of this process, which saves the time of
importing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vitdense import config as configs
from vitdense.config import Config
from vitdense.engine import checkpoint, train
from vitdense.engine.observers import JsonLines, read_records
from vitdense.engine.pictures import Pictures
from vitdense.engine.run import Run
from vitdense.engine.states import States
from vitdense.engine.stopping import Stopped

VARIANTS: dict[str, tuple[list[str], int]] = {
    "alone": (["data.workers=0"], 1),
    "2 workers": (["data.workers=2"], 1),
    "accumulate 2": (["data.workers=0", "train.accumulate=2"], 1),
    "2 processes": (["data.workers=0"], 2),
}
"""Overrides and number of processes."""

CONFIG = """
model:
  backbone:
    name: timm
    model: vit_tiny_patch16_224
    img_size: 32
    patch_size: 8
    options: {depth: 1, embed_dim: 16, num_heads: 2, drop_path_rate: 0.1}
  neck: {name: simple_feature_pyramid, channels: 16}
  head: {name: linear, norm: batch, dropout: 0.1}
data:
  dataset: {name: shapes, task: semantic, images: 24, size: 32}
  root: ROOT
  transforms: {name: segmentation, size: 32, crop: 32}
train: {batch_size: 2, ema: 0.9, checkpoint_every: 4, pictures: 1, observers: []}
optimizer: {lr: 1e-3}
output: OUT
device: cpu
"""

TIMES = {"images_per_second", "memory_gb", "seconds", "minutes"}
"""What two runs need not share."""

Kill = Callable[..., None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each variant")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--evaluations", type=int, default=10, help="of each run")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        total = len(options.variants) * options.kills
        with tqdm(total=total, unit="kill", disable=not sys.stderr.isatty()) as bar:
            for name in options.variants:
                bar.set_description(name)
                found[name] = compare(name, Path(folder), options, bar)
                print(json.dumps({name: found[name]}), flush=True)
    if options.out:
        given = {key: value for key, value in vars(options).items() if key != "out"}
        facts = {"torch": torch.__version__, "options": given, "variants": found}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(any(row["differences"] for row in found.values()))


def compare(name: str, folder: Path, options: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Kill runs of that variant so many times, and compare them with one that is left alone."""
    given, processes = VARIANTS[name]
    lengths = [f"train.steps={options.steps}", f"train.evaluations={options.evaluations}"]
    start, log = time.perf_counter(), folder / f"{name}.log"

    def config(output: str) -> Config:
        text = CONFIG.replace("ROOT", str(folder / "shapes"))
        text = text.replace("OUT", str(folder / name / output))
        return configs.loads(text, overrides=[*given, *lengths])

    whole = config("whole")
    check(live(whole, processes, log), log)
    rng, hit, found = random.Random(f"{options.seed} {name}"), Counter[str](), list[str]()
    runs = 0
    while kills_in(hit) < options.kills:
        runs += 1
        killed = config(f"killed-{runs}")
        kill(killed, processes, log, rng, options, hit, bar)
        check(live(killed, processes, log), log)
        found += differences(outcome(killed), outcome(whole))
    seconds = round(time.perf_counter() - start, 1)
    moments = dict(sorted(hit.items()))
    return {"kills": kills_in(hit), "moments": moments, "runs": runs, "differences": found,
            "seconds": seconds}  # fmt: skip


def kill(
    config: Config,
    processes: int,
    log: Path,
    rng: random.Random,
    options: argparse.Namespace,
    hit: Counter[str],
    bar: tqdm,
) -> None:
    """Begin and resume a run, which is killed each time, until it is done or that is enough."""
    moments: list[str] = []
    while kills_in(hit) < options.kills:
        moments = moments or rng.sample(options.moments, len(options.moments))
        moment = moments.pop()
        who = rng.randrange(processes) if moment in ANYWHERE else 0
        codes = live(config, processes, log, moment, rng.randrange(2**32), who)
        if not any(codes):  # the end came first
            return
        check([], log, codes[who])
        hit[moment] += 1
        bar.update(int(moment != "told"))


def kills_in(hit: Counter[str]) -> int:
    """How many of the moments were a SIGKILL."""
    return hit.total() - hit["told"]


def check(codes: list[int | None], log: Path, killed: int | None = -signal.SIGKILL) -> None:
    """Stop where a process failed on its own."""
    if any(codes) or killed not in (-signal.SIGKILL, Stopped.status):
        raise SystemExit(f"exit codes {codes}, {killed}\n{log.read_text()}")


def live(
    config: Config,
    processes: int,
    log: Path,
    moment: str | None = None,
    seed: int = 0,
    who: int = 0,
) -> list[int | None]:
    """Train until the end or until process number `who` is killed; returns the exit codes."""
    port = free_port() if processes > 1 else 0
    fork = multiprocessing.get_context("fork")
    members = []
    for rank in range(processes):
        mine = moment if rank == who else None
        member = fork.Process(target=life, args=(config, rank, processes, port, log, mine, seed))
        member.start()
        members.append(member)
    members[who].join()
    if members[who].exitcode:
        for member in members:  # as a launcher does
            member.kill()
    for member in members:
        member.join()
        with contextlib.suppress(ProcessLookupError):  # its workers
            os.killpg(member.pid or 0, signal.SIGKILL)
    return [member.exitcode for member in members]


def life(
    config: Config, rank: int, processes: int, port: int, log: Path, moment: str | None, seed: int
) -> None:
    """One process of a run."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes > 1:  # what torchrun says
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in here.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if moment is not None:
        rng = random.Random(seed)
        MOMENTS[moment](rng, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    try:
        train.train(config, resume=True)
    except Stopped as stopped:
        sys.exit(stopped.status)
    if processes > 1:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Let `act` see the arguments of a function each time before it is called."""
    original = getattr(owner, name)

    def replaced(*args: Any, **options: Any) -> Any:
        act(*args, **options)
        return original(*args, **options)

    setattr(owner, name, replaced)


def after(owner: Any, name: str, act: Callable[..., None]) -> None:
    """The same, when it has returned."""
    original = getattr(owner, name)

    def replaced(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        act(*args, **options)
        return result

    setattr(owner, name, replaced)


def countdown(count: int, kill: Callable[..., None]) -> Callable[..., None]:
    """Only the call of that number, from 1, goes through."""
    left = [count]

    def act(*args: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            kill(*args, **options)

    return act


def at_time(rng: random.Random, kill: Kill) -> None:
    """Some time after training has begun."""
    seconds = rng.uniform(0.01, 1.0)

    def begin(*args: Any) -> None:
        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()

    before(train, "loop", begin)


def in_step(rng: random.Random, kill: Kill) -> None:
    """When gradients are there and not yet used, or when the optimizer has used them."""
    act = countdown(rng.randint(2, 6), kill)
    if rng.random() < 0.5:
        before(train, "clip_gradients", act)
    else:
        after(train, "step", act)


def writing(rng: random.Random, kill: Kill) -> None:
    """When part of a checkpoint is on the disk."""
    share = rng.random()

    def tear(path: Path, state: Any) -> None:
        os.truncate(path, int(share * path.stat().st_size))
        kill()

    after(checkpoint, "write_state", countdown(rng.randint(1, 2), tear))


def moving(rng: random.Random, kill: Kill) -> None:
    """When a file is whole, and not yet in its place."""
    before(checkpoint, "_move", countdown(rng.randint(1, 5), kill))


def dropping(rng: random.Random, kill: Kill) -> None:
    """When a checkpoint is in its place, and older ones are not yet dropped."""
    before(States, "_drop", countdown(rng.randint(1, 2), kill))


def publishing(rng: random.Random, kill: Kill) -> None:
    """When the checkpoint of the best evaluation is whole, and the best model is not written."""
    before(Run, "publish", countdown(1, kill))


def evaluating(rng: random.Random, kill: Kill) -> None:
    """Within an evaluation."""
    before(Pictures, "watch", countdown(rng.randint(1, 3), kill))


def evaluated(rng: random.Random, kill: Kill) -> None:
    """When an evaluation is in the log, and no checkpoint knows of it."""
    after(Run, "evaluate", countdown(1, kill))


def logging(rng: random.Random, kill: Kill) -> None:
    """When half a line of the log is written."""

    def tear(self: JsonLines, record: Any) -> None:
        os.truncate(self.path, self.path.stat().st_size - rng.randint(1, 30))
        kill()

    after(JsonLines, "log", countdown(rng.randint(1, 3), tear))


def told(rng: random.Random, kill: Kill) -> None:
    """SIGTERM to the process and those that read images for it, as a scheduler sends it."""

    def terminate(*_: Any) -> None:
        os.killpg(0, signal.SIGTERM)

    before(train, "set_lr", countdown(rng.randint(2, 6), terminate))


def resuming(rng: random.Random, kill: Kill) -> None:
    """When a run has read its checkpoint, and its logs are being cut back to it."""
    before(JsonLines, "__init__", countdown(1, kill))


MOMENTS: dict[str, Callable[[random.Random, Kill], None]] = {
    it.__name__: it
    for it in (at_time, in_step, writing, moving, dropping, publishing)
    + (evaluating, evaluated, logging, resuming, told)
}
ANYWHERE = {"at_time", "in_step", "evaluating", "evaluated"}
"""What happens in each process; the main one does the others alone."""


def outcome(config: Config) -> dict[str, Any]:
    """All that a run leaves, times aside."""
    folder = config.output
    _, state = States(folder / "checkpoints").load()
    state["evaluated"] = state["evaluated"][:1]
    del state["elapsed"]
    meta = checkpoint.read_meta(folder / "model.safetensors")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = [timeless(record) for record in read_records(folder / "metrics.jsonl")]
    return {
        "state": state,
        "model": checkpoint.read_weights(folder / "model.safetensors"),
        "meta": {"step": meta.step, "metrics": meta.metrics},
        "results": timeless(results),
        "records": records,
    }


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Places where two nests of mappings, lists, tensors and numbers are not the same."""
    if type(ours) is not type(theirs):
        return [f"{place}: {ours!r:.80} for {theirs!r:.80}"]
    if isinstance(ours, dict):
        odd = [f"{place}.{key}: only in one" for key in ours.keys() ^ theirs.keys()]
        both = [key for key in ours if key in theirs]
        pairs = [(f"{place}.{key}", ours[key], theirs[key]) for key in both]
        return odd + [it for inner, a, b in pairs for it in differences(a, b, inner)]
    if isinstance(ours, list):
        lengths = [] if len(ours) == len(theirs) else [f"{place}: {len(ours)} for {len(theirs)}"]
        several = enumerate(zip(ours, theirs, strict=False))
        inner = [it for index, (a, b) in several for it in differences(a, b, f"{place}[{index}]")]
        return lengths + inner[:20]
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [f"{place}: other values"]
    return [] if ours == theirs else [f"{place}: {ours!r:.80} for {theirs!r:.80}"]


if __name__ == "__main__":
    sys.exit(main())
