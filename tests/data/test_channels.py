"""Images beyond 8 bits and three channels: decoded exactly, moved, trained on and predicted."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdense import config as configs
from vitdense.data.base import DataError
from vitdense.data.collate import collate
from vitdense.data.color import distort
from vitdense.data.folders import FoldersDataset
from vitdense.data.images import image_size, is_turned, read_image, read_labels
from vitdense.data.mixing import blend, join
from vitdense.data.transforms import DetectionPolicy, SegmentationPolicy
from vitdense.engine.checkpoint import Meta, save_model
from vitdense.engine.train import train
from vitdense.inference.predictor import Predictor
from vitdense.inference.tools import predict
from vitdense.ops.draw import draw
from vitdense.structures import Prediction, Sample, Target
from vitdense.testing import check_dataset, check_policy

RNG = np.random.default_rng(0)


def deep(*shape: int) -> np.ndarray:
    return RNG.integers(0, 65536, shape).astype(np.uint16)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """16-bit colors, which Pillow cannot write."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    text = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        text += struct.pack(">I", len(data)) + name + data
        text += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(text)


def expected(pixels: np.ndarray, low: float = 0, high: float = 65535) -> np.ndarray:
    values = (pixels.astype(np.float64) - low) / (high - low) * 255
    return values.clip(0, 255).transpose(2, 0, 1)


def assert_pixels(found: torch.Tensor, wanted: np.ndarray) -> None:
    assert found.dtype == torch.float32 and tuple(found.shape) == wanted.shape
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_keeps_its_precision(tmp_path, suffix):
    pixels, path = deep(6, 9, 1), tmp_path / f"a{suffix}"
    Image.fromarray(pixels[..., 0]).save(path)
    assert_pixels(read_image(path, 1), expected(pixels))
    assert_pixels(read_image(path, 3), expected(pixels.repeat(3, 2)))
    assert_pixels(read_image(path, 1, limits=(1000, 5095)), expected(pixels, 1000, 5095))
    assert len(np.unique(read_image(path, 1))) == len(np.unique(pixels))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colors_of_png(tmp_path, channels):
    pixels, path = deep(6, 9, channels), tmp_path / "a.png"
    write_png16(path, pixels)
    if channels == 2:
        assert_pixels(read_image(path, 1), expected(pixels[..., :1]))
        return
    assert_pixels(read_image(path, 3), expected(pixels[..., :3]))
    luma = (pixels[..., :3] @ np.array([0.299, 0.587, 0.114]))[..., None]
    np.testing.assert_allclose(read_image(path, 1).numpy(), expected(luma), atol=1e-2)
    if channels == 4:
        assert_pixels(read_image(path, 4), expected(pixels))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, np.int16])
def test_arrays_with_channels_first_or_last(tmp_path, first, kind):
    path = tmp_path / "a.npy"
    pixels = RNG.integers(0, 200, (7, 9, 6)).astype(kind)
    np.save(path, pixels.transpose(2, 0, 1) if first else pixels)
    assert image_size(path) == (7, 9)
    found = read_image(path, 6, (7, 9), (0, 255))
    if kind is np.uint8:
        assert found.dtype == torch.uint8 and (found.numpy() == pixels.transpose(2, 0, 1)).all()
    else:
        assert_pixels(found, expected(pixels, 0, 255))


def test_pages_and_bands_of_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    bands, path = deep(7, 9, 6), tmp_path / "a.tif"
    layers = bands.transpose(2, 0, 1)
    tifffile.imwrite(path, layers, photometric="minisblack")
    assert_pixels(read_image(path, 6), expected(bands))
    tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")
    assert_pixels(read_image(path, 6), expected(bands))
    tifffile.imwrite(path, layers, photometric="minisblack", planarconfig="separate")
    assert_pixels(read_image(path, 6, (7, 9)), expected(bands))
    assert image_size(path) == (7, 9)
    tifffile.imwrite(path, bands[..., :3], photometric="rgb")  # Pillow would cut these to 8 bits
    assert_pixels(read_image(path, 3), expected(bands[..., :3]))
    three = [Image.fromarray(layer) for layer in layers[:3]]  # one page each
    three[0].save(path, save_all=True, append_images=three[1:])
    assert_pixels(read_image(path, 3), expected(bands[..., :3]))
    path.write_text("no image")
    with pytest.raises(DataError, match=r"a\.tif: cannot be decoded \(not a TIFF file"):
        read_image(path, 6)


@pytest.mark.parametrize("fourth", ["unspecified", "assocalpha", "unassalpha"])
def test_the_fourth_band_of_tiff_is_kept_whatever_its_tag(tmp_path, fourth):
    tifffile = pytest.importorskip("tifffile")
    bands, path = RNG.integers(0, 256, (6, 9, 4)).astype(np.uint8), tmp_path / "a.tif"
    tifffile.imwrite(path, bands, photometric="rgb", extrasamples=[fourth])
    assert (read_image(path, 4, (6, 9)).numpy() == bands.transpose(2, 0, 1)).all()
    if fourth != "assocalpha":
        assert (read_image(path, 3).numpy() == bands.transpose(2, 0, 1)[:3]).all()


