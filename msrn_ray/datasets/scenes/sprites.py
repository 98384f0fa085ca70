"""The sprites of `scenes`: one drawing per kind of object.

A sprite is drawn enlarged in the unit square (x to the right, y down), then turned, mirrored and reduced, which smooths its edges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Rng = np.random.Generator
Pixels = npt.NDArray[np.float32]
OVERSAMPLING = 3
CLEAR = (0, 0, 0, 0)
BLACK, WHITE, GREY = (30, 30, 34), (240, 240, 240), (135, 135, 140)
RED, ORANGE, YELLOW, GREEN, BLUE = (205, 45, 40), (240, 140, 40), (245, 215, 70), (60, 140, 60), (50, 100, 190)
BROWN, PINK, PURPLE, CREAM = (120, 80, 50), (235, 120, 170), (140, 80, 175), (230, 215, 180)


class Pen:
    """Draws on a transparent RGBA canvas in unit coordinates."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width * OVERSAMPLING, height * OVERSAMPLING)
        self.image = Image.new("RGBA", self.size, CLEAR)
        self.draw = ImageDraw.Draw(self.image)

    def _pixels(self, numbers: tuple[float, ...]) -> list[float]:
        return [number * (self.size[i % 2] - 1) for i, number in enumerate(numbers)]

    def polygon(self, fill: tuple[int, ...], *xy: float) -> None:
        """Fill the polygon with the corners xy: x0, y0, x1, y1, ..."""
        self.draw.polygon(self._pixels(xy), fill=fill)

    def box(self, fill: tuple[int, ...], *xyxy: float) -> None:
        self.draw.rectangle(self._pixels(xyxy), fill=fill)

    def oval(self, fill: tuple[int, ...], *xyxy: float) -> None:
        self.draw.ellipse(self._pixels(xyxy), fill=fill)

    def disc(self, fill: tuple[int, ...], x: float, y: float, radius: float) -> None:
        self.oval(fill, x - radius, y - radius, x + radius, y + radius)

    def line(self, fill: tuple[int, ...], width: float, *xy: float) -> None:
        """Draw a line; width: as a fraction of the canvas's shorter side."""
        self.draw.line(self._pixels(xy), fill=fill, width=max(1, round(width * min(self.size))))


def vary(rng: Rng, *colours: Colour, by: int = 16) -> Colour:
    """Return a random one of `colours`, each channel changed by at most `by`."""
    colour = colours[rng.integers(len(colours))]
    moves = rng.integers(-by, by + 1, 3).tolist()
    red, green, blue = (min(max(channel + move, 0), 255) for channel, move in zip(colour, moves, strict=True))
    return red, green, blue


def darker(colour: Colour, factor: float = 0.7) -> Colour:
    """Return the colour with each channel times `factor`."""
    red, green, blue = (int(channel * factor) for channel in colour)
    return red, green, blue


