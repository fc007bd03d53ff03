"""Each detection model beside the same one in transformers: a training step, and inference.

    python -m benchmarks.heads --size 320 --batch 2 --json heads.json

transformers' model is built with random weights, saved, and converted by `vitdense convert`; equal
outputs prove that both compute the same thing. All parameters are trained, without dropout, every
decoder layer by its own losses. A training step is forward, loss and backward; inference is forward
and post-processing. Runs are interleaved, and the ratio is that of the medians: of the process's
own time on a CPU (other processes do not count), of the wall clock on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from vitdense.convert.conversion import convert
from vitdense.engine.checkpoint import load_model
from vitdense.engine.runtime import autocast, to_float
from vitdense.ops.boxes import xyxy_to_relative
from vitdense.structures import Frame, Target

CLASSES = 80


def resnet18() -> Any:
    return hf.RTDetrResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
        layer_type="basic", out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def detr(size: int) -> nn.Module:
    config = hf.DetrConfig(
        backbone="resnet18", use_timm_backbone=True, use_pretrained_backbone=False,
        backbone_config=None, num_labels=CLASSES, encoder_layers=3, decoder_layers=3, dropout=0.0,
        auxiliary_loss=True,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def deformable_detr(size: int) -> nn.Module:
    config = hf.DeformableDetrConfig(
        backbone="resnet18", use_timm_backbone=True, use_pretrained_backbone=False,
        backbone_config=None, num_labels=CLASSES, encoder_layers=3, decoder_layers=3, dropout=0.0,
        two_stage=True, with_box_refine=True, auxiliary_loss=True, class_cost=2,
    )  # fmt: skip
    return hf.DeformableDetrForObjectDetection(config)


def rtdetr(size: int) -> nn.Module:
    config = hf.RTDetrV2Config(
        backbone_config=resnet18(), encoder_in_channels=[128, 256, 512], num_labels=CLASSES,
        decoder_layers=3, anchor_image_size=None,
    )  # fmt: skip
    return hf.RTDetrV2ForObjectDetection(config)


def lwdetr(size: int) -> nn.Module:
    backbone = hf.LwDetrViTConfig(
        image_size=size, pretrain_image_size=size, hidden_size=192, num_hidden_layers=6,
        num_attention_heads=12, window_block_indices=[0, 2, 4], out_indices=[2, 4, 6],
        num_windows=4,
    )  # fmt: skip
    config = hf.LwDetrConfig(
        backbone_config=backbone, projector_scale_factors=[1.0], num_labels=CLASSES, dropout=0.0
    )
    return hf.LwDetrForObjectDetection(config)


def rfdetr(size: int) -> nn.Module:
    backbone = hf.RfDetrDinov2Config(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, image_size=size,
        patch_size=16, num_windows=2, out_indices=[2, 4, 6],
    )  # fmt: skip
    config = hf.RfDetrConfig(backbone_config=backbone, num_labels=CLASSES, dropout=0.0)
    return hf.RfDetrForObjectDetection(config)


PEERS = {
    "detr": detr, "deformable_detr": deformable_detr, "rtdetr": rtdetr, "lwdetr": lwdetr,
    "rfdetr": rfdetr,
}  # fmt: skip


class Pair:
    """Our model and transformers', with what both eat."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device, self.precision = torch.device(options.device), options.precision
        self.theirs = spread(PEERS[name](options.size)).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.theirs.save_pretrained(folder)
            side = {"height": options.size, "width": options.size}
            self.processor = hf.RTDetrImageProcessor(size=side)
            self.processor.save_pretrained(folder)
            out = Path(folder) / "ours" / "model.safetensors"
            convert(folder, out)
            self.ours: Any = load_model(out)[0]
        self.ours.to(self.device), self.theirs.to(self.device)
        size = (options.size, options.size)
        shape = (options.batch, 3, *size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=self.device)
        self.pixels = self.ours.normalize(self.images)
        self.frames = [Frame(size, size, size)] * options.batch
        self.targets = make_targets(options.batch, options.objects, options.size, self.device)
        self.labels = [
            {"class_labels": t.labels, "boxes": xyxy_to_relative(t.boxes, size)}
            for t in self.targets
            if t.boxes is not None
        ]
        self.difference = self.compare()
        if options.compile:
            self.ours.compile(), self.theirs.compile()

    @torch.no_grad()
    def compare(self) -> float:
        """Largest distance of their boxes to the nearest of ours, in float64: one model, or not.

        Not in their order: each side breaks ties between cells as it likes.
        """
        self.train(False)
        ours, theirs = copy.deepcopy(self.ours).double(), copy.deepcopy(self.theirs).double()
        pixels = self.pixels.double()
        features = ours.backbone(pixels)
        found = ours.head(features if ours.neck is None else ours.neck(features))
        distances = torch.cdist(theirs(pixels).pred_boxes, found.boxes[-1].double(), p=torch.inf)
        return distances.amin(-1).max().item()

    def train(self, training: bool) -> None:
        self.ours.train(training), self.theirs.train(training)
        # where it trains earlier layers, transformers' DETR norms queries between layers too
        self.theirs.config.auxiliary_loss = training

    def our_step(self) -> None:
        self.ours.zero_grad()
        with autocast(self.device, self.precision):
            outputs = self.ours(self.images, self.targets)
        losses = self.ours.loss(to_float(outputs), self.targets)
        torch.stack(list(losses.values())).sum().backward()

    def their_step(self) -> None:
        self.theirs.zero_grad()
        with autocast(self.device, self.precision):
            loss = self.theirs(self.pixels, labels=self.labels).loss
        loss.backward()

    @torch.no_grad()
    def our_inference(self) -> None:
        with autocast(self.device, self.precision):
            outputs = self.ours(self.images)
        self.ours.predict(to_float(outputs), self.frames)

    @torch.no_grad()
    def their_inference(self) -> None:
        with autocast(self.device, self.precision):
            outputs = self.theirs(self.pixels)
        sizes = [frame.original for frame in self.frames]
        self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)


