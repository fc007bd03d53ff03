"""Time and memory of a plain ViT at high resolution: full attention against windows.

    python -m benchmarks.windows --sizes 512 768 1024 1536 --runs 3 --out windows.json

All variants have the same weights and run in one process, interleaved; medians are compared with
full attention's. Times are those of the process on CPU (other processes do not count) and of the
wall clock on a GPU. Memory is what autograd keeps for the backward pass; on a GPU also the peak.
`--matrices` computes attention by explicit matrices instead of torch's fused kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vitdense.backbones.timm import TimmBackbone

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "windows=2": {"windows": 2},
    "windows=4": {"windows": 4},
    "window_size=14": {"window_size": 14},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="0: memory only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--matrices", action="store_true", help="attention without fused kernels")
    parser.add_argument("--no-step", action="store_true", help="inference only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timm.layers.set_fused_attn(not options.matrices)
    backbones = {
        name: TimmBackbone(model=options.model, **variant).to(options.device)
        for name, variant in VARIANTS.items()
    }
    for backbone in backbones.values():
        backbone.load_state_dict(backbones["full"].state_dict())
    rows = []
    for size in options.sizes:
        rows += measure(backbones, size, options)
        print(*map(json.dumps, rows[-len(VARIANTS) :]), sep="\n", flush=True)
    if options.out:
        given = {name: value for name, value in vars(options).items() if name != "out"}
        facts = {"torch": torch.__version__, "timm": timm.__version__, **given}
        options.out.write_text(json.dumps({"options": facts, "rows": rows}, indent=1) + "\n")


def measure(
    backbones: dict[str, TimmBackbone], size: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per variant: medians, and how many times less than full attention."""
    images = torch.randn(options.batch, 3, size, size, device=options.device)
    kinds: dict[str, Callable] = {"forward_s": forward}
    if not options.no_step:
        kinds["step_s"] = step
    found: dict[str, dict[str, list[float]]] = {name: {} for name in backbones}
    for _ in range(options.runs):
        for name, backbone in backbones.items():
            for kind, run in kinds.items():
                found[name].setdefault(kind, []).append(seconds(run, backbone, images))
    rows: list[dict[str, Any]] = []
    for name, backbone in backbones.items():
        row = {kind: statistics.median(times) for kind, times in found[name].items()}
        row |= {} if options.no_step else memory(backbone, images)
        first = rows[0] if rows else row
        ratios = {f"{key}_ratio": first[key] / value for key, value in row.items()}
        rows.append({"size": size, "variant": name, **row, **ratios})
    return rows


def forward(backbone: TimmBackbone, images: Tensor) -> None:
    with torch.inference_mode():
        backbone.eval()(images)


def step(backbone: TimmBackbone, images: Tensor) -> None:
    sum(feature.square().mean() for feature in backbone.train()(images)).backward()


def seconds(run: Callable, *arguments: Any) -> float:
    gpu = arguments[-1].is_cuda
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    start = clock()
    run(*arguments)
    if gpu:
        torch.cuda.synchronize()
    return clock() - start


def memory(backbone: TimmBackbone, images: Tensor) -> dict[str, float]:
    """Bytes that one forward pass keeps for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = backbone.train()(images)
    found = {"kept_bytes": float(sum(size for at, size in kept.items() if at not in own))}
    if images.is_cuda:
        sum(feature.mean() for feature in maps).backward()
        found["peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


if __name__ == "__main__":
    main()
