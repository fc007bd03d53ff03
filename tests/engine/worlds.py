"""Starting a few processes that compute together, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib, sys
import torch
module, function, rank, world_size, folder = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(world_size)
)
from pathlib import Path
getattr(importlib.import_module(module), function)(int(rank), Path(folder))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_world(
    module: str, function: str, folder: Path, size: int = 2, timeout: float = 900
) -> None:
    """Call `function(rank, folder)` in `size` processes; fails with what they said if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, module, function, str(rank), str(size), str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    # what fails first breaks the others, so all of it is shown
    assert not failed, "\n".join(f"--- rank {rank}\n{said[rank][-4000:]}" for rank in failed)


def torchrun(*arguments: str, processes: int = 2, timeout: float = 300) -> subprocess.Popen[str]:
    """`vitdense` with these arguments in several processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "vitdense", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