@pytest.mark.parametrize("compression", ["lzw", "deflate", "zstd", "packbits"])
def test_compressed_bands_are_read(tmp_path, compression):
    tifffile, path = pytest.importorskip("tifffile"), tmp_path / "a.tif"
    pytest.importorskip("imagecodecs")
    bands = deep(6, 9, 5)
    layout = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, bands, compression=compression, **layout)
    assert_pixels(read_image(path, 5, (6, 9)), expected(bands))


def test_a_compression_that_tifffile_cannot_read_says_what_to_install(tmp_path, monkeypatch):
    tifffile, path = pytest.importorskip("tifffile"), tmp_path / "a.tif"
    tifffile.imwrite(path, deep(6, 9, 5), photometric="minisblack", planarconfig="contig")

    def read(self):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", read)
    with pytest.raises(DataError, match=r"a\.tif: cannot be decoded .*; pip install 'vitdense"):
        read_image(path, 5)


@pytest.mark.parametrize("name", ["a.tif", "a.npy", "a.png"])
def test_only_photos_are_turned(tmp_path, name):
    """`predict` asks of every file, those too that Pillow cannot open."""
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, deep(6, 9, 5))
    elif name.endswith(".png"):
        Image.fromarray(deep(6, 9)).save(path)
    else:
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(path, deep(6, 9, 5), photometric="minisblack", planarconfig="contig")
    assert not is_turned(path)


