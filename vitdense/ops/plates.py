"""Names in pictures, on colored plates that avoid one another."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unicodedata import combining, normalize

if TYPE_CHECKING:
    from PIL import ImageDraw

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

_STEPS = (0, 1, -1, 2, -2, 3, -3)
"""How far a plate may move up or down, in its own heights, in order of preference."""


class Plates:
    """Collects names and writes them. Those added first get their place, others move up or down.

    Attributes:
        size: of the text, in pixels.
    """

    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        from PIL import ImageFont

        self.pen = pen
        self.size = max(11, round(min(pen.im.size) / 36))
        self.font = ImageFont.load_default(self.size)
        self.names: list[tuple[str, Rectangle, Color]] = []

    def add(self, text: str, x: int, y: int, color: Color, centered: bool = False) -> None:
        """Place a name above (x, y), or centered on it; never outside the image."""
        # Pillow's own font, which every system has, knows no accents
        text = "".join(letter for letter in normalize("NFKD", text) if not combining(letter))
        width, height = self.pen.im.size
        left, top, right, bottom = self.pen.textbbox((0, 0), text, font=self.font)
        wide, high = int(right - left) + 2 * self._pad, int(bottom - top) + 2 * self._pad
        x, y = (x - wide // 2, y - high // 2) if centered else (x, y - high)
        x, y = max(0, min(x, width - wide)), max(0, min(y, height - high))
        places = [(x, y + step * high, x + wide, y + (step + 1) * high) for step in _STEPS]
        free = (place for place in places if self._is_free(place))
        self.names.append((text, next(free, places[0]), color))

    def write(self) -> None:
        """Draw all plates; where there was no room, those added first lie on top."""
        for text, (x, y, right, bottom), color in reversed(self.names):
            bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            self.pen.rectangle(((x, y), (right - 1, bottom - 1)), fill=color)
            ink = (0, 0, 0) if bright else (255, 255, 255)
            left, top, *_ = self.pen.textbbox((0, 0), text, font=self.font)
            self.pen.text(
                (x + self._pad - left, y + self._pad - top), text, font=self.font, fill=ink
            )

    @property
    def _pad(self) -> int:
        return max(1, self.size // 6)

    def _is_free(self, place: Rectangle) -> bool:
        x, y, right, bottom = place
        if y < 0 or bottom > self.pen.im.size[1]:
            return False
        return not any(
            x < its_right and its_x < right and y < its_bottom and its_y < bottom
            for _, (its_x, its_y, its_right, its_bottom), _ in self.names
        )
