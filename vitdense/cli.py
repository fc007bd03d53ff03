"""The command line; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from vitdense import __version__

USER_ERRORS = (
    ("vitdense.config.errors", "ConfigError"),
    ("vitdense.data.base", "DataError"),
    ("vitdense.engine.checkpoint", "CheckpointError"),
    ("vitdense.engine.memory", "OutOfMemory"),
    ("vitdense.engine.peers", "FailedProcess"),
    ("vitdense.engine.peers", "LostProcess"),
    ("vitdense.engine.tally", "NonFiniteLoss"),
    ("vitdense.convert.source", "ConversionError"),
    ("torch", "OutOfMemoryError"),  # where a model does not even fit: it tells what takes how much
)
"""Errors whose text is made for the user, and where they live."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done; 1: bad data; 2: a bad config or call; 75: told to stop, go on with --resume.
    """
    # Threads that wait must not spin for long: a loader's worker or another job wants the core.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        args.run(args)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        if hasattr(error, "status"):  # which a launcher that now ends all must not change
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return getattr(error, "status", 130)
    except BrokenPipeError:
        # The reader has gone, as in `vitdense list | head`; keep Python from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not is_for_user(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        data = "DataError" in (kind.__name__ for kind in type(error).__mro__)
        return getattr(error, "status", 1 if data else 2)
    return 0


def is_for_user(error: Exception) -> bool:
    """Whether its text says where, what, and what instead; all others are faults of ours."""
    known = [getattr(sys.modules[m], name) for m, name in USER_ERRORS if m in sys.modules]
    # it begins with what is wrong: an option, or a file
    placed = isinstance(error, ValueError) and re.match(r"([a-z_.]+|\S+\.\w+): ", str(error))
    return isinstance(error, (*known, FileNotFoundError)) or bool(placed)


def train(args: argparse.Namespace) -> None:
    """train a model from a config"""
    from vitdense import config

    checked = config.load(args.config, args.overrides)
    from vitdense.engine.train import train

    train(checked, resume=args.resume)


def replay(args: argparse.Namespace) -> None:
    """rerun the step whose loss was not finite, and show where it breaks"""
    from vitdense.engine.replay import replay

    print(replay(args.folder, args.overrides))


def evaluate(args: argparse.Namespace) -> None:
    """evaluate a model on its validation split"""
    from vitdense.inference.tools import evaluate

    evaluate(args.source, weights=args.weights, overrides=args.overrides, json_path=args.json)


def predict(args: argparse.Namespace) -> None:
    """run a model on images, write overlays and predictions"""
    from vitdense.inference.tools import predict

    # Both are lists of words: an image is what does not set a key.
    words = [*map(str, args.images), *args.overrides]
    overrides = [word for word in words if re.match(r"\w+(\.\w+)+=", word)]
    predict(
        args.model,
        [Path(word) for word in words if word not in overrides],
        out=args.out,
        threshold=args.threshold,
        batch_size=args.batch_size,
        device=args.device,
        overrides=overrides,
    )


def score(args: argparse.Namespace) -> None:
    """evaluate prediction files of any program"""
    from vitdense.inference.score import score

    always = ("run", "parser", "kind", "truth", "predictions", "json")
    options = {name: value for name, value in vars(args).items() if name not in always}
    score(args.kind, args.truth, args.predictions, json_path=args.json, **options)


def convert(args: argparse.Namespace) -> None:
    """convert public weights into a vitdense model"""
    from vitdense.convert.conversion import convert

    print(convert(args.source, args.out, partial=args.partial))


def check(args: argparse.Namespace) -> None:
    """build everything in a config and try one real batch"""
    from vitdense import config

    checked = config.load(args.config, args.overrides)
    from vitdense.engine.check import check

    print(check(checked))


def list_(args: argparse.Namespace) -> None:
    """list the parts that a config can name"""
    from vitdense.config import catalog, loader

    loader.register(args.imports)
    print(catalog.list_parts(args.kind))


def show(args: argparse.Namespace) -> None:
    """show the options of a part, or the keys of a section"""
    from vitdense.config import catalog, loader

    loader.register(args.imports)
    print(catalog.show(args.what))


class Parser(argparse.ArgumentParser):
    """Argparse that suggests the near name and keeps it short."""

    def error(self, message: str) -> NoReturn:
        from vitdense.registry import suggest

        found = re.search(r"argument (.*): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            choices = [choice.strip(" '") for choice in found[3].split(",")]
            hint = suggest(found[2], choices)
            what = "there is no command" if found[1] == "COMMAND" else f"{found[1]} has no choice"
            message = f"{what} {found[2]!r}.{hint} Known: {', '.join(choices)}"
        message = message.replace(", key=value", "")  # it is never required
        self.exit(2, f"error: {message}\n{self.format_usage()}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of a command; `key=value` may stand before and after its options."""
    args, extra = build_parser().parse_known_args(argv)
    stray = [word for word in extra if word.startswith("-") or "overrides" not in args]
    if stray:
        from vitdense.registry import suggest

        word, value, _ = stray[0].partition("=")
        hint = suggest(word, re.findall(r"--[a-z-]+", args.parser.format_usage()))
        if not hint and value and "overrides" in args:
            hint = f" Keys have no dashes: {stray[0].lstrip('-')}"
        args.parser.error(f"unknown argument {stray[0]!r}.{hint}")
    if extra:
        args.overrides = [*args.overrides, *extra]
    return args


