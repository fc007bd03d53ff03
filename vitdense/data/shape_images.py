"""Pictures of the `shapes` data set: textured shapes on textured ground, and their exact masks."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

CLASSES = ("circle", "ring", "square", "star", "triangle")

Map = NDArray[np.floating]

_EMPTY = 0.04
_MOST = 5
_RADIUS = (0.1, 0.27)  # fractions of the image's side
_COVERED = 0.35
_TYPICAL = 0.9


@dataclass(frozen=True)
class Scene:
    """One picture and its truth.

    Attributes:
        image: uint8 [S, S, 3].
        labels: index into CLASSES of each object.
        layers: uint8 [S, S], 0 where the ground is seen and k where the k-th object is, from 1.
    """

    image: NDArray[np.uint8]
    labels: list[int]
    layers: NDArray[np.uint8]


@dataclass(frozen=True)
class _Patch:
    """A square part of the image around an object, in pixels, and the object's outline there.

    Attributes:
        u, v: coordinates on the object, turned with it, in units of its radius.
        alpha: how far each pixel is covered, 0..1.
    """

    rows: slice
    columns: slice
    u: Map
    v: Map
    alpha: Map


def make_scene(size: int, rng: Generator) -> Scene:
    """A square picture of `size` pixels with 0 to 5 objects."""
    image = _ground(size, rng)
    layers = np.zeros((size, size), dtype=np.uint8)
    areas: list[int] = []
    labels: list[int] = []
    count = 0 if rng.random() < _EMPTY else int(rng.integers(1, _MOST + 1))
    for _ in range(4 * count):
        if len(labels) == count:
            break
        label = int(rng.integers(len(CLASSES)))
        patch = _place(label, size, rng)
        covered = _cover(layers, patch, len(labels) + 1)
        if _hides(covered, areas, patch):
            continue
        layers = covered
        areas.append(int((patch.alpha > 0.5).sum()))
        labels.append(label)
        _paint(image, patch, label, rng)
    grain = rng.normal(0, rng.uniform(0, 0.025), image.shape)
    pixels = np.clip((image + grain) * 255, 0, 255).astype(np.uint8)
    return Scene(pixels, labels, layers)


def _cover(layers: NDArray[np.uint8], patch: _Patch, number: int) -> NDArray[np.uint8]:
    covered = layers.copy()
    covered[patch.rows, patch.columns][patch.alpha > 0.5] = number
    return covered


def _hides(covered: NDArray[np.uint8], areas: list[int], patch: _Patch) -> bool:
    """Whether too little of an object is left to be told by."""
    if (patch.alpha > 0.5).sum() < 40:
        return True
    seen = np.bincount(covered.ravel(), minlength=len(areas) + 2)[1 : len(areas) + 1]
    return bool((seen < (1 - _COVERED) * np.array(areas)).any())


def _place(label: int, size: int, rng: Generator) -> _Patch:
    """A shape of random size, stretch, turn and place; up to a quarter may lie outside."""
    radius = size * np.exp(rng.uniform(*np.log(_RADIUS)))
    x, y = rng.uniform(0.5 * radius, size - 0.5 * radius, size=2)
    stretch, angle = np.exp(rng.uniform(-0.12, 0.12)), rng.uniform(0, 2 * np.pi)
    reach = radius * 1.3 + 2
    rows, columns = (
        slice(max(0, int(center - reach)), min(size, int(center + reach) + 1)) for center in (y, x)
    )
    down = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - y)[:, None]
    right = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - x)[None]
    cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    u = (right * cos + down * sin) * np.float32(stretch)
    v = (down * cos - right * sin) / np.float32(stretch)
    return _Patch(rows, columns, u, v, np.clip(0.5 - _outline(label, u, v) * radius, 0, 1))


def _outline(label: int, u: Map, v: Map) -> Map:
    """Distance to the outline in units of the radius, negative inside."""
    name = CLASSES[label]
    if name == "circle":
        return np.hypot(u, v) - 0.95
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.72) - 0.24
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.78
    if name == "triangle":
        return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.55
    return _star(u, v)


def _star(u: Map, v: Map) -> Map:
    """Five points: one half of one point, turned and mirrored to all."""
    step = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, v) + step / 2) % step - step / 2)
    distance = np.hypot(u, v)
    x, y = distance * np.sin(angle), distance * np.cos(angle)
    tip, notch = np.array([0.0, 1.05]), 0.5 * np.array([np.sin(step / 2), np.cos(step / 2)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return (x * normal[0] + (y - tip[1]) * normal[1]).astype(np.float32)


def _paint(image: Map, patch: _Patch, label: int, rng: Generator) -> None:
    """Lay the object, lit from one side and with a dark rim, over what is there."""
    blend = _texture(patch.u, patch.v, rng)[..., None]
    colors = _vivid(_hue(label, rng), rng), _vivid(rng.random(), rng)
    paint = colors[0] * blend + (0.75 * colors[0] + 0.25 * colors[1]) * (1 - blend)
    light = 1 + 0.18 * (patch.u * rng.uniform(-1, 1) + patch.v * rng.uniform(-1, 1))
    rim = 1 - rng.uniform(0, 0.5) * (patch.alpha < 1)
    alpha = patch.alpha[..., None]
    under = image[patch.rows, patch.columns]
    image[patch.rows, patch.columns] = (
        under * (1 - alpha) + paint * (light * rim)[..., None] * alpha
    )


def _ground(size: int, rng: Generator) -> Map:
    """A muted gradient with a texture and soft spots."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    u, v = np.broadcast_arrays(axis[None], axis[:, None])
    slope = np.clip(0.5 + 0.5 * (u * rng.uniform(-1, 1) + v * rng.uniform(-1, 1)), 0, 1)
    first, second = _muted(rng), _muted(rng)
    ground = first * slope[..., None] + second * (1 - slope[..., None])
    spots = _smooth_noise(size, int(rng.integers(3, 9)), rng) * rng.uniform(0.05, 0.2)
    angle, zoom = rng.uniform(0, np.pi), rng.uniform(1, 3)
    across = zoom * (u * np.cos(angle) + v * np.sin(angle))
    along = zoom * (v * np.cos(angle) - u * np.sin(angle))
    pattern = (_texture(across, along, rng) - 0.5) * rng.uniform(0, 0.16)
    return (ground + (spots + pattern)[..., None]).astype(np.float32)


