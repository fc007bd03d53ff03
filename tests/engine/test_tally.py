"""Losses on their way from the device to the reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdense.engine.tally import NonFiniteLoss, Tally


def test_means_of_the_steps_since_the_last_reading() -> None:
    tally = Tally()
    tally.add(0, {"a": torch.tensor(1.0), "b": torch.tensor(4.0)}, [])
    tally.add(1, {"a": torch.tensor(3.0)}, [])
    tally.add_norm(torch.tensor(2.0))
    assert tally.read() == {"loss": 4.0, "loss/a": 2.0, "loss/b": 4.0, "grad_norm": 2.0}
    assert tally.read() == {}


def test_a_faulty_loss_names_step_terms_and_images() -> None:
    tally = Tally()
    tally.add(6, {"boxes": torch.tensor(1.0), "giou": torch.tensor(2.0)}, [Path("a.jpg")])
    faulty = {"boxes": torch.tensor(float("nan")), "giou": torch.tensor(2.0)}
    tally.add(7, faulty, [Path("b.jpg"), Path("c.jpg")])
    with pytest.raises(NonFiniteLoss) as caught:
        tally.read()
    message = str(caught.value)
    assert message.startswith("step 7: the loss is not finite: boxes = nan; images: b.jpg, c.jpg.")
    assert "optimizer.lr" in message and "giou" not in message
