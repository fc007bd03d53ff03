"""`train.batch_size: auto`: a number that fits, found once, kept in config.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdense.config import Config, load, loads
from vitdense.data.short_side import ShortSidePolicy
from vitdense.data.transforms import DetectionPolicy, NoPolicy, SegmentationPolicy
from vitdense.engine import batch_size, build, memory, runtime
from vitdense.engine import train as train_module
from vitdense.engine.batch_size import Heavy, find_by_trial, kept, largest, peak_of, settle
from vitdense.engine.memory import OutOfMemory
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime
from vitdense.inference.tools import evaluate
from vitdense.models.pyramid import PyramidModel

CONFIG = """
model:
  backbone: {name: timm, model: vit_tiny_patch16_224, img_size: 32, patch_size: 8,
             options: {depth: 1, embed_dim: 16, num_heads: 2}}
  neck: {name: simple_feature_pyramid, channels: 16}
  head: {name: detr, width: 16, heads: 2, ffn: 16, queries: 5, encoder_layers: 1,
         decoder_layers: 1}
data:
  dataset: {name: shapes, images: 20, size: 32}
  root: ROOT
  transforms: {name: detection, size: 32, multi_scale: [0.5, 1.5]}
  workers: 0
train: {steps: 2, batch_size: auto, evaluations: 1, pictures: 0, observers: []}
output: OUT
device: cpu
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def config(root, tmp_path) -> Config:
    text = CONFIG.replace("ROOT", str(root)).replace("OUT", str(tmp_path / "run"))
    return loads(text, "test.yaml")


def give(monkeypatch, free: float) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda device: free)


@pytest.mark.parametrize(
    ("limit", "most", "expected"),
    [(100, 256, 8), (119, 256, 8), (120, 256, 12), (5, 256, 0), (1e9, 20, 16), (1e9, 10**6, 256)],
)
def test_the_largest_that_fits(limit, most, expected):
    assert largest(lambda images: 10 * images, limit, most) == expected


def test_a_size_that_fails_is_the_end():
    tried = []

    def measure(images: int) -> int | None:
        tried.append(images)
        return None if images > 5 else images

    assert largest(measure, 100, 256) == 4
    assert tried == [1, 2, 3, 4, 6]


def test_the_largest_canvas_of_each_policy():
    assert DetectionPolicy(size=64).largest(32) == (64, 64)
    assert DetectionPolicy(size=(64, 96), multi_scale=(0.5, 1.5)).largest(32) == (96, 128)
    assert DetectionPolicy(size=64, multi_scale=(0.5, 0.7)).largest(32) == (64, 64)
    assert SegmentationPolicy(size=64, crop=(48, 80)).largest(32) == (48, 80)
    assert ShortSidePolicy(size=64, longest=100, scale=(0.6, 1.0)).largest(32) == (100, 100)
    assert NoPolicy().largest(32) is None


def test_canvases_are_never_larger():
    policy = DetectionPolicy(size=(64, 96), multi_scale=(0.5, 1.5))
    drawn = [policy.for_batch(32, False).canvas for _ in range(200)]
    assert max(drawn) == policy.largest(32)


