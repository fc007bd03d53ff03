"""Windows, flips and scales: what they must equal, whatever the size of the image."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitdense.backbones.survey import Canvas
from vitdense.config.schema import Inference
from vitdense.data.collate import collate
from vitdense.engine.evaluate import answer, check_inference, place
from vitdense.engine.views import make_views, mean_scores
from vitdense.engine.windows import Mosaic, window_places, window_starts, window_weights
from vitdense.heads.segmentation.base import classify
from vitdense.heads.segmentation.mask_head import MaskHead, MaskOutputs
from vitdense.metrics.miou import MeanIoU
from vitdense.models.base import Model
from vitdense.ops import rows
from vitdense.structures import Batch, Frame, Level, Prediction, Sample, Size, Target

CPU = torch.device("cpu")
BLENDS = st.sampled_from(["flat", "gaussian", "center"])


class ConvModel(Model):
    """Scores at a stride: means of patches, then convolutions that look `radius` cells around."""

    task = "semantic"

    def __init__(self, divisor: int = 8, stride: int = 1, radius: int = 0, classes: int = 5):
        super().__init__()
        self.divisor, self.stride, self.num_classes = divisor, stride, classes
        self.conv = nn.Conv2d(3, classes, 2 * radius + 1, padding=radius)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Tensor:
        self.calls.append(tuple(images.shape))
        assert images.shape[-2] % self.divisor == 0 and images.shape[-1] % self.divisor == 0
        return self.conv(F.avg_pool2d(images.float() / 255, self.stride))

    def semantic_logits(self, outputs: Tensor) -> Tensor:
        return outputs

    def predict(self, outputs: Tensor, frames: list[Frame]) -> list[Prediction]:
        pairs = zip(outputs, frames, strict=True)
        return [Prediction(semantic=classify(logits, frame)) for logits, frame in pairs]


def make_model(**options: int) -> ConvModel:
    torch.manual_seed(0)
    return ConvModel(**options).eval()


def make_batch(sizes: list[Size], divisor: int, originals: list[Size] | None = None) -> Batch:
    """Images of one canvas as the loader lays them."""
    generator = torch.Generator().manual_seed(sum(sizes[0]))
    samples = []
    for index, size in enumerate(sizes):
        # smooth, so that no two classes come close to a tie at most pixels
        coarse = torch.rand(1, 3, size[0] // 6 + 2, size[1] // 6 + 2, generator=generator) * 255
        image = F.interpolate(coarse, size, mode="bilinear")[0].byte()
        original = originals[index] if originals else size
        samples.append(Sample(image, Target(), index, original, None))  # type: ignore[arg-type]
    (batch,) = collate(samples, divisor=divisor, training=False)
    return batch


def labels(model: Model, batch: Batch, **options) -> list[Tensor]:
    predictions = answer(model, batch, torch.float32, Inference(**options))
    return [prediction.semantic for prediction in predictions]


@settings(max_examples=60)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    overlap=st.floats(0, 0.9),
    blend=BLENDS,
    stride=st.sampled_from([1, 2, 8]),
    factor=st.sampled_from([1.0, 0.6, 1.7]),
    batch_size=st.integers(1, 5),
)
def test_windows_equal_the_whole_for_a_model_of_single_cells(
    height, width, window, overlap, blend, stride, factor, batch_size
):
    """Exactly, on any size, also when the prepared image is not of the original size."""
    model = make_model(stride=stride)
    original = (max(1, round(height * factor)), max(1, round(width * factor)))
    batch = make_batch([(height, width)], 8, [original])
    (whole,) = labels(model, batch)
    sides = (window[0] * 8, window[1] * 8)
    options = {"overlap": overlap, "blend": blend, "batch_size": batch_size}
    (found,) = labels(model, batch, window=sides, **options)
    assert whole.shape == original
    assert torch.equal(found, whole)
    assert {call[2:] for call in model.calls[1:]} == {sides}
    assert all(call[0] <= batch_size for call in model.calls[1:])


@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(33, 90), st.integers(33, 90)),
    overlap=st.sampled_from([0.5, 0.6, 0.75]),
    stride=st.sampled_from([1, 4]),
)
def test_windows_equal_the_whole_where_the_receptive_field_fits_the_overlap(size, overlap, stride):
    """With `center` each cell comes from a window that sees all around it that the cell looks at.

    Windows of 32 overlap by 16 pixels or more: 8 to each side, of which cells of a pixel look at
    7, those of 4 pixels at 2 whole cells.
    """
    model = make_model(stride=stride, radius=7 if stride == 1 else 2)
    batch = make_batch([size], 8)
    with torch.no_grad():
        whole = model(batch.images)
    asked = Inference(window=32, overlap=overlap, blend="center")
    mosaic = Mosaic(model, batch.images, asked, 8)
    found = mosaic.read(0, 0, mosaic.size[0])
    torch.testing.assert_close(found[None], whole, rtol=0, atol=2e-6)
    assert len(model.calls) > 2
    flat = Mosaic(model, batch.images, Inference(window=32, overlap=overlap), 8)
    assert (flat.read(0, 0, flat.size[0]) - found).abs().max() > 1e-3


@given(
    units=st.integers(1, 40),
    window=st.integers(1, 12),
    overlap=st.floats(0, 0.99),
    divisor=st.sampled_from([1, 14, 32]),
    blend=BLENDS,
)
def test_windows_cover_all_and_overlap_enough(units, window, overlap, divisor, blend):
    length, side = units * divisor, window * divisor
    starts = window_starts(length, side, overlap, divisor)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert all(start % divisor == 0 for start in starts)
    assert starts[-1] == max(0, length - side)
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    # a window moves by one unit at least, however much they are to overlap
    assert all(step <= max(divisor, side * (1 - overlap) + 1e-3) for step in steps)
    places = window_places(starts, side, length, blend)
    count = torch.zeros(length)
    for place_ in places:
        assert place_.start <= place_.first < place_.last <= min(place_.start + side, length)
        count[place_.first : place_.last] += 1
    if blend == "center":
        assert (count == 1).all()
    else:
        expected = torch.zeros(length)
        for start in starts:
            expected[start : start + side] += 1
        assert torch.equal(count, expected) and count.min() >= 1


def test_windows_lie_as_in_mmseg_but_for_patches():
    """512 / 341 is 512 with a third of overlap, the step cut down to whole patches."""
    assert window_starts(683, 512, 1 / 3, 1) == [0, 171]
    assert window_starts(2048, 512, 1 / 3, 1) == [0, 341, 682, 1023, 1364, 1536]
    assert window_starts(2048, 512, 1 / 3, 16) == [0, 336, 672, 1008, 1344, 1536]
    assert window_starts(160 + 144, 160, 0.1, 16) == [0, 144]


def test_gaussian_weights():
    weights = window_weights(64, "gaussian").tolist()
    expected = [math.exp(-(((i - 31.5) / 8) ** 2) / 2) for i in range(64)]
    assert weights == pytest.approx(expected, rel=1e-4)
    assert (window_weights(64, "flat") == 1).all()


@pytest.mark.parametrize("blend", ["flat", "gaussian"])
def test_scores_are_means_by_weight(blend):
    """Against a plain sum over all windows divided by a sum of weights."""
    model = make_model(stride=4, radius=3)
    batch = make_batch([(88, 120)], 8)
    asked = Inference(window=(32, 48), blend=blend, batch_size=3)
    mosaic = Mosaic(lambda images: model(images).detach(), batch.images, asked, 8)
    total, weight = torch.zeros(5, 22, 30), torch.zeros(22, 30)
    tall, wide = window_weights(8, blend), window_weights(12, blend)
    for top in window_starts(88, 32, 1 / 3, 8):
        for left in window_starts(120, 48, 1 / 3, 8):
            crop = batch.images[..., top : top + 32, left : left + 48]
            y, x = slice(top // 4, top // 4 + 8), slice(left // 4, left // 4 + 12)
            total[:, y, x] += model(crop)[0].detach() * tall[:, None] * wide
            weight[y, x] += tall[:, None] * wide
    torch.testing.assert_close(mosaic.read(0, 0, 22), total / weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blend", ["flat", "gaussian", "center"])
@pytest.mark.parametrize("factor", [1.0, 0.4, 2.3])
def test_bands_equal_the_map_at_once(blend, factor, monkeypatch):
    """Few rows are kept, and the answer is that of all rows together."""
    model = make_model(radius=1)
    size, original = (203, 61), (round(203 * factor), round(61 * factor))
    batch = make_batch([size], 8, [original])
    asked = Inference(window=32, overlap=0.4, blend=blend)
    at_once = Mosaic(model, batch.images, asked, 8)
    frame = batch.frames[0]
    with torch.no_grad():
        full = at_once.read(0, 0, at_once.size[0]).clone()
    expected = classify(full, frame)
    monkeypatch.setitem(rows.CHUNK, "cpu", 5 * 7 * max(original[1], 64))
    (view,) = make_views(model, batch.images, batch.frames, asked, 8, CPU)
    assert view.mosaic.ring.shape[2] < 80 < at_once.ring.shape[2] == 208
    assert torch.equal(answer(model, batch, torch.float32, asked)[0].semantic, expected)
    agreement = (expected == frame.restore_map(full).argmax(0)).float().mean()
    assert agreement > 0.9999


@settings(max_examples=60)
@given(
    canvas=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    padding=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    original=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    stride=st.sampled_from([1, 2, 4, 8]),
    step=st.integers(1, 30),
)
def test_restored_rows_equal_the_restored_map(canvas, padding, original, stride, step):
    canvas = (canvas[0] * 8, canvas[1] * 8)
    content = (canvas[0] - padding[0], canvas[1] - padding[1])
    frame = Frame(canvas, content, original)
    size = (canvas[0] // stride, canvas[1] // stride)
    maps = torch.randn(3, *size, generator=torch.Generator().manual_seed(step))
    most = rows.rows_needed(step, size, frame)

    def read(first: int, last: int) -> Tensor:
        assert 0 <= first < last <= size[0] and last - first <= most
        return maps[:, first:last]

    parts = [
        rows.restore_rows(read, size, frame, first, min(first + step, original[0]))
        for first in range(0, original[0], step)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), frame.restore_map(maps), rtol=1e-5, atol=2e-5)


def test_a_batch_of_different_sizes():
    """Each image's answer is its own: sizes on one canvas, and other originals."""
    model = make_model(stride=4, radius=2)
    sizes = [(57, 90), (64, 96), (60, 89)]
    originals = [(57, 90), (30, 41), (100, 170)]
    batch = make_batch(sizes, 8, originals)
    for options in ({"window": 32}, {"window": 32, "flip": True, "scales": (1.0, 1.5)}):
        for batch_size in (1, 4, 30):
            found = labels(model, batch, batch_size=batch_size, **options)
            for index in range(3):
                alone = Batch(batch.images[index : index + 1], [Target()],
                              [batch.frames[index]], [0], batch.paths[:1])  # fmt: skip
                (expected,) = labels(model, alone, **options)
                assert found[index].shape == originals[index]
                assert (found[index] == expected).float().mean() > 0.999


