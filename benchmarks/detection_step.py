"""Where a training step of a detection head spends its time, beside transformers' Deformable DETR.

    python benchmarks/detection_step.py --width 96 --size 320 --batch 8

The features are given, so this is the head alone. Both heads have the same layers and read the
same maps; transformers leaves the first stage untrained, so its loss does less. The runs are
interleaved and their medians compared; times are those of the process on CPU (other processes do
not count) and of the wall clock on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_detr import DeformableDetrHead
from vitdense.losses import set_criterion
from vitdense.losses.matcher import match
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Level, Target

STRIDES = (8, 16, 32)


class Clock:
    """Seconds by name; one list for each part of a step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, function: Callable, *args: object) -> object:
        start = self.now()
        result = function(*args)
        self.seconds[name].append(self.now() - start)
        return result

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def make_targets(count: int, objects: int, size: int, device: str) -> list[Target]:
    start = torch.rand(count, objects, 2) * size * 0.7
    boxes = torch.cat((start, start + 8 + torch.rand(count, objects, 2) * size * 0.2), -1)
    labels = torch.randint(80, (count, objects))
    return [Target(labels=x, boxes=b).to(device) for x, b in zip(labels, boxes, strict=True)]


def make_peer(options: argparse.Namespace) -> nn.Module:
    """transformers' head of the same shape, which reads `features` set on its backbone."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    class Given(nn.Module):
        features: list[Tensor]

        def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
            ones = [x.new_ones(len(x), *x.shape[-2:], dtype=torch.bool) for x in self.features]
            return list(zip(self.features, ones, strict=True))

    backbone = ResNetConfig(
        hidden_sizes=[options.width] * 4,
        depths=[1] * 4,
        out_features=["stage2", "stage3", "stage4"],
    )
    peer = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=backbone,
            d_model=options.width,
            num_labels=80,
            num_feature_levels=3,
            encoder_layers=options.encoder_layers,
            decoder_layers=options.decoder_layers,
            encoder_attention_heads=options.heads,
            decoder_attention_heads=options.heads,
            encoder_ffn_dim=options.ffn,
            decoder_ffn_dim=options.ffn,
            dropout=0.0,
            two_stage=True,
            with_box_refine=True,
            two_stage_num_proposals=options.queries,
            auxiliary_loss=True,
            class_cost=2,
        )  # fmt: skip
    )
    peer.model.backbone = Given()
    return peer.to(options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = dict(width=96, heads=6, ffn=256, encoder_layers=2, decoder_layers=3, queries=100)
    for name, value in (numbers | dict(size=320, batch=8, objects=10, steps=10)).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {name: getattr(options, name) for name in numbers}
    levels = [Level(options.width, stride) for stride in STRIDES]
    head = DeformableDetrHead(levels, 80, num_levels=3, dropout=0.0, **shape).to(options.device)
    peer = make_peer(options)
    sides = [options.size // stride for stride in STRIDES]
    features = [
        torch.randn(options.batch, options.width, side, side, device=options.device)
        for side in sides
    ]
    images = torch.zeros(options.batch, 3, options.size, options.size, device=options.device)
    peer.model.backbone.features = features
    targets = make_targets(options.batch, options.objects, options.size, options.device)
    canvas = (options.size, options.size)
    labels = [
        {"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes, canvas)} for t in targets
    ]
    clock = Clock(options.device)
    set_criterion.match = lambda *args: clock.time("  of it assignment", match, *args)
    for step in range(options.steps + 2):
        if step == 2:  # two to warm up
            clock.seconds.clear()
        outputs = clock.time("forward", head, features)
        total = sum(clock.time("loss", head.loss, outputs, targets).values())
        clock.time("backward", total.backward)
        loss = clock.time("transformers forward and loss", lambda: peer(images, labels=labels).loss)
        clock.time("transformers backward", loss.backward)
    medians = {name: statistics.median(values) * 1e3 for name, values in clock.seconds.items()}
    for name, value in medians.items():
        print(f"{name:32}{value:8.1f} ms")
    ours = medians["forward"] + medians["loss"] + medians["backward"]
    theirs = medians["transformers forward and loss"] + medians["transformers backward"]
    print(f"step {ours:.1f} ms, transformers {theirs:.1f} ms: {theirs / ours:.2f} times as long")


if __name__ == "__main__":
    main()
