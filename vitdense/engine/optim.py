"""The optimizer and its parameter groups."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from vitdense.models.base import Model
from vitdense.registry import suggest

POSITIONS = re.compile(r"pos_embed|position|rel_pos|relative_pos|level_embed|(cls|dist|reg)_token")
"""Names of parameters that say where something is, or stand for a token: they must not decay."""

FUSED = ("cpu", "cuda", "mps")


def build_optimizer(
    model: Model,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    backbone_scale: float = 1.0,
    layer_decay: float = 1.0,
    scales: Mapping[str, float] | None = None,
    name: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.9,
) -> Optimizer:
    """Over the parameter groups of `model`, in one fused kernel where the device has it.

    What would learn at a rate of 0 is frozen first: it costs no gradients and no memory of theirs,
    and a timm backbone all of which is frozen stays in evaluation mode.
    """
    freeze(model, backbone_scale, scales)
    groups = parameter_groups(model, weight_decay, backbone_scale, layer_decay, scales)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    device = next(model.parameters()).device
    fused = device.type in FUSED
    if name == "sgd":
        fused &= not isinstance(next(model.parameters()), DTensor)  # torch has no such kernel
        return SGD(groups, lr=lr, momentum=momentum, fused=fused)
    return AdamW(groups, lr=lr, betas=betas, fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give each group `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def parameter_groups(
    model: Model,
    weight_decay: float,
    backbone_scale: float = 1.0,
    layer_decay: float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay, each in exactly one group.

    Norms, biases, embeddings (of positions, queries, tokens, classes) and what
    `backbone.no_weight_decay()` names do not decay. The backbone learns at `backbone_scale`, its
    parameter at depth d of D at that times `layer_decay ** (D + 1 - d)` (BEiT, appendix; ELECTRA).
    Each of `scales` multiplies the rate of the parameters that it names by whole parts of their
    dotted names, as `offsets` or `head.decoder`.

    Returns:
        groups with `params`, `lr_scale` and `weight_decay`.

    Raises:
        ValueError: `layer_decay` is set for a backbone that knows no order of its layers, or one
            of `scales` names no parameter.
    """
    factors = _factors(model, backbone_scale, layer_decay, scales)
    exempt = {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    exempt |= {f"{n}.weight" for n, it in model.named_modules() if isinstance(it, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name not in exempt and _decays(name, parameter)
            key = factors.get(name, 1.0), weight_decay if decays else 0.0
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def freeze(
    model: Model, backbone_scale: float = 1.0, scales: Mapping[str, float] | None = None
) -> None:
    """Stop the gradients of the parameters whose scale is 0; raises ValueError as above."""
    factors = _factors(model, backbone_scale, 1.0, scales)
    for name, parameter in model.named_parameters():
        if factors.get(name, 1.0) == 0:
            parameter.requires_grad_(False)


def _factors(
    model: Model, backbone_scale: float, layer_decay: float, scales: Mapping[str, float] | None
) -> dict[str, float]:
    """Learning rates relative to `lr` by name, of all that have another one."""
    factors = dict(_backbone_scales(model, backbone_scale, layer_decay))
    for part, scale in (scales or {}).items():
        for name in _named(model, part):
            factors[name] = factors.get(name, 1.0) * scale
    return factors


def _named(model: Model, part: str) -> list[str]:
    """Parameters whose dotted names hold the part; raises ValueError if there is none."""
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if f".{part}." in f".{name}."]
    if not found:
        words = {word for name in names for word in name.split(".") if not word.isdigit()}
        raise ValueError(
            f"optimizer.scales: no parameter is called {part!r}.{suggest(part, sorted(words))} "
            f"Parts are {', '.join(sorted(words))}"
        )
    return found


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix or a kernel: norms, biases and gains are vectors."""
    return parameter.ndim > 1 and not name.endswith("bias") and not POSITIONS.search(name)


def _backbone_scales(
    model: Model, backbone_scale: float, layer_decay: float
) -> Iterator[tuple[str, float]]:
    names = [name for name, _ in model.backbone.named_parameters()]
    depths = model.backbone.layer_depths() if layer_decay != 1 else dict.fromkeys(names, 0)
    missing = [name for name in names if name not in depths]
    if missing:
        kind = type(model.backbone).__name__
        raise ValueError(
            f"optimizer.layer_decay: {kind} knows no depth of {missing[0]!r}; leave it at 1, or "
            "let layer_depths of the backbone tell it"
        )
    top = max(depths.values(), default=0) + 1
    for name in names:
        yield f"backbone.{name}", backbone_scale * layer_decay ** (top - depths[name])


def named_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What the optimizer remembers of each parameter, by the parameter's name."""
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: dict(kept) for parameter, kept in optimizer.state.items()}


def load_named_state(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Go on from `named_state`; rates and decays stay as they are, whatever they were then.

    A parameter without a state, as one that was frozen, starts anew.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[it] for group in optimizer.param_groups for it in group["params"]]
    kept = {index: state[name] for index, name in enumerate(order) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
    _lay_out(optimizer)


def _lay_out(optimizer: Optimizer) -> None:
    """Give what the optimizer remembers the memory layout of its parameters.

    Fused kernels walk through both as they lie, and a checkpoint may be of another layout.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            fits = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if fits and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def clip_gradients(model: nn.Module, limit: float | None) -> torch.Tensor:
    """Scale gradients down to a norm of `limit`, if any; returns the norm before, on the device."""
    if limit is None:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    else:
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
