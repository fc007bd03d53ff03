"""What a run tells before it starts."""

from __future__ import annotations

import re

import pytest
import torch
from torch.optim import AdamW

from vitdense.config import Config, loads
from vitdense.data.cache import ImageCache
from vitdense.engine import build, runtime, summary
from vitdense.engine.check import check
from vitdense.engine.optim import build_optimizer
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime
from vitdense.engine.train import train

CONFIG = """
model:
  backbone: {name: timm, model: vit_tiny_patch16_224, img_size: 32, patch_size: 8, frozen: 1,
             options: {depth: 4, embed_dim: 16, num_heads: 2}}
  neck: {name: simple_feature_pyramid, channels: 16}
  head: {name: upernet, channels: 16, aux_channels: 8}
data:
  dataset: {name: shapes, task: semantic, images: 12, size: 32}
  root: ROOT
  transforms: {name: segmentation, size: 32, crop: 64}
  workers: 0
train: {steps: 6, batch_size: 2, accumulate: 2, ema: 0.9, evaluations: 1, pictures: 0,
        observers: []}
optimizer: {lr: 1e-3, weight_decay: 0.05, layer_decay: 0.5, backbone_scale: 0.5}
output: OUT
device: cpu
"""


@pytest.fixture
def make(tmp_path):
    def make(*overrides: str) -> Config:
        text = CONFIG.replace("ROOT", str(tmp_path)).replace("OUT", str(tmp_path / "run"))
        return loads(text, "test.yaml", overrides)

    return make


def test_training_tells_what_it_will_do(make, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageCache, "room", 2.0**20)
    config = make(f"data.cache={tmp_path}/cache")
    train(config)
    lines = capsys.readouterr().err.splitlines()
    said = "\n".join(lines[: next(i for i, line in enumerate(lines) if "%" in line)])
    assert said.count("\n") < 25 and max(map(len, lines)) < 200
    for expected in (
        r"model +PyramidModel for semantic, 0\.\d\d M parameters, 0\.\d\d M of them frozen",
        r"  backbone +TimmBackbone, 0.0\d M parameters, 0.0\d M of them frozen",
        r"  head +UPerNetHead, 0\.\d\d M parameters\n",
        r"adamw +lr .* weight decay 0(.05)?: .* M of backbone",
        r"lr 0.001, weight decay 0.05: 0\.\d\d M of (neck, )?head",
        r"rate +cosine from these peak rates, warm-up 0.05",
        r"step +2 images x 2 batches = 4 images, of 12 in train",
        r"length +6 steps, 2 epochs; .*evaluations on top: 1",
        r"device +cpu, float32",
        r"memory +\d+ MiB: weights .* average .* activations about .*\(2 on 64 x 64 pixels\)",
        r"cache +.*/cache: about 0 MiB of images, room for .*; all fit",
    ):
        assert re.search(expected, said), f"{expected} in\n{said}"


def test_layer_decay_is_told_as_a_range(make):
    config = make()
    data = build.build_data(config)
    model = build.build_model(config, data)
    rows = summary.rate_rows(build_optimizer(model, **dict(config.optimizer)), model)
    assert len(rows) == 4
    # blocks 2 to 4 learn, and the norm with the last: the top of D = 5 depths is the norm's
    assert sum(row.startswith("lr 6.25e-05 to 0.00025 (3 rates)") for row in rows) == 2
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    told = [float(re.search(r"([\d.]+) M of", row)[1]) for row in rows]
    assert sum(told) == pytest.approx(learning / 1e6, abs=0.03)


def test_many_kinds_of_parameters_stay_a_few_lines():
    model = torch.nn.ModuleDict({f"part{i}": torch.nn.Linear(2, 2) for i in range(12)})
    groups = [
        {"params": list(part.parameters()), "lr_scale": 0.5**i, "weight_decay": 0.0}
        for i, part in enumerate(model.values())
    ]
    rows = summary.rate_rows(AdamW(groups, lr=1.0), model)
    assert len(rows) == summary.MOST_RATES + 1 and rows[-1] == "and 4 kinds more"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.minutes=3"], "3 minutes of training, as many steps as they allow"),
        (["train.epochs=2"], "2 epochs"),
    ],
)
def test_lengths(overrides, expected, make):
    config = make(*overrides)
    rows = dict(summary.length_rows(config, build.build_data(config), Runtime(torch.device("cpu"))))
    assert expected in rows["length"]


def test_processes_are_counted(make):
    config, place = make(), Runtime(torch.device("cpu"), world_size=4)
    rows = dict(summary.length_rows(config, build.build_data(config), place))
    assert rows["step"] == "2 images x 2 batches x 4 processes = 16 images, of 12 in train"
    assert summary.describe_device(config, place) == "process 0 of 4, cpu, float32"


def test_the_trial_changes_nothing(make):
    """Buffers, mode and what the first step draws."""
    config = make("train.batch_size=4")
    run = Run(config, runtime.start("cpu"))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    modes = [module.training for module in run.model.modules()]
    needs = summary.try_out(config, run.data, run.model, run.runtime)
    assert needs is not None and needs.activations > 0 and needs.canvas == (64, 64)
    assert [module.training for module in run.model.modules()] == modes
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_trial_that_does_not_fit_leaves_the_line_out(make, monkeypatch):
    def short(*arguments):
        raise MemoryError

    monkeypatch.setattr(summary.memory, "demand", short)
    config = make()
    data = build.build_data(config)
    model, place = build.build_model(config, data), runtime.start("cpu")
    optimizer = build_optimizer(model, **dict(config.optimizer))
    needs = summary.try_out(config, data, model, place)
    assert needs is None
    names = [name for name, _ in summary.plan_rows(config, data, model, optimizer, place, needs)]
    assert "device" in names and "memory" not in names


def test_check_tells_it_for_the_real_batch_size(make):
    told = check(make("train.batch_size=8"))
    assert re.search(r"\nstep +8 images x 2 batches = 16 images, of 12 in train\n", told)
    assert re.search(r"\nmemory +\d+ MiB: .*\(8 on 64 x 64 pixels\)\n", told)
    told = check(make("train.batch_size=auto"))
    assert re.search(r"\nstep +as many images of 12 in train as fit the device\n", told)


def test_a_cache_without_room_is_told(make, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageCache, "room", 1000.0)
    data = build.build_data(make(f"data.cache={tmp_path}/cache"))
    assert "images beyond that are decoded each time" in summary.describe_cache(data)
    assert "--shm-size" not in summary.describe_cache(data)
    data.train.cache.in_memory = True
    assert "--shm-size" in summary.describe_cache(data)
