"""Runs that break: what they leave, what is said, and that nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from vitdense import cli
from vitdense.config import Config, loads
from vitdense.data.base import DataError
from vitdense.data.loader import Unreadable
from vitdense.data.workers import WorkerError
from vitdense.engine import faults
from vitdense.engine import train as train_module
from vitdense.engine.faults import LeftOut
from vitdense.engine.replay import replay
from vitdense.engine.stopping import Stopped
from vitdense.engine.tally import NonFiniteLoss, Tally, hold_at_fault
from vitdense.engine.trace import Range, Trace
from vitdense.engine.train import train
from vitdense.heads.segmentation.linear import LinearHead
from vitdense.structures import Batch, Frame, Target

TEXT = """
model:
  backbone: {name: timm, model: vit_tiny_patch16_224, img_size: 32, patch_size: 8,
             options: {depth: 1, embed_dim: 16, num_heads: 2, drop_path_rate: 0.2}}
  neck: {name: simple_feature_pyramid, channels: 16}
  head: {name: linear, norm: layer, class_weights: inverse}
data:
  dataset: {name: ade20k, reduce_zero_label: false}
  root: ROOT
  transforms: {name: segmentation, size: 32, crop: 32}
  workers: 0
train: {steps: 12, batch_size: 2, evaluations: 1, pictures: 1, checkpoint_every: 5, observers: []}
optimizer: {lr: 1e-3}
output: OUT
device: cpu
"""

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A config for a data set of its own, that a test may break."""
    from vitdense.data.shapes import make_shapes

    root = make_shapes(tmp_path / "data", 12, 32, 0)

    def make(*overrides: str, out: str = "run") -> Config:
        text = TEXT.replace("ROOT", str(root)).replace("OUT", str(tmp_path / out))
        return loads(text, "test.yaml", overrides)

    return make


Break = Callable[[Tensor], Tensor]


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Break], dict[str, Any]]:
    """Let the head's logits go through a function for the batch that some step learns from."""
    known: dict[str, Any] = {"at": -1}
    step, forward = train_module.step, LinearHead.forward

    def watched(run: Any, batches: Any) -> None:
        known["now"] = run.step
        if run.step == known["at"]:
            known["weights"] = {k: v.clone() for k, v in run.model.state_dict().items()}
        step(run, batches)

    def broken(self: LinearHead, features: Any, targets: Any = None) -> Any:
        outputs = forward(self, features, targets)
        if self.training and targets is not None:
            mark = [target.semantic.float().mean().item() for target in targets]
            if known.get("now") == known["at"]:
                known.setdefault("mark", mark)
            if known.get("mark") == mark:
                outputs.logits = known["function"](outputs.logits)
        return outputs

    monkeypatch.setattr(train_module, "step", watched)
    monkeypatch.setattr(LinearHead, "forward", broken)

    def at(step: int, function: Break) -> dict[str, Any]:
        known.update(at=step, function=function)
        return known

    return at


def steps(config: Config) -> list[str]:
    return sorted(path.name for path in (config.output / "checkpoints").iterdir())


def test_a_faulty_step_is_kept_and_replayed(make: Make, breaks: Any) -> None:
    known = breaks(7, lambda logits: logits.log())
    config = make()
    with pytest.raises(NonFiniteLoss) as caught:
        train(config)
    text, folder = str(caught.value), config.output / "faults" / "step_000007"
    assert text.startswith("step 7: the loss is not finite: cross_entropy = nan; images: ")
    assert f"`vitdense replay {config.output}`" in text and "from step 5 with --resume" in text
    assert (
        steps(config) == ["step_000005.pt"] and not (config.output / "model.safetensors").exists()
    )
    facts = json.loads((folder / "rank_0.json").read_text())
    assert (facts["step"], facts["terms"]) == (7, [{"cross_entropy": "nan"}])
    assert facts["images"][0] == [
        str(p) for p in faults.load_batch(folder / facts["batches"][0]).paths
    ]
    kept = faults.checkpoint.read_weights(folder / "model.safetensors")
    for name, value in known["weights"].items():
        assert torch.equal(kept[name], value), name
    before = sorted(path for path in config.output.rglob("*"))
    report = replay(config.output)
    assert sorted(path for path in config.output.rglob("*")) == before
    lines = report.splitlines()
    assert lines[0].startswith("step 7, on cpu in float32") and facts["images"][0][0] in lines[1]
    (last,) = [line for line in lines if line.endswith("<- first")]
    assert last.startswith("head ") and " nan of " in last
    assert "first nan number: log of " in report and "test_faults.py:" in report