def _texture(u: Map, v: Map, rng: Generator) -> Map:
    """A pattern with values in 0..1: plain, gradient, stripes, checks, dots or blotches."""
    kind = rng.integers(6)
    waves = np.float32(rng.uniform(4, 9))
    if kind == 0:
        return np.ones_like(u)
    if kind == 1:
        return np.clip(0.5 + 0.5 * u, 0, 1)
    if kind == 2:
        return _soft(np.sin(waves * u))
    if kind == 3:
        return _soft(np.sin(waves * u) * np.sin(waves * v) * 2)
    if kind == 4:
        return _soft(np.cos(waves * u) + np.cos(waves * v) - 0.6)
    a, b = rng.uniform(0, 6, size=2)
    return _soft(
        np.sin(waves * u + 2 * np.sin(3 * v + a)) + np.sin(waves * v + 2 * np.sin(3 * u + b))
    )


def _soft(wave: Map) -> Map:
    """A wave made nearly two-valued, with edges that are a few pixels wide."""
    return np.clip(0.5 + 2 * wave, 0, 1)


def _smooth_noise(size: int, cells: int, rng: Generator) -> Map:
    """Random values in -1..1 on a coarse grid, interpolated to [size, size]."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
    place = np.linspace(0, cells, size)
    low = np.minimum(place.astype(int), cells - 1)
    part = place - low
    weights = np.zeros((size, cells + 1))
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] = part
    return (weights @ grid @ weights.T).astype(np.float32)


def _hue(label: int, rng: Generator) -> float:
    """Most objects have about the hue of their class, as things in the world do, but not all."""
    if rng.random() > _TYPICAL:
        return rng.random()
    return label / len(CLASSES) + rng.normal(0, 0.04)


def _vivid(hue: float, rng: Generator) -> Map:
    """RGB in 0..1 of an object."""
    return _rgb(hue % 1.0, rng.uniform(0.55, 1), rng.uniform(0.6, 1))


def _muted(rng: Generator) -> Map:
    """RGB in 0..1 of the ground."""
    return _rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.2, 0.75))


def _rgb(hue: float, saturation: float, value: float) -> Map:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32)