def test_heavy_batches(config):
    data = build.build_data(config)
    model = build.build_model(config, data)
    heavy = Heavy.draw(build.with_batch_size(config, 1), data, model)
    batch = heavy.of(3)
    side = -(-48 // model.divisor) * model.divisor
    assert batch.images.shape == (3, 3, side, side) and len(batch.targets) == 3
    counts = [len(sample.target.labels) for sample in map(data.train.__getitem__, range(20))]
    assert 1 <= len(batch.targets[0].labels) <= max(counts)


def test_training_finds_a_number_and_a_resumed_run_keeps_it(config, monkeypatch, capsys):
    give(monkeypatch, 1e12)
    train_module.train(config)
    said = capsys.readouterr().err
    assert "train.batch_size auto: 16 images take" in said
    assert "optimizer.lr stays 0.0002" in said
    written = load(config.output / "config.yaml")
    assert written.train.batch_size == 16
    give(monkeypatch, 1)  # nothing is tried again
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    assert kept(longer).train.batch_size == 16
    assert train_module.train(longer, resume=True)["steps"] == 3
    numbers = evaluate(config.output / "model.safetensors")
    text = (config.output / "config.yaml").read_text().replace("size: 16", "size: auto")
    file = config.output.parent / "again.yaml"
    file.write_text(text)
    assert evaluate(file) == numbers


def test_a_number_that_somebody_gave_is_not_kept(config, monkeypatch, capsys):
    """As after it was too large, when the error has said to go on with auto."""
    monkeypatch.setattr(train_module, "loop", lambda run, stop: run.states.wait())
    given = build.with_batch_size(config, 12)
    with pytest.raises(KeyboardInterrupt):
        train_module.train(given)
    assert kept(config).train.batch_size == "auto"
    give(monkeypatch, 1e12)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_module.train(config, resume=True)
        assert kept(config).train.batch_size == 16
    assert capsys.readouterr().err.count("batch_size auto: 16 images") == 1


def test_a_model_that_is_split_is_not_tried(config):
    train = config.train.model_copy(update={"shard": True})
    split = config.model_copy(update={"train": train})
    with pytest.raises(ValueError, match=r"^train.batch_size: auto .* train.shard .* a number"):
        settle(split, Runtime(CPU, 0, 2), train_module.step)


def test_less_memory_gives_smaller_batches(config, monkeypatch):
    data = build.build_data(config)
    model = build.build_model(config, data)
    heavy = Heavy.draw(build.with_batch_size(config, 1), data, model)
    needs = memory.demand(config, model, heavy.of(2), torch.float32)
    give(monkeypatch, needs.of(5) / batch_size.SHARE_ELSEWHERE)
    assert settle(config, Runtime(CPU), train_module.step).train.batch_size == 4
    give(monkeypatch, 100)
    assert batch_size._limit(CPU, processes=2) == 50 * batch_size.SHARE_ELSEWHERE
    assert batch_size._limit(torch.device("cuda"), processes=2) == 100 * batch_size.SHARE_ON_GPU
    give(monkeypatch, needs.fixed)
    with pytest.raises(OutOfMemory, match="by 1 image on a canvas of"):
        settle(config, Runtime(CPU), train_module.step)


def test_processes_take_the_smallest_number(config, monkeypatch):
    """Each has found its own."""
    give(monkeypatch, 1e12)
    others = [8, 16, 12]
    monkeypatch.setattr(Runtime, "gather", lambda self, value: [value, *others])
    place = Runtime(CPU, rank=1, world_size=4)
    assert settle(config, place, train_module.step).train.batch_size == 8


def test_logs_do_not_have_the_memory_of_trials(config, monkeypatch):
    """They tell the highest use so far, and trials drive it to the limit."""
    events = []
    give(monkeypatch, 1e12)
    monkeypatch.setattr(batch_size, "find_by_trial", lambda *_: events.append("trial") or (4, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: events.append("reset"))
    found = settle(config, Runtime(torch.device("cuda")), train_module.step)
    assert found.train.batch_size == 4 and events == ["trial", "reset"]


def test_trials_run_the_real_step_until_it_fails(config, monkeypatch, capsys):
    """What a GPU does, with an allocator that fails above 6 images and a meter made of them."""
    give(monkeypatch, 1e12)
    original, steps = PyramidModel.loss, []

    def loss(self, outputs, targets):
        if len(targets) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.append(len(targets))
        return original(self, outputs, targets)

    monkeypatch.setattr(PyramidModel, "loss", loss)
    start = build.with_batch_size(config, 1)
    assert find_by_trial(start, Runtime(CPU), train_module.step, 1e12) == (6, 0)
    assert sorted({*steps}) == [1, 2, 3, 4, 6]
    assert capsys.readouterr().err == ""
    assert not config.output.exists()


def test_a_trial_that_fails_leaves_no_gradients_and_other_faults_pass(config, monkeypatch):
    run = Run(build.with_batch_size(config, 1), runtime.start("cpu"))
    batch = Heavy.draw(run.config, run.data, run.model).of(1)
    assert peak_of(run, train_module.step, batch) == 0

    def short(run, batches):
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        raise MemoryError

    assert peak_of(run, short, batch) is None
    assert all(parameter.grad is None for parameter in run.model.parameters())

    def faulty(run, batches):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        peak_of(run, faulty, batch)