def test_the_replay_is_exact_and_names_a_gradient(make: Make, breaks: Any) -> None:
    """Dropout, class weights of the data, accumulation: the finite terms are the same."""
    breaks(3, lambda logits: logits + (logits - logits.detach()).abs().sqrt())
    config = make("train.accumulate=2", "train.clip=null", "data.workers=2")
    with pytest.raises(NonFiniteLoss, match="step 3: the gradient is not finite .*though the loss"):
        train(config)
    folder = config.output / "faults" / "step_000003"
    terms = json.loads((folder / "rank_0.json").read_text())["terms"]
    assert len(terms) == 2
    report = replay(folder)
    first = f"{terms[0]['cross_entropy']:.6g}"
    assert report.count(first) == 2, "in the run and here"
    assert "gradient of the output of" in report and "gradients that are not finite: " in report
    assert "number: div of " in report and "test_faults.py:" in report


def test_a_replay_that_finds_nothing_says_so(
    make: Make, breaks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    known = breaks(2, lambda logits: logits * torch.inf)
    config = make("train.precision=bf16")
    with pytest.raises(NonFiniteLoss):
        train(config)
    known["mark"] = None
    assert cli.main(["replay", str(config.output), "train.precision=fp32"]) == 0
    said = capsys.readouterr().out
    assert "on cpu in float32" in said
    assert "here all is finite" in said and "the run was on cpu in bfloat16" in said
    assert cli.main(["replay", str(config.data.root)]) == 2
    assert "holds no faulty step; name the folder of a run" in capsys.readouterr().err


def test_going_on_after_a_fault(make: Make, breaks: Any) -> None:
    known = breaks(7, lambda logits: logits.log())
    config, whole = make(), make(out="whole")
    with pytest.raises(NonFiniteLoss):
        train(config)
    known.update(at=-1, mark=None)
    train(config, resume=True)
    train(whole)
    ours, theirs = (
        faults.checkpoint.load_state(it.output / "checkpoints/step_000012.pt")["model"]
        for it in (config, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_is_held_at_the_first_fault(kind: Any, scaled: bool) -> None:
    torch.manual_seed(0)
    options = {"momentum": 0.9} if kind is SGD else {}
    free, held = nn.Linear(4, 4), nn.Linear(4, 4)
    held.load_state_dict(free.state_dict())
    pair = [kind(it.parameters(), lr=0.1, fused=True, **options) for it in (free, held)]
    tally, images = Tally(), torch.randn(3, 4)
    hold_at_fault(pair[1], tally)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0)

    def step(factor: float) -> None:
        for model in (free, held):
            loss = model(images).square().sum() * factor
            (scaler.scale(loss) if model is held else loss).backward()
        scaler.unscale_(pair[1])
        tally.add(0, {"loss": loss}, [])
        norm = nn.utils.get_total_norm([p.grad for p in held.parameters() if p.grad is not None])
        tally.add_norm(norm, scaled)
        pair[0].step()
        scaler.step(pair[1])
        scaler.update()
        for optimizer in pair:
            optimizer.zero_grad()

    for _ in range(3):
        step(1.0)
    torch.testing.assert_close(held.weight, free.weight, rtol=0, atol=0)
    before = held.weight.clone()
    memory = [value.clone() for it in pair[1].state.values() for value in it.values()]
    step(float("nan"))
    step(1.0)
    assert torch.equal(held.weight, before) and not free.weight.isfinite().all()
    after = [value for it in pair[1].state.values() for value in it.values()]
    assert all(map(torch.equal, memory, after))


def test_a_scaler_may_skip_a_step() -> None:
    tally = Tally()
    tally.add(0, {"a": torch.tensor(1.0)}, [])
    tally.add_norm(torch.tensor(3.0), scaled=True)
    tally.add(1, {"a": torch.tensor(1.0)}, [])
    tally.add_norm(torch.tensor(torch.inf), scaled=True)
    assert tally.faulty == 0
    assert tally.read() == {"loss": 1.0, "loss/a": 1.0, "grad_norm": 3.0}


def test_keeping_a_faulty_step_asks_no_other_process(
    make: Make, breaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may know nothing of it, and be at their end already."""
    breaks(3, lambda logits: logits.log())
    counts: list[Any] = []
    count = faults.build.image_repeats
    monkeypatch.setattr(
        faults.build, "image_repeats", lambda *facts: counts.append(facts) or count(*facts)
    )
    config = make("data.rare=0.9")
    with pytest.raises(NonFiniteLoss):
        train(config)
    assert (config.output / "faults/step_000003/rank_0_batch_0.safetensors").exists()
    assert len(counts) == 1


def change(
    config: Config, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], Any]
) -> None:
    """Do something to the files during that step."""
    original = train_module.step

    def step(run: Any, batches: Any) -> None:
        if run.step == at:
            act()
        original(run, batches)

    monkeypatch.setattr(train_module, "step", step)


def test_an_unreadable_image_stops_the_run_with_its_state_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = make("train.accumulate=2"), make("train.accumulate=2", out="whole")
    train(whole)
    image = next((config.data.root / "images/train").iterdir())
    content = image.read_bytes()
    with monkeypatch.context() as patch:
        change(config, patch, 6, lambda: image.write_bytes(content[:200]))
        with pytest.raises(DataError) as caught:
            train(config)
    text = str(caught.value)
    assert text.startswith(f"{image}: cannot be decoded") and "data.faulty=skip" in text
    saved = int(steps(config)[-1][5:11])
    assert saved >= 5 and text.endswith(f"Then go on from step {saved} with --resume")
    image.write_bytes(content)
    train(config, resume=True)
    ours, theirs = (
        faults.checkpoint.load_state(it.output / "checkpoints/step_000012.pt")["model"]
        for it in (config, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_skipping_names_and_counts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("data.faulty=skip", "train.steps=24")
    images = config.data.root / "images"

    def act() -> None:
        (images / "train/000003.jpg").write_bytes(b"no image")
        (images / "train/000004.jpg").unlink()
        (images / "val/000001.jpg").write_bytes(b"")

    change(config, monkeypatch, 5, act)
    results = train(config)
    rows = [line.split("\t") for line in (config.output / "skipped.txt").read_text().splitlines()]
    names = {(split, Path(name).name) for split, name, _ in rows}
    assert names == {("train", "000003.jpg"), ("train", "000004.jpg"), ("val", "000001.jpg")}
    assert len(rows) == 3 and rows[0][2].endswith("replace it") or "no such file" in rows[0][2]
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    last = [it for it in map(json.loads, lines) if it["kind"] == "train"][-1]
    assert last["skipped"] == 2 and results["skipped"] == 1


def test_a_killed_worker_loses_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import multiprocessing

    config, whole = make("data.workers=1", "train.steps=9"), make("train.steps=9", out="whole")
    train(whole)

    def kill() -> None:
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        change(config, patch, 4, kill)
        with pytest.raises(WorkerError) as caught:
            train(config)
    text = str(caught.value)
    assert "was killed by SIGKILL" in text and "data.workers" in text and "--resume" in text
    train(config, resume=True)
    ours, theirs = (
        faults.checkpoint.load_state(it.output / "checkpoints/step_000009.pt")["model"]
        for it in (config, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_to_all_processes_is_a_stop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler sends it: the workers are gone, and the run was told too."""

    def dies(*args: Any, **options: Any) -> Iterator[Batch]:
        yield from original(*args, **options, limit=3)
        signal.raise_signal(signal.SIGTERM)
        raise WorkerError("a process that reads images was killed by SIGTERM")

    load = train_module.build.training_loader

    def original(*args: Any, limit: int, **options: Any) -> Iterator[Batch]:
        for _, batch in zip(range(limit), load(*args, **options), strict=False):
            yield batch

    monkeypatch.setattr(train_module.build, "training_loader", dies)
    config = make()
    with pytest.raises(Stopped, match="stopped, step 3 is saved; go on with --resume"):
        train(config)
    assert steps(config) == ["step_000003.pt"]


def test_a_batch_is_written_whole(tmp_path: Path) -> None:
    target = Target(
        boxes=torch.rand(2, 4), labels=torch.tensor([1, 0]), crowd=torch.zeros(2).bool()
    )
    batch = Batch(
        torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8),
        [target, Target()],
        [Frame((4, 6), (3, 6), (30, 60)), Frame((4, 6), (4, 5), (40, 50))],
        [7, "b"],
        [Path("a.jpg"), Path("b.jpg")],
    )
    path = tmp_path / "batch.safetensors"
    faults.save_batch(path, batch)
    again = faults.load_batch(path)
    assert torch.equal(again.images, batch.images) and again.images.dtype == torch.uint8
    assert (again.frames, again.image_ids, again.paths) == (batch.frames, [7, "b"], batch.paths)
    assert again.targets[0].boxes is not None and torch.equal(again.targets[0].boxes, target.boxes)
    assert again.targets[0].crowd is not None and again.targets[0].crowd.dtype == torch.bool
    assert again.targets[0].masks is None and again.targets[1].labels is None


@pytest.mark.parametrize(
    "other", [SafetensorError("I/O error: No space left on device"), TypeError("int64 is no JSON")]
)
def test_what_cannot_be_kept_hides_no_fault(
    make: Make, breaks: Any, monkeypatch: pytest.MonkeyPatch, other: Exception
) -> None:
    breaks(2, lambda logits: logits.log())

    def fails(*args: Any) -> None:
        raise other

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    said = str(other).rpartition(": ")[2]
    with pytest.raises(NonFiniteLoss, match=rf"cross_entropy = nan.*could not be kept: .*{said}"):
        train(make())


def test_each_image_is_listed_once_by_all_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "skipped.txt"
    first, second = LeftOut(path), LeftOut(path)
    assert first.numbers("train") == {}
    for listed in (first, second, first):
        listed(Unreadable("train", "a.jpg", "a.jpg: is\nbroken"))
        listed(Unreadable("val", "b.jpg", "b.jpg: is broken"))
    second(Unreadable("train", "c.jpg", "annotations.json: has no c"))
    assert path.read_text() == (
        "train\ta.jpg\tis broken\nval\tb.jpg\tis broken\ntrain\tc.jpg\tannotations.json: has no c\n"
    )
    assert (first.numbers("train"), first.numbers("val")) == ({"skipped": 2}, {"skipped": 1})
    assert capsys.readouterr().err.count("left out: ") == 2  # the first of each split


class Divides(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": (x + 1) / (x - x)}


def test_a_trace_finds_the_first_module_and_passes_what_is_meant() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, -torch.inf).softmax(-1)

    model = nn.Sequential(nn.Linear(3, 3), Masked(), Divides())
    trace = Trace(model)
    with trace:
        model(torch.ones(2, 3))
    assert [call.module for call in trace.calls] == ["0", "1", "2"]
    assert trace.calls[1].outputs.nans == 0 and trace.infinite is not None
    assert (trace.infinite.name, trace.infinite.module) == ("div", "2")
    assert "(x + 1) / (x - x)" in trace.infinite.place
    assert not any(module._forward_hooks for module in model.modules())


def test_ranges() -> None:
    value = {"a": torch.tensor([1.0, torch.nan, 3]), "b": [torch.tensor([-torch.inf]), None]}
    assert str(Range.of(value)) == "1 .. 3, 1 nan of 4, 1 inf of 4"
    assert Range.of([]) is None and Range.of(torch.zeros(0)) is None
    assert str(Range.of(torch.tensor([True, False]))) == "0 .. 1"