def manual_view(model: Model, batch: Batch, scale: float, flip: bool) -> Tensor:
    """Probabilities at original size, by torch's own resizing of one image without padding."""
    from torchvision.transforms.v2.functional import resize

    height, width = (round(side * scale) for side in batch.frames[0].content)
    image = batch.images[0, :, : batch.frames[0].content[0], : batch.frames[0].content[1]]
    image = resize(image, [height, width], antialias=True)
    image = image.flip(-1) if flip else image
    canvas = F.pad(image, (0, -width % 8, 0, -height % 8))
    frame = Frame((canvas.shape[1], canvas.shape[2]), (height, width), batch.frames[0].original)
    scores = frame.restore_map(model(canvas[None])[0])
    return (scores.flip(-1) if flip else scores).softmax(0)


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75)])
@pytest.mark.parametrize("window", [None, 96])
@torch.no_grad()
def test_flips_and_scales_are_averaged_probabilities(scales, window):
    """With windows that a whole view fits into too."""
    model = make_model(stride=4, radius=2)
    batch = make_batch([(41, 52)], 8, [(70, 81)])
    views = [manual_view(model, batch, scale, flip) for scale in scales for flip in (False, True)]
    expected = torch.stack(views).mean(0)
    asked = Inference(flip=True, scales=scales, window=window)
    if window is None:
        made = make_views(model, batch.images, batch.frames, asked, 8, CPU)
        found = mean_scores(made, 0, 0, 70)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (found,) = labels(model, batch, flip=True, scales=scales, window=window)
    assert found.shape == (70, 81)
    assert (found == expected.argmax(0)).float().mean() > (0.999 if window is None else 0.98)