def build_parser() -> Parser:
    """All commands with their arguments."""
    parser = Parser(prog="vitdense", description="Dense prediction with any timm ViT or Swin.")
    parser.add_argument("--version", action="version", version=f"vitdense {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, add_arguments in (
        ("train", train, _train_arguments),
        ("replay", replay, _replay_arguments),
        ("eval", evaluate, _eval_arguments),
        ("predict", predict, _predict_arguments),
        ("score", score, _score_arguments),
        ("convert", convert, _convert_arguments),
        ("check", check, _config_arguments),
        ("list", list_, _list_arguments),
        ("show", show, _show_arguments),
    ):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, parser=command)
        add_arguments(command)
    return parser


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a config file (.yaml)")
    _override_arguments(command)


def _override_arguments(command: argparse.ArgumentParser) -> None:
    text = "override a key of the config, as train.steps=2000"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _train_arguments(command: argparse.ArgumentParser) -> None:
    _config_arguments(command)
    text = "continue the run in its folder; start it where there is none, leave it where it is done"
    command.add_argument("--resume", action="store_true", help=text)


def _replay_arguments(command: argparse.ArgumentParser) -> None:
    text = "folder of the run, or one under its faults/"
    command.add_argument("folder", type=Path, metavar="FOLDER", help=text)
    _override_arguments(command)


def _eval_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="CONFIG_OR_MODEL", help="a config, or model.safetensors")
    _override_arguments(command)
    text = "model.safetensors to evaluate; by default the one in the config's run folder"
    command.add_argument("--weights", type=Path, metavar="FILE", help=text)
    command.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to this file")


def _predict_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="MODEL", help="model.safetensors of a run")
    command.add_argument(
        "images", nargs="+", metavar="IMAGES", help="image files and folders of images"
    )
    text = "override a key of the model's config, as inference.window=512"
    command.add_argument("overrides", nargs="*", metavar="key=value", help=text)
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to"
    )
    text = "lowest score that is drawn (default %(default)s)"
    command.add_argument("--threshold", type=float, default=0.3, help=text)
    command.add_argument("--batch-size", type=int, default=1, help="images at a time")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def _score_arguments(command: argparse.ArgumentParser) -> None:
    kinds = ("bbox", "segm", "panoptic", "semantic", "voc", "lvis")
    command.add_argument("--kind", choices=kinds, required=True, help="what is compared")
    text = "annotation file of COCO or LVIS, or folder of label maps (semantic) or of VOC"
    command.add_argument("--truth", type=Path, required=True, metavar="T", help=text)
    text = "result file of COCO, or folder of label maps (semantic) or of VOC's detection files"
    command.add_argument("--predictions", type=Path, required=True, metavar="P", help=text)
    command.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to this file")
    group = command.add_argument_group("options of a kind")
    option = partial(group.add_argument, default=argparse.SUPPRESS)
    backends = ("auto", "device", "pycocotools", "hotcoco", "faster-coco-eval")
    text = "bbox, segm: who computes; all give the same (default auto)"
    option("--backend", choices=backends, help=text)
    text = "best detections of an image and class that count (100), for lvis of an image (300)"
    option("--max-detections", type=int, metavar="N", help=text)
    text = "lvis: what is compared; by default masks if the predictions have them"
    option("--iou-type", choices=("bbox", "segm"), help=text)
    option("--split", help="voc: the list of images in ImageSets/Main (default val)")
    text = "voc: overlap from which a detection is right (default 0.5)"
    option("--iou", type=float, help=text)
    text = "voc: average precision at 11 recalls, as until VOC2009, or at all (default)"
    option("--points", type=lambda it: 11 if it == "11" else it, choices=(11, "all"), help=text)
    text = "semantic, voc: class names; by default classes.json or .txt beside the truth or above"
    option("--classes", type=Path, metavar="FILE", help=text)
    text = "semantic: label of the first class where that file tells no labels; 1 = 0 is ignored "
    option("--first-label", type=int, choices=(0, 1), help=text + "(default 1)")
    text = (
        "semantic: labels of the true maps that count nowhere, beside 255, and 0 if it is no class"
    )
    option("--ignore", type=int, nargs="+", metavar="LABEL", help=text)
    text = "semantic: the maps are masks: above 0, in .jpg and .webp above 127, is the second class"
    option("--binary", action="store_true", help=text)
    text = "semantic: classes without pixels: leave out, or count as 0 (default skip)"
    option("--absent", choices=("skip", "zero"), help=text)


def _convert_arguments(command: argparse.ArgumentParser) -> None:
    text = "folder of transformers, .safetensors, .pth, .bin or .pkl file, or id on the hub"
    command.add_argument("source", metavar="SOURCE", help=text)
    text = "model.safetensors to write; a config to train from it is written beside it"
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help=text)
    text = "accept what is left over, and start what is missing from new values"
    command.add_argument("--partial", action="store_true", help=text)


def _list_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", nargs="?", help="backbone, neck, head, ...; by default all")
    _imports_argument(command)


def _show_arguments(command: argparse.ArgumentParser) -> None:
    text = "a part as head.upernet, a section as train, or a key as train.steps"
    command.add_argument("what", metavar="KIND.NAME|SECTION", help=text)
    _imports_argument(command)


def _imports_argument(command: argparse.ArgumentParser) -> None:
    text = "a module with parts of your own, as under imports in a config"
    command.add_argument("--imports", action="append", default=[], metavar="MODULE", help=text)


if __name__ == "__main__":
    sys.exit(main())
