"""The command line; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vitdense import __version__

USER_ERRORS = (
    ("vitdense.config.errors", "ConfigError"),
    ("vitdense.data.base", "DataError"),
    ("vitdense.engine.checkpoint", "CheckpointError"),
    ("vitdense.engine.tally", "NonFiniteLoss"),
)
"""Errors whose text is made for the user, and where they live."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for bad data, 2 for a bad config or call."""
    # Threads that wait must not spin for long: a loader's worker or another job wants the core.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as in `vitdense list | head`; keep Python from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not is_for_user(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if type(error).__name__ == "DataError" else 2
    return 0


def is_for_user(error: Exception) -> bool:
    """Whether its text says where, what, and what instead; all others are faults of ours."""
    known = [getattr(sys.modules[m], name) for m, name in USER_ERRORS if m in sys.modules]
    by_option = isinstance(error, ValueError) and re.match(r"[a-z_.]+: ", str(error))
    return isinstance(error, (*known, FileNotFoundError)) or bool(by_option)


def train(args: argparse.Namespace) -> None:
    """train a model from a config"""
    from vitdense import config

    checked = config.load(args.config, args.overrides)
    from vitdense.engine.train import train

    train(checked, resume=args.resume)


def evaluate(args: argparse.Namespace) -> None:
    """evaluate a model on its validation split"""
    from vitdense.inference.tools import evaluate

    evaluate(args.source, weights=args.weights, overrides=args.overrides, json_path=args.json)


def predict(args: argparse.Namespace) -> None:
    """run a model on images, write overlays and predictions"""
    from vitdense.inference.tools import predict

    predict(
        args.model,
        args.images,
        out=args.out,
        threshold=args.threshold,
        batch_size=args.batch_size,
        device=args.device,
    )


def check(args: argparse.Namespace) -> None:
    """build what a config says and try one real batch"""
    from vitdense import config

    checked = config.load(args.config, args.overrides)
    from vitdense.engine.check import check

    print(check(checked))


def list_(args: argparse.Namespace) -> None:
    """list the parts that a config can name"""
    from vitdense.config import catalog

    print(catalog.list_parts(args.kind))


def show(args: argparse.Namespace) -> None:
    """show the options of a part, or the keys of a section"""
    from vitdense.config import catalog

    print(catalog.show(args.what))


class Parser(argparse.ArgumentParser):
    """Argparse that suggests the near name and keeps it short."""

    def error(self, message: str) -> NoReturn:
        from vitdense.registry import suggest

        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            choices = [choice.strip(" '") for choice in found[2].split(",")]
            hint = suggest(found[1], choices)
            message = f"there is no command {found[1]!r}.{hint} Known: {', '.join(choices)}"
        self.exit(2, f"error: {message}\n{self.format_usage()}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of a command; `key=value` may stand before and after its options."""
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    stray = [word for word in extra if word.startswith("-") or "overrides" not in args]
    if stray:
        from vitdense.registry import suggest

        hint = suggest(stray[0], [f"--{name.replace('_', '-')}" for name in vars(args)])
        parser.error(f"unknown argument {stray[0]!r}.{hint}")
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
        ("eval", evaluate, _eval_arguments),
        ("predict", predict, _predict_arguments),
        ("check", check, _config_arguments),
        ("list", list_, _list_arguments),
        ("show", show, _show_arguments),
    ):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
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
    command.add_argument("--resume", action="store_true", help="continue the run in its folder")


def _eval_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="CONFIG_OR_MODEL", help="a config, or model.safetensors")
    _override_arguments(command)
    text = "model.safetensors to evaluate; by default the one in the config's run folder"
    command.add_argument("--weights", type=Path, metavar="FILE", help=text)
    command.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to this file")


def _predict_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="MODEL", help="model.safetensors of a run")
    command.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGES", help="image files and folders of images"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to"
    )
    text = "smallest score that is drawn (default %(default)s)"
    command.add_argument("--threshold", type=float, default=0.3, help=text)
    command.add_argument("--batch-size", type=int, default=1, help="images at a time")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def _list_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", nargs="?", help="backbone, neck, head, ...; by default all")


def _show_arguments(command: argparse.ArgumentParser) -> None:
    text = "a part as head.upernet, or a section as train"
    command.add_argument("what", metavar="KIND.NAME|SECTION", help=text)


if __name__ == "__main__":
    sys.exit(main())