def test_a_flip_alone_changes_nothing_for_an_even_model():
    model = make_model()
    batch = make_batch([(43, 61)], 8)
    (whole,) = labels(model, batch)
    assert torch.equal(labels(model, batch, flip=True)[0], whole)
    assert torch.equal(labels(model, batch, flip=True, window=32)[0], whole)


def test_scores_that_do_not_lie_on_whole_cells():
    """Windows of 24 with 18 cells begin at 8, which is cell 6; with 7 cells they do not."""

    class Odd(ConvModel):
        def forward(self, images: Tensor, targets: list[Target] | None = None) -> Tensor:
            scores = super().forward(images)
            sides = [side * self.cells // 24 for side in images.shape[-2:]]
            return F.adaptive_avg_pool2d(scores, sides)

    torch.manual_seed(0)
    model = Odd(divisor=8)
    batch = make_batch([(40, 64)], 8)
    sizes = {}
    for model.cells in (18, 7):
        asked = Inference(window=24)
        mosaic = Mosaic(lambda images: model(images).detach(), batch.images, asked, 8)
        sizes[model.cells] = mosaic.size
        assert mosaic.read(0, 0, mosaic.size[0]).isfinite().all()
        assert labels(model, batch, window=24)[0].shape == (40, 64)
    assert sizes == {18: (30, 48), 7: (40, 64)}


def test_progress_adds_up_to_one():
    model = make_model()
    batch = make_batch([(57, 90), (64, 96)], 8)
    for asked in (Inference(), Inference(window=32, flip=True)):
        parts: list[float] = []
        answer(model, batch, torch.float32, asked, parts.append)
        assert sum(parts) == pytest.approx(1)


def test_images_stay_where_they_are_if_windows_go_to_the_device():
    batch = make_batch([(57, 90)], 8)
    placed = place(batch, torch.device("meta"), Inference(window=32))
    assert placed.images is batch.images and placed.frames == batch.frames
    assert place(batch, torch.device("meta"), Inference(flip=True)).images.is_meta


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        ({"window": 36}, "semantic", r"inference.window: 36 is no multiple of 8, .* give 32 or 40"),
        ({"window": (32, 5)}, "semantic", "inference.window: 5 is no multiple of 8, .* give 8"),
        ({"window": 32}, "detection", "inference.window: .* this one's task is detection; remove"),
        ({"flip": True}, "instance", "inference.flip: is for semantic models"),
        ({"scales": (0.5, 1)}, "panoptic", "inference.scales: is for semantic models"),
    ],
)
def test_what_a_model_cannot_do_is_refused(options, task, message):
    model = make_model()
    model.task = task
    with pytest.raises(ValueError, match=message):
        check_inference(Inference(**options), model)
    check_inference(Inference(), model)


