"""Levers of speed that leave the model's names and numbers alone: compilation and layout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vitdense.config import Config

MOST_VARIANTS = 32
"""Of compiled code, before torch gives up: a recipe may have phases (EoMT: two for each block)."""


def compile_calls(net: nn.Module, device: torch.device) -> None:
    """Let calls of `net` run compiled code; its parameters keep their names.

    A module that averages gradients is compiled as a whole: torch then cuts the code where they are
    sent, so that sending overlaps with computing. Sizes that change are left open from the second
    one on, so that several canvases and numbers of objects do not compile without end.

    Raises:
        ValueError: there is no compiler for this device.
    """
    check_compiler(device)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VARIANTS)
    for module in net.modules():
        # timm's check of the size is bound to each size that it sees; to pad by nothing is not
        if getattr(module, "dynamic_img_pad", None) is False:
            module.dynamic_img_pad = True  # type: ignore[assignment]
    net.compile()


def check_compiler(device: torch.device) -> None:
    """Compile a line to see whether that works here; raises ValueError if not."""
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: (x + 1).relu())(numbers)
    except Exception as error:  # torch's backends raise many kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"train.compile: does not work here on {device}; it needs a C++ compiler (Debian: apt "
            "install g++; another is named in CXX), on a GPU triton too, which comes with torch on "
            f"Linux. Leave it out, or repair this: {lines[0][:300]}"
        ) from error


def uncompiled(config: Config) -> AbstractContextManager[object]:
    """Inside, the model computes as it is written: evaluation, whose images have many sizes.

    So an evaluation in training has the numbers that `vitdense eval` has.
    """
    return torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
