"""Quality against minutes: ours and peers trained from scratch for the same wall time, one by one.

    python -m benchmarks.convergence --data bccd=../shared/data/bccd shapes=data/shapes/... \
        --peers ../shared/bench/train_detection_peers.py --minutes 10 20 --out runs/convergence
    python -m benchmarks.convergence --task segmentation --data aerial=../shared/data/aerial_dubai \
        --peers ../shared/bench/train_segmentation_peers.py --out runs/convergence_segmentation

Every run is a process of its own with the same number of threads and its own whole schedule, at
the same image size and batch size; evaluation is not counted. A finished run is not repeated, so
the command can be stopped and given again. Results are lines of OUT/results.jsonl, of which
OUT/convergence.md and OUT/convergence.png are made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYRAMID = "model.neck={name: simple_feature_pyramid, channels: 128, scales: [2, 1, 0.5]}"


@dataclass(frozen=True, slots=True)
class Contest:
    """Who takes part, and in what.

    Attributes:
        config: of ours; what each of ours changes in it is in `ours`, by name.
        peers: as the peers' script calls them.
        numbers: of `results.json` and of the script's line; the first is plotted.
    """

    config: str
    ours: dict[str, list[str]]
    peers: list[str]
    numbers: tuple[str, str]


CONTESTS = {
    "detection": Contest(
        "configs/finetune/detection.yaml",
        {
            "ours, PVTv2-B0": [],
            "ours, plain ViT-Ti": [
                "model.backbone={name: timm, model: vit_tiny_patch16_224, img_size: 320, "
                "options: {depth: 6}}",
                PYRAMID,
            ],
            "ours, plain ViT-Ti, convolutional stem": [
                "model.backbone={name: timm, model: vit_tiny_r_s16_p8_224, img_size: 320, "
                "options: {depth: 6, patch_size: 4}}",
                PYRAMID,
            ],
            "ours, plain XCiT-N": [
                "model.backbone={name: timm, model: xcit_nano_12_p16_224}",
                PYRAMID,
            ],
        },
        ["tv_fasterrcnn", "hf_rtdetrv2", "hf_deformable", "hf_rfdetr"],
        ("AP", "AP50"),
    ),
    "segmentation": Contest(
        "configs/finetune/segmentation.yaml",
        {
            "ours, MobileNetV4-S": [],
            "ours, PVTv2-B0": ["model.backbone={name: timm, model: pvt_v2_b0}"],
            "ours, plain XCiT-N": ["model.backbone={name: timm, model: xcit_nano_12_p16_224}"],
        },
        ["smp_unet", "smp_deeplabv3plus", "hf_segformer"],
        ("mIoU", "aAcc"),
    ),
}

# the peers' script sets its own number of threads
DRIVER = (
    "import runpy, sys, torch; torch.set_num_threads(int(sys.argv[1])); "
    "torch.set_num_threads = lambda n: None; sys.argv = sys.argv[2:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def splits(root: Path) -> tuple[str, str]:
    """The names of the splits: ADE20K's or COCO's."""
    ade20k = (root / "images" / "training").is_dir()
    return ("training", "validation") if ade20k else ("train", "val")


def counted_from_1(root: Path, folder: Path) -> Path:
    """The set, or a copy in `folder` whose labels are ADE20K's, as ours and the peers expect.

    There 0 is no class but what is ignored; `shapes` counts its classes from 0.
    """
    import numpy as np
    from PIL import Image

    text = json.loads((root / "classes.json").read_text())
    if all(each["id"] for each in text["classes"]):
        return root
    copy = folder / root.name
    for split in splits(root):
        (copy / "annotations" / split).mkdir(parents=True, exist_ok=True)
        for path in sorted((root / "annotations" / split).glob("*.png")):
            labels = np.asarray(Image.open(path)) + np.uint8(1)
            Image.fromarray(labels).save(copy / "annotations" / split / path.name)
    if not (copy / "images").exists():
        (copy / "images").symlink_to((root / "images").resolve())
    classes = [{**each, "id": each["id"] + 1} for each in text["classes"]]
    (copy / "classes.json").write_text(json.dumps({"classes": classes}))
    return copy


def train_ours(
    contest: Contest, name: str, root: Path, minutes: float, folder: Path
) -> dict[str, Any]:
    """One run of ours; returns what `results.json` says."""
    output = folder / f"{name}-{root.name}-{minutes:g}".replace(" ", "").replace(",", "-")
    train, val = splits(root)
    run(
        [sys.executable, "tools/train.py", contest.config, *contest.ours[name],
         f"data.root={root}", f"data.train={train}", f"data.val={val}", "data.workers=0",
         f"train.minutes={minutes}", "train.evaluations=1", f"output={output}"],
        output.with_suffix(".log"),
    )  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    batch = 4
    numbers = {number: results[number] for number in contest.numbers}
    return {**numbers, "steps": results["step"], "images": results["step"] * batch}


def train_peer(
    contest: Contest, name: str, root: Path, minutes: float, folder: Path, script: Path,
    threads: int,
) -> dict[str, Any]:  # fmt: skip
    """One run of a peer; returns the line that its script prints."""
    train, val = splits(root)
    named = (
        ["--train", train, "--val", val] if train == "train" and "mIoU" in contest.numbers else []
    )
    log = folder / f"{name}-{root.name}-{minutes:g}.log"
    printed = run(
        [sys.executable, "-c", DRIVER, str(threads), str(script), name, str(root),
         str(round(minutes * 60)), *named],
        log,
    )  # fmt: skip
    line = json.loads(printed.strip().splitlines()[-1])
    return {key: line[key] for key in (*contest.numbers, "steps", "images")}


def run(command: list[str], log: Path) -> str:
    """Standard output of a command; what it says besides goes into `log`."""
    with log.open("w") as file:
        return subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=file, text=True
        ).stdout


def table(contest: Contest, results: list[dict[str, Any]]) -> str:
    """The results as markdown: a row for each model, a column for each data set and time."""
    columns = sorted({(r["data"], r["minutes"]) for r in results})
    found = {(r["model"], r["data"], r["minutes"]): r for r in results}
    head = ["model", *(f"{data}, {minutes:g} min" for data, minutes in columns)]
    lines = [head, ["---"] * len(head)]
    first, second = contest.numbers
    for model in [*contest.ours, *contest.peers]:
        cells = [found.get((model, *column)) for column in columns]
        if any(cells):
            texts = [
                f"{first} {r[first]:.3f}, {second} {r[second]:.3f} ({r['images']} images)"
                if r
                else ""
                for r in cells
            ]
            lines.append([model, *texts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(contest: Contest, results: list[dict[str, Any]], path: Path) -> None:
    """The first number against minutes, a panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    number = contest.numbers[0]
    names = sorted({r["data"] for r in results})
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(6 * len(names) + 2, 4), squeeze=False, layout="constrained"
    )
    for axis, data in zip(axes[0], names, strict=True):
        for index, model in enumerate([*contest.ours, *contest.peers]):
            points = sorted(
                (r["minutes"], r[number])
                for r in results
                if (r["model"], r["data"]) == (model, data)
            )
            if points:
                style = "o-" if model in contest.ours else "s--"
                axis.plot(*zip(*points, strict=True), style, color=f"C{index}", label=model)
        axis.set(title=data, xlabel="minutes of training, one thread", ylabel=number)
        axis.set_ylim(0, 1.05 * axis.dataLim.y1)
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=CONTESTS, default="detection")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=ROOT")
    parser.add_argument("--peers", type=Path, help="the peers' training script; none: ours alone")
    parser.add_argument("--minutes", nargs="+", type=float, default=[10.0, 20.0])
    parser.add_argument("--models", nargs="+", help="some of those that take part; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    options = parser.parse_args()
    contest = CONTESTS[options.task]
    models = [*contest.ours, *contest.peers]
    if unknown := set(options.models or []) - set(models):
        parser.error(f"no model {sorted(unknown)[0]!r}; there are {', '.join(models)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["model"], r["data"], r["minutes"]) for r in results}
    for minutes in options.minutes:
        for name, _, root in (text.partition("=") for text in options.data):
            for model in options.models or models:
                peer = model in contest.peers
                if (model, name, minutes) in done or (peer and not options.peers):
                    continue
                print(f"{name}, {minutes:g} min: {model}", flush=True)
                where = Path(root)
                if options.task == "segmentation":
                    where = counted_from_1(where, options.out)
                place = where, minutes, options.out
                if peer:
                    found = train_peer(contest, model, *place, options.peers, options.threads)
                else:
                    found = train_ours(contest, model, *place)
                results.append({"model": model, "data": name, "minutes": minutes, **found})
                with file.open("a") as lines:
                    lines.write(json.dumps(results[-1]) + "\n")
    text = table(contest, results)
    (options.out / "convergence.md").write_text(text)
    plot(contest, results, options.out / "convergence.png")
    print(text)


if __name__ == "__main__":
    main()
