"""Which of several processes this one is, as torchrun, Slurm or nobody has started it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those of the run.

    Attributes:
        rank: 0..world_size-1.
        local_rank: among those of this machine; says which GPU is its own.
        world_size: how many there are.
        meeting: address (tcp://host:port) where they find each other; None = torchrun has said it
            in the environment.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    meeting: str | None = None


def read_launch(env: Mapping[str, str]) -> Launch:
    """What the environment says: torchrun's words go before Slurm's; none = one process alone.

    Under Slurm only what `srun` has started counts as several processes: the batch script itself,
    a shell of `salloc`, and commands in them run once.

    Raises:
        ValueError: the environment is incomplete or holds no numbers.
    """
    if "WORLD_SIZE" in env:
        world_size = _number(env, "WORLD_SIZE")
        if world_size == 1:
            return Launch()
        return Launch(_number(env, "RANK"), _number(env, "LOCAL_RANK", 0), world_size)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        world_size = _number(env, tasks, 1)
        if world_size > 1:
            ranks = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
            return Launch(*ranks, world_size, _meeting(env))
    return Launch()


def share_of_cores(rank: int, everyone: Sequence[tuple[str, set[int]]]) -> int:
    """Cores that a process has for itself: its own, divided by those that run on them too.

    Launchers may or may not bind each process to cores of its own, so all have to be asked.

    Args:
        everyone: of each process by rank, its machine and the cores that it may run on.
    """
    host, cores = everyone[rank]
    rivals = [it for it, theirs in everyone if it == host and not cores.isdisjoint(theirs)]
    return max(1, len(cores) // len(rivals))


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        found = f"is {env[name]!r}" if name in env else "is missing"
        raise ValueError(
            f"environment: {name} {found}; start several processes by torchrun or srun, which set "
            "it, or unset WORLD_SIZE to run one"
        ) from None


def _meeting(env: Mapping[str, str]) -> str:
    """MASTER_ADDR and MASTER_PORT; else the first machine of the job, and a port of its number."""
    host = env.get("MASTER_ADDR")
    if host is None:
        names = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
        host = first_host(names or env.get("SLURM_JOB_NODELIST", "localhost"))
    # jobs that share a machine must not meet each other
    port = 15000 + (_number(env, "SLURM_JOB_ID", 0) * 64 + _number(env, "SLURM_STEP_ID", 0)) % 40000
    return f"tcp://{host}:{_number(env, 'MASTER_PORT', port)}"


def first_host(names: str) -> str:
    """The first name in a list of Slurm's: `gpu[003-007,9],cpu1` -> `gpu003`.

    Lists with several brackets in a name are left to `scontrol`.
    """
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*)(?=,|$))?(?=,|$)", names)
    if found:
        return "".join(part or "" for part in found.groups())
    command = ["scontrol", "show", "hostnames", names]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return listed.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(
            f"environment: {names!r} names no first machine; set MASTER_ADDR to its name"
        ) from error
