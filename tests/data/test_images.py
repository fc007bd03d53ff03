"""Decoding: every kind of image becomes uint8 of the channels asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense.data.base import DataError
from vitdense.data.images import inside, read_image, read_labels


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_all_modes_come_out_with_the_channels_asked_for(tmp_path, mode, channels):
    path = tmp_path / "image.tif"
    source = Image.fromarray(np.full((6, 9, 3), 255, dtype=np.uint8)).convert(mode)
    if mode == "YCbCr":
        path = tmp_path / "image.jpg"
    source.save(path)
    image = read_image(path, channels)
    assert image.dtype == torch.uint8 and image.shape == (channels, 6, 9)
    assert (image[:3] >= 250).all()


def test_grey_is_repeated_and_color_is_weighed(tmp_path):
    pixels = np.arange(54, dtype=np.uint8).reshape(6, 9)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png").numpy() == pixels).all()
    Image.new("RGB", (9, 6), (255, 0, 0)).save(tmp_path / "red.png")
    assert (read_image(tmp_path / "red.png", 1) == 76).all()


def test_a_number_of_channels_that_is_not_there(tmp_path):
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has 3 channels, the model takes 5"):
        read_image(tmp_path / "a.png", 5)


def test_labels_are_values_not_colors(tmp_path):
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: holds colors \(RGB\), not labels; save one"):
        read_labels(tmp_path / "a.png")
    Image.new("1", (9, 6), 1).save(tmp_path / "b.png")
    assert (read_labels(tmp_path / "b.png") == 1).all()


def test_a_folder_may_be_a_link_but_a_file_may_not_lead_out(tmp_path):
    disk, root = tmp_path / "disk", tmp_path / "set"
    disk.mkdir()
    root.mkdir()
    (root / "images").symlink_to(disk)
    (disk / "a.png").touch()
    assert inside(root / "images", "a.png").exists()
    (tmp_path / "secret").touch()
    (disk / "b.png").symlink_to(tmp_path / "secret")
    for name in ("b.png", "../secret", str(tmp_path / "secret")):
        with pytest.raises(DataError, match="leads out of"):
            inside(root / "images", name)
