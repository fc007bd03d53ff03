"""Where memory runs out, an error that says what to change; what a step takes, before it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.engine.small import Make
from vitdense import cli
from vitdense.config import Config, dump
from vitdense.engine import memory
from vitdense.engine import train as train_module
from vitdense.engine.evaluate import answer
from vitdense.engine.memory import OutOfMemory, is_shortage, training_advice
from vitdense.models.base import Model
from vitdense.structures import Batch, Frame, Target

CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.fixture
def config(make: Make) -> Config:
    return make(
        "train.batch_size=3",
        "train.ema=null",
        "train.evaluations=1",
        "train.pictures=0",
        "train.observers=[]",
    )


def batch_of(images: int, size: int = 16) -> Batch:
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    frame = Frame((size, size), (size, size), (size, size))
    targets = [Target(semantic=torch.zeros(size, size, dtype=torch.int64)) for _ in range(images)]
    return Batch(pixels, targets, [frame] * images, [*range(images)], [])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(CPU), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OutOfMemory("explained"), False),
    ],
)
def test_what_counts_as_a_shortage(error, expected):
    assert is_shortage(error) is expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU)])
def test_training_says_what_to_change(error, config, monkeypatch):
    """In the third step."""
    original, calls = train_module.runtime.autocast, [0]

    def autocast(device, precision):
        calls[0] += 1
        return raising(error) if calls[0] == 3 else original(device, precision)

    monkeypatch.setattr(train_module.runtime, "autocast", autocast)
    with pytest.raises(OutOfMemory) as caught:
        train_module.train(config)
    text = str(caught.value)
    assert text.startswith("step 2: the memory of cpu is too small (")
    assert "by 3 images on a canvas of 32 x 32 (train.batch_size 3, precision auto)" in text
    assert "train.batch_size=1 train.accumulate=3" in text
    assert "train.precision=bf16" in text and "model.backbone.checkpointing=true" in text
    assert "GiB in use" in text and caught.value.__cause__ is error
    assert cli.is_for_user(caught.value)


def test_the_command_ends_with_2(config, monkeypatch, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    monkeypatch.setattr(train_module.runtime, "autocast", lambda *_: raising(MemoryError()))
    assert cli.main(["train", str(file)]) == 2
    shown = capsys.readouterr().err
    assert "error: step 0: the memory of cpu is too small" in shown and "Traceback" not in shown


def test_a_model_that_does_not_fit_is_no_fault_of_ours(config, monkeypatch, tmp_path, capsys):
    file, said = tmp_path / "config.yaml", "CUDA out of memory. Tried to allocate 2.00 GiB."
    file.write_text(dump(config))
    monkeypatch.setattr(Model, "to", lambda *_: raising(torch.OutOfMemoryError(said)))
    assert cli.main(["train", str(file)]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def raising(error: BaseException) -> None:
    raise error


def test_other_errors_pass_as_they_are(config, monkeypatch):
    fault = RuntimeError("a fault of ours")
    monkeypatch.setattr(train_module.runtime, "autocast", lambda *_: raising(fault))
    with pytest.raises(RuntimeError) as caught:
        train_module.train(config)
    assert caught.value is fault


def test_advice_leaves_out_what_is_done_already(config, make):
    overrides = ("train.batch_size=1", "train.precision=bf16", "model.backbone.checkpointing=true")
    done = make(*overrides, "data.transforms.crop=512")
    said = training_advice(done, 7, (1, 3, 512, 512), torch.device("cpu"))
    assert "1 image on" in said and "data.transforms.crop=384" in said
    assert not any(word in said for word in ("batch_size=", "precision=bf16", "checkpointing"))
    reading = training_advice(config, 7, None, torch.device("cpu"))
    assert "while batches were read" in reading and "data.workers" in reading


@pytest.mark.parametrize(
    ("native", "precision", "named"),
    [(True, "fp32", "bf16"), (False, "fp32", "fp16"), (True, "auto", None), (True, "fp16", None)],
)
def test_a_gpu_is_advised_to_the_type_that_it_has(make, monkeypatch, native, precision, named):
    monkeypatch.setattr(memory, "_usage", lambda _: "the memory is too small")
    for module in (memory, train_module.runtime):
        monkeypatch.setattr(module, "has_bf16", lambda: native)
    config = make(f"train.precision={precision}")
    said = training_advice(config, 7, (2, 3, 32, 32), torch.device("cuda"))
    assert [name for name in ("bf16", "fp16") if f"train.precision={name}" in said] == (
        [named] if named else []
    )


def test_prediction_says_what_to_change(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model, "predict", lambda *_: raising(MemoryError()))
    with pytest.raises(OutOfMemory) as caught:
        answer(tiny_model.eval(), batch_of(4), torch.float32)
    text = str(caught.value)
    assert "prediction: the memory of cpu is too small" in text
    assert "by 4 images on a canvas of 16 x 16" in text
    assert "train.batch_size=2 in train and eval, --batch-size in predict" in text
    assert "inference.window=512, and inference.batch_size=1" in text


def test_demand_is_exact_but_for_activations(tiny_model, config):
    tiny_model.backbone.stem.requires_grad_(False)
    tiny_model.eval()
    before = copy.deepcopy(tiny_model.state_dict())
    needs = memory.demand(config, tiny_model, batch_of(2), torch.float32)
    weights = sum(it.nbytes for it in tiny_model.state_dict().values())
    learning = sum(p.nbytes for p in tiny_model.parameters() if p.requires_grad)
    assert (needs.weights, needs.gradients) == (weights, learning)
    assert (needs.optimizer, needs.average) == (2 * learning, 0)
    assert needs.of(5) == weights + 3 * learning + 5 * needs.activations
    assert needs.canvas == (16, 16)
    assert not tiny_model.training
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name}: the trial has left a trace"


def test_activations_are_what_backward_reads():
    """A linear map keeps its input, a relu its output; weights and repeats do not count."""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, images, targets=None):
            return self.second(self.first(images).relu())

        def loss(self, outputs, targets):
            return {"square": outputs.square().sum()}

    batch = batch_of(1)
    batch.images = torch.randn(5, 8)
    found = memory.saved_for_backward(Maps(), batch, torch.float32)  # type: ignore[arg-type]
    assert found == 4 * 5 * (8 + 16 + 4)