def test_fractions_are_no_labels(tmp_path):
    Image.fromarray(np.ones((6, 9), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: holds fractions \(F\), not labels; save one"):
        read_labels(tmp_path / "a.tif")


def test_tiff_without_tifffile_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    Image.fromarray(deep(6, 9)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", 1).shape == (1, 6, 9)
    with pytest.raises(DataError, match=r"install tifffile \(pip install 'vitdense\[images\]'\)"):
        read_image(tmp_path / "a.tif", 6)


def test_floats_need_a_range(tmp_path):
    pixels = np.linspace(-1, 3, 54, dtype=np.float32).reshape(6, 9)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"float32 values from -1 to 3; say by the option `range`"):
        read_image(tmp_path / "a.tif", 1)
    found = read_image(tmp_path / "a.tif", 3, limits=(0, 2))
    assert_pixels(found, expected(pixels[..., None].repeat(3, 2), 0, 2))
    pixels[0, 0] = np.nan
    np.save(tmp_path / "b.npy", pixels)
    with pytest.raises(DataError, match=r"b\.npy: has pixels that are no finite numbers"):
        read_image(tmp_path / "b.npy", 1, limits=(0, 2))
    with pytest.raises(DataError, match=r"float32 values from -0\.9\d* to 3; say by the option"):
        read_image(tmp_path / "b.npy", 1)


def test_faults(tmp_path):
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    message = r"a\.png: has 3 channels, the model takes 5; set in_chans of the backbone to 3"
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / "a.png", 5)
    np.save(tmp_path / "a.npy", np.zeros((6, 9, 3, 1), np.uint8))
    with pytest.raises(DataError, match="is an array of 4 dimensions"):
        read_image(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros((6, 9), np.uint8))
    with pytest.raises(DataError, match="is 9 x 6 pixels, but its annotation was made for 6 x 9"):
        read_image(tmp_path / "b.npy", 1, (9, 6))
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    for name in ("c.npy", "d.npy"):
        with pytest.raises(DataError, match=r"cannot be decoded|no such file"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="a label map is a whole number per pixel"):
        np.save(tmp_path / "e.npy", np.zeros((6, 9), np.float32))
        read_labels(tmp_path / "e.npy")
    with pytest.raises(ValueError, match=r"^range: \[5, 5\] must be \[lowest, highest\]"):
        FoldersDataset(tmp_path, "train", range=(5, 5))


def sample(kind: torch.dtype, channels: int = 3) -> Sample:
    image = torch.rand(channels, 20, 30).mul(255).to(kind)
    target = Target(labels=torch.zeros(1).long(), boxes=torch.tensor([[2.0, 2, 20, 18]]))
    return Sample(image, target, 1, (20, 30), Path("a.png"))


def test_batches_and_blends_of_8_and_16_bits():
    pair = [sample(torch.uint8), sample(torch.float32)]
    (batch,) = collate(pair, divisor=8, training=True)
    assert batch.images.dtype == torch.float32 and batch.images.shape == (2, 3, 24, 32)
    assert torch.equal(batch.images[1, :, :20, :30], pair[1].image)
    assert blend(*pair).image.dtype == join(pair).image.dtype == torch.float32
    assert blend(pair[0], pair[0]).image.dtype == torch.uint8


@pytest.mark.parametrize("channels", [2, 6])
def test_policies_take_any_number_of_channels(channels):
    check_policy(DetectionPolicy, channels=channels, size=40, mosaic=1.0)
    check_policy(SegmentationPolicy, channels=channels, size=40, crop=32)
    image = sample(torch.float32, channels).image
    assert distort(image, 1.0) is image  # these are no colors


def test_photometric_changes_of_deep_images_are_those_of_8_bits():
    image = sample(torch.float32).image.round()
    torch.manual_seed(0)
    deep_found = distort(image, 1.0)
    torch.manual_seed(0)
    assert deep_found.dtype == torch.float32
    assert (deep_found - distort(image.byte(), 1.0)).abs().max() < 1


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_pictures_of_any_image(channels, kind):
    answer = Prediction(semantic=torch.zeros(20, 30, dtype=torch.long))
    picture = draw(sample(kind, channels).image, answer, ["a"])
    assert picture.dtype == torch.uint8 and picture.shape == (3, 20, 30)


CONFIG = """
model:
  backbone: {{name: timm, model: vit_tiny_patch16_224, img_size: 32, in_chans: {channels},
             options: {{depth: 4, embed_dim: 48}}}}
  neck: {{name: simple_feature_pyramid, channels: 16}}
  head: linear
data:
  dataset: {{name: folders, range: {range}}}
  root: {root}
  train: train
  val: train
  transforms: {{name: segmentation, size: 32, crop: 32}}
  workers: 0
train: {{steps: 2, batch_size: 2, evaluations: 1, pictures: 1}}
output: {root}/run
"""


def make_set(root: Path, channels: int) -> np.ndarray:
    """Two pictures of 12 bits: grey PNG, or arrays of more channels."""
    pixels = deep(32, 40, channels) >> 4
    for name in ("a", "b"):
        for folder in ("images/train", "labels/train"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        if channels == 1:
            Image.fromarray(pixels[..., 0]).save(root / f"images/train/{name}.png")
        else:
            np.save(root / f"images/train/{name}.npy", pixels)
        labels = (pixels[..., 0] > 2000).astype(np.uint8)
        Image.fromarray(labels).save(root / f"labels/train/{name}.png")
    (root / "classes.txt").write_text("dark\nbright\n")
    return pixels


@pytest.mark.parametrize("channels", [1, 6])
def test_trains_and_predicts(tmp_path, channels):
    pixels = make_set(tmp_path, channels)
    check_dataset(FoldersDataset, tmp_path, "train", channels=channels, range=(0, 4095))
    text = CONFIG.format(root=tmp_path, channels=channels, range="[0, 4095]")
    results = train(configs.loads(text, str(tmp_path / "test.yaml")))
    assert results["steps"] == 2 and 0 <= results["mIoU"] <= 1
    assert (tmp_path / "run/pictures/step_000002.jpg").is_file()
    predictor = Predictor.load(tmp_path / "run/model.safetensors", "cpu")
    (file,) = sorted((tmp_path / "images/train").glob("a.*"))
    from_file = predictor(file)
    assert from_file.semantic.shape == (32, 40)
    for image in (pixels, pixels.astype(np.float64), torch.from_numpy(pixels).movedim(2, 0)):
        assert torch.equal(predictor(image).semantic, from_file.semantic)
    assert predictor.draw(file, from_file).width >= 40
    prepared = predictor.sample(file).image
    assert 200 < prepared.max() <= 255  # 12 bits fill the range


@pytest.mark.parametrize("limits", ["[0, 4095]", "null"])
def test_the_command_predict_draws_deep_images_as_they_are_seen(tmp_path, limits):
    make_set(tmp_path, 1)
    config = configs.loads(CONFIG.format(root=tmp_path, channels=1, range=limits), "test")
    path = tmp_path / "model.safetensors"
    meta = Meta(configs.dump(config), ["dark", "bright"], [0, 1], "semantic", 1, {}, "0")
    save_model(path, config.model(2), meta)
    file = tmp_path / "images/train/a.png"
    predict(path, [file], tmp_path / "out", device="cpu")
    predictor = Predictor.load(path, "cpu")
    expected = np.array(predictor.draw(file, predictor(file))).astype(np.float32)
    drawn = np.array(Image.open(tmp_path / "out/a.jpg")).astype(np.float32)
    assert np.abs(drawn - expected).mean() < 8  # of the JPEG; twice scaled, it was near black
    pixels = read_image(file, 1, limits=None if limits == "null" else (0, 4095))
    assert expected.std() > 0.2 * pixels.std() > 0


def test_a_model_of_other_channels_is_an_error(tmp_path):
    make_set(tmp_path, 6)
    text = CONFIG.format(root=tmp_path, channels=5, range="null")
    with pytest.raises(DataError, match=r"\.npy: has 6 channels, the model takes 5; set in_chans"):
        train(configs.loads(text, str(tmp_path / "test.yaml")))