def test_windows_fit_a_backbone_of_one_size():
    model = make_model()
    model.backbone = nn.Module()
    model.backbone.canvas = Canvas("beit", (64, 64), fixed=True)
    for window in (32, 64, (64, 32)):
        check_inference(Inference(window=window), model)
    with pytest.raises(ValueError, match=r"^inference.window: beit has a fixed .* of 64x64, the"):
        check_inference(Inference(window=(64, 96)), model)


def test_a_model_without_scores_is_refused(tiny_model):
    with pytest.raises(ValueError, match="inference.window: TinyModel has no method semantic_lo"):
        check_inference(Inference(window=32), tiny_model)
    with pytest.raises(ValueError, match="metric.calibration: TinyModel has no method semantic_lo"):
        check_inference(Inference(), tiny_model, MeanIoU(["a"], calibration=True))
    check_inference(Inference(), tiny_model, MeanIoU(["a"]))


@pytest.mark.parametrize("flip", [False, True])
def test_confidence_is_the_probability_of_the_answer(flip: bool) -> None:
    model, batch = make_model(divisor=8), make_batch([(21, 40), (24, 33)], 8)
    settings_ = Inference(flip=flip)
    for index, prediction in enumerate(
        answer(model, batch, torch.float32, settings_, confidence=True)
    ):
        frame = batch.frames[index]
        scores = frame.restore_map(model(batch.images)[index])
        probability, label = scores.softmax(0).max(0)
        assert torch.equal(prediction.semantic, label)  # of single pixels: mirroring is nothing
        assert torch.allclose(prediction.confidence, probability, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_scores_of_masks_are_no_logits(flip: bool) -> None:
    sure = MaskHead([Level(3, 8)], 150, "semantic")
    classes = torch.full((1, 1, 150, 151), -9.0)
    classes[..., :150].diagonal(dim1=-2, dim2=-1).fill_(9.0)
    masks = torch.full((1, 150, 3, 5), -9.0)
    masks[:, 7] = 9.0
    model, batch = make_model(divisor=8), make_batch([(21, 40)], 8)
    scores = sure.semantic_logits(MaskOutputs(classes, [masks], (24, 40)))
    model.semantic_logits = lambda outputs: scores  # type: ignore[method-assign]
    model.probabilities = sure.probabilities  # type: ignore[method-assign]
    (found,) = answer(model, batch, torch.float32, Inference(flip=flip), confidence=True)
    assert found.semantic.eq(7).all()
    assert torch.allclose(found.confidence, (scores[0, 7] / scores[0].sum(0))[0, 0])
    assert found.confidence.min() > 0.9
