"""What the commands `predict` and `eval` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from vitdense import config as configs
from vitdense.config import Config
from vitdense.data.base import DataError, Dataset
from vitdense.data.images import image_size, is_turned
from vitdense.engine import build, checkpoint, runtime
from vitdense.engine.checkpoint import CheckpointError, Meta
from vitdense.engine.evaluate import check_inference
from vitdense.engine.evaluate import evaluate as measure
from vitdense.engine.transfer import first_name
from vitdense.inference.files import ImageFile, find_images
from vitdense.inference.inputs import to_sample
from vitdense.inference.outputs import make_writers
from vitdense.inference.predictor import Predictor
from vitdense.inference.report import table, to_json
from vitdense.structures import Batch, Prediction, Sample, Size

READERS = 8
"""Threads that decode images; a chunk of at least as many is read at a time."""

BAR = "{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
"""Of progress in parts of images, for large ones."""


def predict(
    model_path: Path | str,
    inputs: Sequence[Path | str],
    out: Path | str,
    threshold: float = 0.3,
    batch_size: int = 1,
    device: str = "auto",
    overrides: Iterable[str] = (),
) -> None:
    """Predict images and write what is found.

    `out/<name>.jpg` shows it; for detectors `out/predictions.json` holds all detections in COCO's
    result format, for semantic models `out/labels/<name>.png` the labels of the data set, for
    panoptic ones `out/panoptic.json` and `out/panoptic/<name>.png` the segments in COCO's format;
    for models with an image head `out/images.csv` also the scores of labels of whole images.

    Args:
        inputs: image files, folders (with subfolders, which `out` then has too), patterns.
        threshold: objects of a lower score are not drawn; `predictions.json` has them.
        overrides: of the model's config, `inference.window=512` and the like.

    Raises:
        CheckpointError: there is no model at `model_path`.
        DataError: there are no images; or, when all others are done, some could not be read.
        ValueError: a threshold, batch size or device that cannot be, or an `out` above the images.
    """
    _check_options(threshold, batch_size)
    if not inputs:
        raise ValueError("images: none are given; name files, folders or patterns")
    files = find_images(inputs)
    predictor = Predictor.load(Path(model_path), device, overrides)
    folder = _make_folder(Path(out), files)
    writers = make_writers(predictor, folder)
    faults: list[str] = []
    turned: list[Path] = []
    with tqdm(total=len(files), unit="image", disable=None, bar_format=BAR) as bar:

        def advance(images: float) -> None:
            bar.update(min(images, len(files) - bar.n))  # a sum of parts may come out above

        for found in _in_chunks(files, max(batch_size, READERS)):
            samples = list(_read(found, predictor, faults, turned))
            for start in range(0, len(samples), batch_size):
                part = samples[start : start + batch_size]
                prepared = [predictor.policy.evaluate(sample) for _, sample in part]
                answers = predictor.answer(prepared, advance)
                for (file, sample), prediction in zip(part, answers, strict=True):
                    for writer in writers:
                        writer.add(file, prediction)
                    _save_overlay(predictor, sample, prediction, folder, file, threshold)
            advance(len(found) - len(samples))
    done = len(files) - len(faults)
    places = ", ".join(str(writer.close()) for writer in writers)
    print(f"{done} image{'s' if done != 1 else ''}: {folder}, {places}", file=sys.stderr)
    _tell_of(turned, faults, len(files))


def evaluate(
    target: Path | str,
    weights: Path | str | None = None,
    overrides: Iterable[str] = (),
    json_path: Path | str | None = None,
) -> dict[str, float]:
    """Measure a model on the validation split, and print the numbers.

    Args:
        target: a config, or a `model.safetensors`, which has its config within.
        weights: for a config, the model's file; by default `model.safetensors` of its run.
        overrides: `data.root=...` and the like.
        json_path: where the numbers are written too.

    Raises:
        CheckpointError: there are no weights, or they do not fit.
        DataError: data is missing, or of other classes than the model.
    """
    config, path = _config_and_weights(Path(target), weights, overrides)
    meta = checkpoint.read_meta(path)
    if config.train.batch_size == "auto":
        trained = configs.loads(meta.config, str(path))
        config = build.with_batch_size(config, build.batch_size(trained.train))
    place = runtime.start(config.device)
    source = config.data
    dataset = build.build_split(source, source.val, meta.image_classes or None)
    _check_classes(dataset, meta, config)
    part = checkpoint.without_weights(config.model)
    model = checkpoint.make_model(part, len(meta.classes), len(meta.image_classes))
    build.check_truth(model.task, dataset)
    checkpoint.load_weights(path, model)
    dataset.channels = model.in_chans
    model.to(place.device)
    data = build.Data(train=dataset, val=dataset, policy=source.transforms())
    loader = build.evaluation_loader(config, data, model, place)
    labels = build.labels_of(model, dataset)
    metric = build.build_metric(
        config, model.task, meta.classes, dataset.things, labels, dataset.frequencies
    )
    check_inference(config.inference, model, metric)
    precision = runtime.choose_precision(config.train.precision, place.device)
    start = time.perf_counter()
    with tqdm(total=loader.images, unit="image", disable=None if place.is_main else True) as bar:

        def watch(batch: Batch, predictions: list[Prediction]) -> None:
            bar.update(len(predictions))

        numbers = measure(model, loader, metric, place.device, precision, watch, config.inference)
    if place.is_main:
        seconds = time.perf_counter() - start
        if json_path is not None:  # first: a reader like `head` may end the printing
            checkpoint.write_text(Path(json_path), to_json(numbers))
        print(f"{path} on {source.root}, split '{source.val}': {len(dataset)} images, "
              f"{len(dataset) / seconds:.1f} a second")  # fmt: skip
        print(table(numbers))
    return numbers


def _check_options(threshold: float, batch_size: int) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: {threshold} is no score; give a number in 0..1")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} must be at least 1")


def _make_folder(out: Path, files: list[ImageFile]) -> Path:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    place = out.resolve()
    for file in files:
        # Pictures could take the place of the images, and label maps that of the truth.
        if file.path.resolve().is_relative_to(place):
            raise ValueError(f"out: {out} holds {file.path}, an image to predict; name another")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _in_chunks(files: list[ImageFile], size: int) -> Iterator[list[ImageFile]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def _read(
    files: list[ImageFile], predictor: Predictor, faults: list[str], turned: list[Path]
) -> Iterator[tuple[ImageFile, Sample]]:
    """Decode files side by side; those that cannot be are noted in `faults`.

    Photos that stay as they are stored, though not as they are to be seen, are noted in `turned`.
    """

    def read(file: ImageFile) -> Sample | DataError:
        try:
            size = _turned_size(file)
            if size is None and is_turned(file.path):
                turned.append(file.path)
            return to_sample(file.path, predictor.model.in_chans, 0, predictor.range, size)
        except DataError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        for file, sample in zip(files, pool.map(read, files), strict=True):
            if isinstance(sample, DataError):
                faults.append(str(sample))
            else:
                yield file, sample


def _tell_of(turned: list[Path], faults: list[str], images: int) -> None:
    """Print what may be wrong with the answers; raises DataError for images without one."""
    if turned:
        print(
            f"{len(turned)} of them are photos taken as they are stored, though the camera was "
            f"held otherwise, as {min(turned)}: turn them first if the model knows upright ones",
            file=sys.stderr,
        )
    if faults:
        more = f"\n... and {len(faults) - 5} more" if len(faults) > 5 else ""
        listed = "\n".join(faults[:5]) + more
        raise DataError(f"{len(faults)} of {images} images were left out:\n{listed}")


def _turned_size(file: ImageFile) -> Size | None:
    """The size by a COCO file of a photo stored on its side, which training turned too."""
    if file.size is None or file.size[0] == file.size[1]:
        return None
    return file.size if image_size(file.path) == file.size[::-1] else None


def _save_overlay(
    predictor: Predictor,
    sample: Sample,
    prediction: Prediction,
    folder: Path,
    file: ImageFile,
    threshold: float,
) -> None:
    path = folder / f"{file.name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    predictor.draw_pixels(sample.image, prediction, threshold).save(path, quality=90)


def _config_and_weights(
    target: Path, weights: Path | str | None, overrides: Iterable[str]
) -> tuple[Config, Path]:
    if target.suffix in {".yaml", ".yml"}:
        config = configs.load(target, overrides)
        path = Path(weights or config.output / "model.safetensors")
        if not path.is_file():
            raise CheckpointError(
                f"{path}: there is no model; train it with `vitdense train {target}`, or name the "
                "file with --weights"
            )
        return config, path
    if weights is not None:
        raise ValueError(f"weights: {target} has its own; give a config with other weights")
    meta = checkpoint.read_meta(target)
    return configs.loads(meta.config, str(target), overrides), target


def _check_classes(dataset: Dataset, meta: Meta, config: Config) -> None:
    ours, theirs = meta.classes, list(dataset.classes)
    if [first_name(name) for name in ours] == [first_name(name) for name in theirs]:
        return
    odd = sorted(set(ours) ^ set(theirs))
    what = f"only one of them has {', '.join(odd[:5])}" if odd else "their order differs"
    raise DataError(
        f"{config.data.root}: split '{config.data.val}' has {len(theirs)} classes and the model "
        f"{len(ours)}: {what}; evaluate on data with the classes that it was trained on"
    )
