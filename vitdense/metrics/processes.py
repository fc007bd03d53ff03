"""What distributed processes tell each other about the images that they have scored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitdense.metrics.matching import Matches


def gather(value: Any) -> list[Any]:
    """Everyone's value, by rank; of a single process, its own."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share(ids: list[int | str]) -> list[int]:
    """The place of each of these images among those of all processes, by their ids.

    It is -1 if a process of lower rank has the image too, as padded samplers send it. The order
    decides between equal scores, so it must not depend on how images were spread.
    """
    shares = gather(ids)
    everything = {image_id for share in shares for image_id in share}
    ordered = sorted(everything, key=lambda image_id: (isinstance(image_id, str), image_id))
    places = {image_id: place for place, image_id in enumerate(ordered)}
    rank = dist.get_rank() if len(shares) > 1 else 0
    taken = {image_id for share in shares[:rank] for image_id in share}
    return [-1 if image_id in taken else places[image_id] for image_id in ids]


def gather_matches(matches: Matches) -> Matches:
    """The matches of all processes, by image: 56 bytes a detection."""
    columns = {field.name: getattr(matches, field.name) for field in fields(matches)}
    shares = gather({name: column.cpu() for name, column in columns.items()})
    if len(shares) == 1:
        return matches
    positives = torch.stack([share.pop("positives") for share in shares]).sum(0)
    joined = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    order = joined["images"].argsort(stable=True)
    by_image = {name: column[order] for name, column in joined.items()} | {"positives": positives}
    device = matches.scores.device
    return Matches(**{name: column.to(device) for name, column in by_image.items()})


def sum_over_processes(counts: Tensor) -> Tensor:
    """Everyone's counts added up; of a single process, its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = counts.to(device, copy=True)
    dist.all_reduce(total)
    return total
