"""What each part of the detection recipe brings: each turned off in turn, several seeds.

    python -m benchmarks.ablation --steps 400 --seeds 0 1 2 --out runs/ablation

At equal steps every variant trains for `--steps`; at equal time a variant whose step is cheaper
than the recipe's gets as many more steps as that saves (the cost of a step is measured first,
interleaved, in the process's own time, so other work on the machine does not count). A finished
run is not repeated. Results are lines of OUT/results.jsonl, of which OUT/ablation.md is made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG = "configs/demo/detection.yaml"
RECIPE = ["model.head.nms=null"]  # suppression would hide what a variant does wrong
LWDETR = "model.head={name: lwdetr, width: 96, heads: 4, cross_heads: 4, ffn: 256, queries: 50"
VARIANTS: dict[str, list[str]] = {
    "the recipe": [],
    "learned queries, no first stage": ["model.head.two_stage=false"],
    "first stage trained on all cells": ["model.head.train_all_cells=true"],
    "no denoising": ["model.head.denoising=0"],
    "varifocal loss": ["model.head.class_loss=varifocal"],
    "focal loss": ["model.head.class_loss=focal"],
    "no refinement between layers": ["model.head.box_refinement=false"],
    "no encoder attention": ["model.head.encoder_layers=0"],
    "no EMA": ["train.ema=null"],
    "with suppression": ["model.head.nms=0.7"],
    "lwdetr, 5 groups": [LWDETR + ", groups: 5, box_refinement: true}"],
    "lwdetr, 1 group": [LWDETR + ", groups: 1, box_refinement: true}"],
}
NEAR = 0.05
"""A step that costs nearly the same makes a run of equal time needless."""


def step_costs(variants: list[str], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of the process for forward, loss and backward of one batch, medians."""
    import torch

    from vitdense import config as configs
    from vitdense.engine import build

    torch.set_num_threads(1)
    prepared = {}
    for variant in variants:
        config = configs.load(CONFIG, [*RECIPE, *VARIANTS[variant]])
        data = build.build_data(config)
        model = build.build_model(config, data).train()
        samples = [data.train[i] for i in range(config.train.batch_size)]
        images = torch.stack([sample.image for sample in samples])
        prepared[variant] = model, images, [sample.target for sample in samples]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds + 1):
        for variant, (model, images, targets) in prepared.items():
            start = time.process_time()
            losses = model.loss(model(images, targets), targets)
            torch.stack(list(losses.values())).sum().backward()
            seconds[variant].append(time.process_time() - start)
    return {variant: statistics.median(each[1:]) * 1e3 for variant, each in seconds.items()}


def train(variant: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run; what `results.json` says."""
    output = folder / f"{variant}-{seed}-{steps}".replace(",", "").replace(" ", "-")
    command = [
        sys.executable, "tools/train.py", CONFIG, *RECIPE, *VARIANTS[variant], f"seed={seed}",
        "train.minutes=null", f"train.steps={steps}", "train.evaluations=1", "data.workers=0",
        f"output={output}",
    ]  # fmt: skip
    with output.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    results = json.loads((output / "results.json").read_text())
    return {"AP": results["AP"], "AP50": results["AP50"]}


def table(results: list[dict[str, Any]], costs: dict[str, float], steps: int) -> str:
    """Mean and standard deviation over the seeds, as markdown."""
    lines = [
        "| variant | step | AP, equal steps | AP50 | AP, equal time |",
        "|---|---|---|---|---|",
    ]

    def cell(variant: str, count: int, name: str = "AP") -> str:
        values = [r[name] for r in results if (r["variant"], r["steps"]) == (variant, count)]
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    whole = costs["the recipe"]
    for variant in VARIANTS:
        if variant in costs and cell(variant, steps):
            same_time = cell(variant, equal_time(variant, costs, steps))
            lines.append(
                f"| {variant} | {costs[variant] / whole:.2f} | {cell(variant, steps)} | "
                f"{cell(variant, steps, 'AP50')} | {same_time} |"
            )
    return "\n".join(lines) + "\n"


def equal_time(variant: str, costs: dict[str, float], steps: int) -> int:
    """Steps that cost as much as `steps` of the recipe."""
    ratio = costs["the recipe"] / costs[variant]
    return steps if abs(ratio - 1) < NEAR else round(steps * ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    costs_file, file = options.out / "costs.json", options.out / "results.jsonl"
    costs = json.loads(costs_file.read_text()) if costs_file.exists() else {}
    if set(options.variants) - set(costs):
        costs = step_costs(list(VARIANTS))
        costs_file.write_text(json.dumps(costs, indent=1))
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["variant"], r["seed"], r["steps"]) for r in results}
    for seed in options.seeds:
        for variant in options.variants:
            for steps in sorted({options.steps, equal_time(variant, costs, options.steps)}):
                if (variant, seed, steps) in done:
                    continue
                print(f"{variant}, seed {seed}, {steps} steps", flush=True)
                found = train(variant, seed, steps, options.out)
                results.append({"variant": variant, "seed": seed, "steps": steps, **found})
                with file.open("a") as lines:
                    lines.write(json.dumps(results[-1]) + "\n")
    text = table(results, costs, options.steps)
    (options.out / "ablation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
