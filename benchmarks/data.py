"""Milliseconds that one sample costs to decode and to augment, on one core.

    python benchmarks/data.py configs/finetune/detection.yaml data.root=../shared/data/bccd

Times are those of the process, the median over samples: other processes do not count. Each sample
is read once before, so that files are at hand, and images in a `data.cache=memory`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch

from vitdense.config import load
from vitdense.engine.build import build_data

T = TypeVar("T")


def main(path: str, overrides: list[str], samples: int = 60) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = build_data(load(path, overrides))
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[..., T], *args: object) -> T:
        start = time.process_time()
        result = function(*args)
        spent[name].append(1000 * (time.process_time() - start))
        return result

    for number in range(samples):
        data.train[number % len(data.train)]
    for number in range(samples):
        sample = timed("decode", data.train.__getitem__, number % len(data.train))
        timed("train", data.policy.train, sample)
        timed("evaluate", data.policy.evaluate, sample)
    print("  ".join(f"{name} {statistics.median(times):.1f} ms" for name, times in spent.items()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