def spread(model: nn.Module) -> nn.Module:
    """The same model with noise on all its weights, all of them trained.

    First weights of 0 make all cells equal, and each side would choose other ones; transformers
    trains no stem of a ResNet in DETR.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(True).add_(torch.randn_like(parameter), alpha=0.01)
    return model


def make_targets(count: int, objects: int, size: int, device: torch.device) -> list[Target]:
    start = torch.rand(count, objects, 2) * size * 0.7
    boxes = torch.cat((start, start + 8 + torch.rand(count, objects, 2) * size * 0.2), -1)
    labels = torch.randint(CLASSES, (count, objects))
    return [Target(labels=x, boxes=b).to(device) for x, b in zip(labels, boxes, strict=True)]


def ratio(ours: Callable[[], None], theirs: Callable[[], None], runs: int, cuda: bool) -> Tensor:
    """Median milliseconds of both, interleaved; two runs to warm up."""

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 2):
        for function, found in zip((ours, theirs), seconds, strict=True):
            start = clock()
            function()
            if run >= 2:
                found.append(clock() - start)
    return torch.tensor([statistics.median(each) * 1e3 for each in seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=PEERS, default=list(PEERS))
    for name, value in dict(size=320, batch=2, objects=10, runs=9, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.precision = torch.bfloat16 if options.bf16 else torch.float32
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    results = {}
    for name in options.heads:
        pair = Pair(name, options)
        cuda = pair.device.type == "cuda"
        pair.train(True)
        step = ratio(pair.our_step, pair.their_step, options.runs, cuda)
        pair.train(False)
        inference = ratio(pair.our_inference, pair.their_inference, options.runs, cuda)
        results[name] = {
            "difference": pair.difference,
            "step_ms": step.tolist(), "step_ratio": (step[1] / step[0]).item(),
            "inference_ms": inference.tolist(),
            "inference_ratio": (inference[1] / inference[0]).item(),
        }  # fmt: skip
        print(
            f"{name:16} step {step[0]:7.0f} against {step[1]:7.0f} ms: {step[1] / step[0]:.2f}   "
            f"inference {inference[0]:7.0f} against {inference[1]:7.0f} ms: "
            f"{inference[1] / inference[0]:.2f}   (boxes differ by {pair.difference:.1e})",
            flush=True,
        )
    if options.json:
        settings = {k: str(v) for k, v in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "heads": results}, indent=1))


if __name__ == "__main__":
    main()