def ring(num_points: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    """Return points evenly spaced on a circle around the middle of the unit square; start: angle in radians."""
    angles = start + np.arange(num_points) * 2 * np.pi / num_points
    return [(0.5 + radius * float(np.cos(a)), 0.5 + radius * float(np.sin(a))) for a in angles]


def draw_sun(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, YELLOW, ORANGE, (255, 235, 130))
    for x, y in ring(int(rng.integers(9, 14)), 0.5):
        pen.line(colour, 0.06, 0.5, 0.5, x, y)
    pen.disc(colour, 0.5, 0.5, 0.31)


def draw_moon(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, (240, 235, 205), (215, 220, 230), by=10)
    pen.disc(colour, 0.5, 0.5, 0.49)
    if rng.random() < 0.65:
        pen.disc(CLEAR, rng.uniform(0.72, 0.88), rng.uniform(0.35, 0.5), 0.44)
    else:
        for x, y in rng.uniform(0.25, 0.75, (4, 2)):
            pen.disc(darker(colour, 0.85), x, y, 0.09)


def draw_star(pen: Pen, rng: Rng) -> None:
    outer, inner = ring(5, 0.5, -np.pi / 2), ring(5, 0.21, -np.pi / 2 + np.pi / 5)
    corners = [number for pair in zip(outer, inner, strict=True) for point in pair for number in point]
    pen.polygon(vary(rng, (255, 245, 170), WHITE, (255, 220, 120)), *corners)


def draw_cloud(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, WHITE, (215, 218, 225), (185, 190, 200), by=12)
    for x in np.linspace(0.2, 0.8, int(rng.integers(4, 7))):
        radius = rng.uniform(0.13, 0.2)
        pen.oval(colour, x - radius, rng.uniform(0.0, 0.35), x + radius, 0.95)
    pen.oval(darker(colour, 0.93), 0.02, 0.6, 0.98, 1.0)


def draw_bird(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, BLACK, WHITE, BROWN, (90, 95, 110))
    lift = rng.uniform(0.0, 0.25)
    pen.polygon(colour, 0.0, lift + 0.1, 0.27, lift, 0.5, 0.5, 0.48, 0.75, 0.25, lift + 0.28)
    pen.polygon(colour, 1.0, lift + 0.1, 0.73, lift, 0.5, 0.5, 0.52, 0.75, 0.75, lift + 0.28)
    pen.oval(colour, 0.4, 0.42, 0.6, 0.98)
    pen.polygon(vary(rng, ORANGE), 0.44, 0.85, 0.56, 0.85, 0.5, 1.0)


def draw_airplane(pen: Pen, rng: Rng) -> None:
    body, trim = vary(rng, WHITE, (205, 210, 220), by=10), vary(rng, RED, BLUE, ORANGE)
    pen.polygon(darker(trim), 0.46, 0.4, 0.66, 0.4, 0.5, 0.0, 0.38, 0.0)
    pen.polygon(trim, 0.0, 0.05, 0.14, 0.05, 0.3, 0.45, 0.1, 0.5)
    pen.oval(body, 0.0, 0.3, 1.0, 0.68)
    pen.oval(trim, 0.88, 0.38, 1.0, 0.6)
    for x in (0.26, 0.4, 0.54, 0.68):
        pen.oval((40, 50, 80), x, 0.37, x + 0.08, 0.5)
    pen.polygon(trim, 0.38, 0.54, 0.66, 0.54, 0.38, 1.0, 0.22, 1.0)


def draw_tree(pen: Pen, rng: Rng) -> None:
    leaf = vary(rng, GREEN, (40, 110, 50), (110, 150, 50), (190, 120, 40))
    pen.box(vary(rng, BROWN, (90, 60, 45)), 0.42, 0.55, 0.58, 1.0)
    if rng.random() < 0.5:
        for top, half in ((0.4, 0.46), (0.2, 0.36), (0.0, 0.26)):
            pen.polygon(darker(leaf, 1.0 - top / 2), 0.5, top, 0.5 + half, top + 0.4, 0.5 - half, top + 0.4)
        return
    for x, y in ring(6, 0.24):
        pen.disc(darker(leaf, rng.uniform(0.75, 1.0)), x, y - 0.15, 0.22)
    pen.disc(leaf, 0.5, 0.33, 0.24)


def draw_house(pen: Pen, rng: Rng) -> None:
    wall, roof = vary(rng, CREAM, WHITE, (200, 150, 120), (170, 190, 200)), vary(rng, RED, BROWN, (90, 90, 105))
    pen.box(darker(roof), 0.7, 0.08, 0.8, 0.35)
    pen.box(wall, 0.08, 0.42, 0.92, 1.0)
    pen.polygon(roof, 0.0, 0.45, 0.25, 0.08, 0.75, 0.08, 1.0, 0.45)
    pane = vary(rng, (70, 90, 120), (245, 220, 120))
    for left in (0.16, 0.66):
        pen.box(darker(wall, 0.6), left - 0.02, 0.55, left + 0.2, 0.78)
        pen.box(pane, left, 0.57, left + 0.18, 0.76)
    pen.box(vary(rng, BROWN, RED, GREEN), 0.42, 0.62, 0.58, 1.0)


def draw_car(pen: Pen, rng: Rng) -> None:
    paint = vary(rng, RED, BLUE, YELLOW, WHITE, GREEN, GREY)
    pen.polygon(paint, 0.17, 0.45, 0.3, 0.05, 0.68, 0.05, 0.85, 0.45)
    pen.polygon((60, 75, 95), 0.23, 0.43, 0.33, 0.13, 0.47, 0.13, 0.47, 0.43)
    pen.polygon((60, 75, 95), 0.52, 0.43, 0.52, 0.13, 0.66, 0.13, 0.77, 0.43)
    pen.polygon(paint, 0.0, 0.5, 0.1, 0.42, 0.92, 0.42, 1.0, 0.55, 1.0, 0.82, 0.0, 0.82)
    pen.box(YELLOW, 0.95, 0.52, 1.0, 0.62)
    for x in (0.24, 0.76):
        pen.oval(BLACK, x - 0.12, 0.6, x + 0.12, 1.0)
        pen.oval(GREY, x - 0.05, 0.72, x + 0.05, 0.88)


def draw_traffic_light(pen: Pen, rng: Rng) -> None:
    pen.box(vary(rng, (70, 72, 75), BLACK), 0.42, 0.5, 0.58, 1.0)
    pen.box(vary(rng, BLACK, (45, 50, 40), by=10), 0.1, 0.0, 0.9, 0.62)
    lit = int(rng.integers(3))
    for lamp, colour in enumerate(((255, 50, 40), (255, 195, 40), (60, 235, 90))):
        y = 0.11 + 0.2 * lamp
        pen.oval(colour if lamp == lit else darker(colour, 0.55), 0.26, y - 0.085, 0.74, y + 0.085)


def draw_boat(pen: Pen, rng: Rng) -> None:
    hull, cloth = vary(rng, RED, BROWN, WHITE, BLUE, GREEN), vary(rng, WHITE, CREAM, RED, ORANGE)
    if rng.random() < 0.7:
        pen.box(BROWN, 0.46, 0.0, 0.5, 0.75)
        pen.polygon(cloth, 0.53, 0.03, 0.53, 0.68, 0.95, 0.68)
        pen.polygon(darker(cloth, 0.88), 0.43, 0.12, 0.43, 0.68, 0.14, 0.68)
    else:
        pen.box(WHITE, 0.25, 0.42, 0.7, 0.75)
        pen.box(cloth, 0.5, 0.12, 0.62, 0.45)
        for x in (0.32, 0.46, 0.6):
            pen.box(BLUE, x - 0.04, 0.5, x + 0.04, 0.62)
    pen.polygon(hull, 0.0, 0.72, 1.0, 0.72, 0.82, 1.0, 0.16, 1.0)


def draw_fish(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, ORANGE, RED, YELLOW, (190, 200, 215))
    pen.polygon(darker(colour, 0.85), 0.28, 0.5, 0.0, 0.08, 0.06, 0.5, 0.0, 0.92)
    pen.polygon(darker(colour, 0.85), 0.4, 0.2, 0.62, 0.0, 0.7, 0.25)
    pen.oval(colour, 0.18, 0.12, 1.0, 0.9)
    pen.box(darker(colour, 0.7), 0.5, 0.2, 0.56, 0.82)
    pen.disc(WHITE, 0.82, 0.42, 0.08)
    pen.disc(BLACK, 0.83, 0.42, 0.045)


def draw_flower(pen: Pen, rng: Rng) -> None:
    petal = vary(rng, PINK, PURPLE, WHITE, RED)
    pen.line((40, 120, 45), 0.12, 0.5, 0.4, rng.uniform(0.4, 0.6), 1.0)
    pen.oval((50, 130, 50), 0.5, 0.75, 0.9, 0.9)
    for x, y in ring(int(rng.integers(5, 8)), 0.3, rng.uniform(0, np.pi)):
        pen.oval(petal, x - 0.2, 0.75 * y - 0.15, x + 0.2, 0.75 * y + 0.15)
    pen.oval(vary(rng, (250, 205, 50), by=10), 0.32, 0.24, 0.68, 0.51)


def draw_balloon(pen: Pen, rng: Rng) -> None:
    pen.line(GREY, 0.04, 0.5, 0.7, 0.45, 1.0)
    pen.oval(vary(rng, RED, YELLOW, PINK, WHITE, BLUE), 0.05, 0.0, 0.95, 0.72)


def draw_kite(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, RED, YELLOW, GREEN, PURPLE, WHITE)
    pen.line(GREY, 0.04, 0.5, 0.6, 0.35, 0.8, 0.6, 1.0)
    pen.polygon(colour, 0.5, 0.0, 0.95, 0.3, 0.5, 0.75, 0.05, 0.3)
    pen.polygon(darker(colour), 0.5, 0.0, 0.5, 0.75, 0.05, 0.3)


def draw_rock(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, GREY, (110, 100, 95), BROWN)
    top = rng.uniform(0.25, 0.6)
    pen.polygon(colour, 0.0, 1.0, 0.15, 0.4, top, 0.0, 0.85, 0.35, 1.0, 1.0)
    pen.polygon(darker(colour, 0.8), top, 0.0, 0.85, 0.35, 1.0, 1.0, 0.6, 1.0)


def draw_crate(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, BROWN, RED, BLUE, YELLOW, GREY, WHITE)
    pen.box(darker(colour), 0.0, 0.0, 1.0, 1.0)
    pen.box(colour, 0.1, 0.12, 0.9, 0.88)
    pen.line(darker(colour), 0.1, 0.05, 0.05, 0.95, 0.95)


def draw_sign(pen: Pen, rng: Rng) -> None:
    pen.box(GREY, 0.46, 0.3, 0.54, 1.0)
    colour = vary(rng, BLUE, GREEN, BROWN, WHITE)
    pen.polygon(colour, 0.0, 0.05, 0.75, 0.05, 1.0, 0.2, 0.75, 0.35, 0.0, 0.35)
    pen.line(darker(colour, 0.5), 0.06, 0.12, 0.2, 0.7, 0.2)


def draw_bush(pen: Pen, rng: Rng) -> None:
    colour = vary(rng, GREEN, (90, 130, 50), PURPLE, (150, 120, 60))
    for x in (0.25, 0.5, 0.75):
        pen.oval(darker(colour, rng.uniform(0.75, 1.0)), x - 0.25, rng.uniform(0.0, 0.3), x + 0.25, 1.3)


class Sprite(NamedTuple):
    """The drawing of one kind of object.

    Attributes:
        draw: draws it with a pen.
        aspect: width over height.
        heights: smallest and largest height, as a fraction of the picture's shorter side.
        counts: smallest and largest number in one picture.
        turn: largest rotation in both directions, degrees.
        glows: whether its colours stay the same at night.
    """

    draw: Callable[[Pen, Rng], None]
    aspect: float
    heights: tuple[float, float]
    counts: tuple[int, int]
    turn: float = 0.0
    glows: bool = False

    def render(self, rng: Rng, short_side: int) -> Pixels:
        """Return [h, w, 4] float32: colours in [0, 255], opacity in [0, 1]."""
        height = short_side * rng.uniform(*self.heights)
        width = height * self.aspect * rng.uniform(0.9, 1.12)
        pen = Pen(max(4, round(width)), max(4, round(height)))
        self.draw(pen, rng)
        image = pen.image
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.turn:
            angle = rng.uniform(-self.turn, self.turn)
            image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        pixels = np.asarray(image.reduce(OVERSAMPLING), np.float32).copy()
        pixels[..., 3] /= 255
        return pixels


SPRITES = {  # large first: the painter keeps this order, so a large object never hides a small one
    "house": Sprite(draw_house, 1.15, (0.26, 0.42), (1, 2)),
    "cloud": Sprite(draw_cloud, 1.9, (0.13, 0.22), (1, 3)),
    "tree": Sprite(draw_tree, 0.7, (0.26, 0.42), (1, 4)),
    "car": Sprite(draw_car, 2.1, (0.13, 0.20), (1, 2)),
    "sun": Sprite(draw_sun, 1.0, (0.18, 0.28), (1, 1), turn=20, glows=True),
    "moon": Sprite(draw_moon, 1.0, (0.14, 0.22), (1, 1), turn=40, glows=True),
    "boat": Sprite(draw_boat, 1.1, (0.17, 0.30), (1, 2), turn=6),
    "airplane": Sprite(draw_airplane, 1.9, (0.15, 0.21), (1, 1), turn=12),
    "traffic light": Sprite(draw_traffic_light, 0.42, (0.26, 0.36), (1, 2), glows=True),
    "fish": Sprite(draw_fish, 1.7, (0.11, 0.15), (1, 3), turn=20),
    "flower": Sprite(draw_flower, 0.75, (0.15, 0.20), (2, 5), turn=12),
    "bird": Sprite(draw_bird, 1.7, (0.085, 0.125), (1, 4), turn=20),
    "star": Sprite(draw_star, 1.0, (0.06, 0.095), (2, 6), turn=36, glows=True),
}
DISTRACTORS = {  # drawn, never labelled
    "balloon": Sprite(draw_balloon, 0.6, (0.10, 0.18), (1, 2), turn=10),
    "kite": Sprite(draw_kite, 0.7, (0.09, 0.15), (1, 2), turn=30),
    "rock": Sprite(draw_rock, 1.5, (0.05, 0.12), (1, 3)),
    "crate": Sprite(draw_crate, 1.2, (0.07, 0.13), (1, 2), turn=8),
    "sign": Sprite(draw_sign, 0.7, (0.18, 0.28), (1, 1)),
    "bush": Sprite(draw_bush, 1.8, (0.07, 0.13), (1, 3)),
}
