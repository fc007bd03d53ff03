"""What distributed processes tell each other about the images that they have scored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitdense.metrics.matching import Matches
from vitdense.ops.processes import world_size

WAITING = 64
"""Images whose counts are searched together for those that are not 0; that waits for the device."""

MOST_CELLS = 1 << 22
"""Counts that wait for it: fewer images where the tables are of very many classes."""


def gather(value: Any) -> list[Any]:
    """Everyone's value, by rank; of a single process, its own."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
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
    """The matches of all processes, by image: 48 bytes a detection."""
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
    if world_size() == 1:
        return counts
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = counts.to(device, copy=True)
    dist.all_reduce(total)
    return total


class ImageSums:
    """A sum of tables of counts, one of each image, in which every image counts once.

    Where several processes have an image, as padded samplers send it, it counts in that of lowest
    rank. So that the others can take it out again, each process of several keeps what its images
    added: the cells that are not 0.

    Attributes:
        total: over the images of this process, on the device of the latest counts.
    """

    def __init__(self, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        self.total = torch.zeros(shape, dtype=dtype)
        self._images = 0
        self._waiting: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, counts: Tensor) -> None:
        """Add the tables [B, ...] of the next images."""
        self.total = self.total.to(counts.device)
        self.total += counts.sum(0)
        self._images += len(counts)
        if world_size() > 1:
            self._waiting.append(counts)
            cells = sum(its.numel() for its in self._waiting)
            if sum(map(len, self._waiting)) >= WAITING or cells >= MOST_CELLS:
                self._keep()

    def _keep(self) -> None:
        counts = torch.cat(self._waiting).flatten(1)
        rows, cells = counts.nonzero(as_tuple=True)
        self._kept.append((rows + self._images - len(counts), cells, counts[rows, cells]))
        self._waiting = []

    def of_all(self, places: list[int]) -> Tensor:
        """The sum over the images of all processes.

        Args:
            places: of this process's images, as `share` gives them.
        """
        total = self.total.clone()
        if min(places, default=0) < 0:
            if self._waiting:
                self._keep()
            foreign = torch.tensor(places, device=total.device) < 0
            for rows, cells, values in self._kept:
                values = values.where(foreign[rows.to(total.device)], 0)
                total.view(-1).index_add_(0, cells.to(total.device), -values)
        return sum_over_processes(total)
