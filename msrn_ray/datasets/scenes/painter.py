"""Paints landscapes with sprites and reports the visible box of each labelled object.

The painter stores the number of the visible object for every pixel, so the boxes are those of the visible pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .sprites import DISTRACTORS, SPRITES, Colour, Pixels, Rng, Sprite, vary

Box = tuple[int, int, int, int]  # x, y, width, height in pixels
IN_SKY = frozenset({"sun", "moon", "star", "cloud", "bird", "airplane", "balloon", "kite"})
CUT_OFF = frozenset({"house", "tree", "cloud"})  # may extend beyond the picture's left and right edge
SKY_COLOURS: dict[str, tuple[tuple[Colour, Colour], ...]] = {  # colours at the top and at the horizon
    "day": (
        ((70, 130, 210), (190, 218, 240)),
        ((145, 160, 175), (208, 212, 216)),
        ((95, 115, 185), (245, 195, 155)),
    ),
    "night": (((10, 12, 36), (42, 48, 85)), ((26, 16, 46), (78, 58, 92))),
}
GROUND_COLOURS: dict[str, tuple[Colour, ...]] = {
    "coast": ((222, 200, 150), (200, 180, 150)),
    "meadow": ((100, 150, 70), (150, 150, 75), (205, 185, 110), (215, 222, 232), (130, 120, 150)),
    "street": ((165, 160, 155), (115, 150, 80), (195, 180, 145)),
}
SEA_COLOURS: tuple[Colour, ...] = ((35, 95, 150), (40, 130, 140), (70, 100, 120))
ROCK_COLOURS: tuple[Colour, ...] = ((105, 100, 110), (120, 95, 80), (95, 85, 125))


class Painter:
    """A picture of H x W pixels under construction; its first `horizon` rows are above the horizon.

    Attributes:
        canvas: [H, W, 3] float32 in [0, 255].
        visible: [H, W] int16, the object that each pixel shows: 0 for none, k for the k-th of `names`.
        occupied: [H, W] bool, where another object would cover one.
    """

    def __init__(self, place: str, sky: str, width: int, height: int, rng: Rng) -> None:
        self.rng, self.place, self.width, self.height = rng, place, width, height
        self.visible = np.zeros((height, width), np.int16)
        self.occupied = np.zeros((height, width), bool)
        self.names: list[str] = []
        self.light = np.array((0.6, 0.62, 0.76) if sky == "night" else (1.0, 1.0, 1.0), np.float32)
        self.horizon = round(height * rng.uniform(0.42, 0.56))
        self.strip = (float(self.horizon), float(height))  # upper and lower edge of the sea or the road
        palette = SKY_COLOURS[sky][rng.integers(len(SKY_COLOURS[sky]))]
        top, bottom = (np.array(vary(rng, colour, by=12), np.float32) for colour in palette)
        down = np.linspace(0, 1, self.horizon, dtype=np.float32)[:, None, None]
        self.canvas = np.empty((height, width, 3), np.float32)
        self.canvas[: self.horizon] = top + (bottom - top) * down + 6 * self.noise(self.horizon, 3, 4)
        rows = height - self.horizon
        texture = 9 * self.noise(rows, rows // 3, width // 2) + 12 * self.noise(rows, 3, 5)
        ground = np.array(vary(rng, *GROUND_COLOURS[place]), np.float32)
        self.canvas[self.horizon :] = (ground + texture) * self.light

    def noise(self, height: int, rows: int, columns: int) -> Pixels:
        """Return [height, W, 1] float32: random numbers on rows x columns cells, interpolated smoothly."""
        cells = Image.fromarray(self.rng.standard_normal((rows, columns), np.float32))
        return np.asarray(cells.resize((self.width, height), Image.Resampling.BICUBIC))[..., None]

    def cover(self, name: str, above: bool, opacity: Pixels, colours: Pixels) -> None:
        """Paint colours ([h, W, 3]) over the h rows above or below the horizon, as an object with the label `name`."""
        rows = slice(0, self.horizon) if above else slice(self.horizon, self.height)
        self.canvas[rows] += opacity[..., None] * (colours * self.light - self.canvas[rows])
        self.names.append(name)
        self.visible[rows][opacity > 0.5] = len(self.names)

    def grid(self, above: bool) -> tuple[Pixels, Pixels]:
        """Return y [h, 1] and x [1, W], float32, of the rows above or below the horizon."""
        rows = np.arange(0, self.horizon) if above else np.arange(self.horizon, self.height)
        return rows.astype(np.float32)[:, None], np.arange(self.width, dtype=np.float32)[None]

    def mountain(self) -> None:
        rng, (y, x) = self.rng, self.grid(above=True)
        count = int(rng.integers(5, 9))
        left, span = rng.uniform(-0.2, 0.5), rng.uniform(0.55, 0.9)
        knots = (left + span * np.linspace(0, 1, count)) * self.width
        peaks = (
            self.horizon * rng.uniform(0.25, 0.6) * np.where(np.arange(count) % 2, 1.0, rng.uniform(0.3, 0.7, count))
        )
        peaks[0] = peaks[-1] = 0
        rise = np.interp(x, knots, peaks, left=0, right=0).astype(np.float32)
        depth = y - (self.horizon - rise)  # under the ridge
        opacity = np.clip(depth, 0, 1) * (rise > 1)
        colours = np.array(vary(rng, *ROCK_COLOURS), np.float32) + 14 * self.noise(self.horizon, 9, 12)
        if rng.random() < 0.7:
            snow = depth + 3 * self.noise(self.horizon, 5, 24)[..., 0] < 0.3 * rise - 4
            colours[snow] = (235, 238, 242)
        self.cover("mountain", True, opacity, colours)
        self.occupied[: self.horizon] |= opacity > 0.5

    def sea(self) -> None:
        rng, (y, x) = self.rng, self.grid(above=False)
        beach = rng.random() < 0.5
        shore = self.height * rng.uniform(0.8, 0.93) if beach else self.height + 5.0
        self.strip = (self.strip[0], min(shore, self.height))
        until = shore + 2.5 * np.sin(x / rng.uniform(6, 14)) - y
        waves = self.noise(len(y), self.height // 7, 9)
        colours = np.array(vary(rng, *SEA_COLOURS), np.float32) + 16 * waves
        colours[(waves[..., 0] > 1.1) | (until < 2.5)] += 55
        self.cover("sea", False, np.clip(until, 0, 1), colours)

    def road(self) -> None:
        """Paint a road across the picture or from the horizon to the viewer; `side` runs from -1 to 1 over its width."""
        rng, (y, x) = self.rng, self.grid(above=False)
        if rng.random() < 0.65:
            middle, half = self.height * rng.uniform(0.68, 0.82), self.height * rng.uniform(0.09, 0.14)
            side = (y - middle - rng.uniform(-0.06, 0.06) * (x - self.width / 2)) / half
            along = np.broadcast_to(x / rng.uniform(9, 14), side.shape)
            self.strip = (middle - half, middle + half)
        else:
            near = np.clip((y - self.horizon) / (self.height - self.horizon), 0.01, 1)
            middle_x = self.width * (rng.uniform(0.35, 0.65) * (1 - near) + rng.uniform(0.4, 0.6) * near)
            side = (x - middle_x) / (self.width * (0.02 + rng.uniform(0.3, 0.42) * near))
            along = np.broadcast_to(3.0 / near, side.shape)
        texture = 5 * self.noise(len(y), len(y) // 2, self.width // 2)
        colours = np.array(vary(rng, (80, 80, 85), (60, 60, 66), by=10), np.float32) + texture
        colours[np.abs(np.abs(side) - 0.86) < 0.06] = (225, 225, 220)
        colours[(np.abs(side) < 0.06) & (along.astype(np.int32) % 2 == 0)] = (235, 225, 180)
        self.cover("road", False, np.clip((1 - np.abs(side)) * 20, 0, 1), colours)

    def bottoms(self, name: str, height: int) -> tuple[float, float]:
        """Return the range of rows on which an object of that height may stand."""
        upper, lower = self.strip
        if name in IN_SKY:
            return height, max(height + 1, 0.92 * self.horizon)
        if name in ("boat", "fish"):
            return upper + max(height * 0.35, 4), lower - 2
        if name == "car":
            return max(upper + height * 0.8, lower - 0.6 * (lower - upper)), lower - 1
        if self.place != "street":
            return self.horizon + 0.06 * self.height, self.height - 1
        if name in ("house", "tree") or (self.rng.random() < 0.5 and upper - self.horizon > 4):
            return self.horizon + 2, max(self.horizon + 3, upper)
        return min(lower + height * 0.7, self.height - 2), self.height - 1

    def put(self, name: str, sprite: Sprite, *, labelled: bool, needed: bool) -> None:
        """Paint one object at the least crowded of ten random positions; if all are crowded, only if it is needed."""
        pixels = sprite.render(self.rng, min(self.width, self.height))
        height, width = pixels.shape[:2]
        margin = 0.25 * width if name in CUT_OFF else -1.0
        best, least = (0, 0), 2.0
        for _ in range(10):
            x = round(self.rng.uniform(-margin, self.width - width + margin))
            y = round(self.rng.uniform(*self.bottoms(name, height))) - height
            crowded = float(self.occupied[max(y, 0) : y + height, max(x, 0) : x + width].mean())
            if crowded < least:
                best, least = (x, y), crowded
            if crowded < 0.05:
                break
        if least > 0.25 and not needed:
            return
        x, y = best
        part = pixels[max(-y, 0) : self.height - y, max(-x, 0) : self.width - x]
        area = np.s_[max(y, 0) : y + height, max(x, 0) : x + width]
        light = np.float32(1) if sprite.glows else self.light
        self.canvas[area] += part[..., 3:] * (part[..., :3] * light - self.canvas[area])
        solid = part[..., 3] > 0.5
        self.occupied[area] |= solid
        if labelled:
            self.names.append(name)
        self.visible[area][solid] = len(self.names) if labelled else 0

    def finish(self) -> tuple[Image.Image, list[tuple[str, Box]]]:
        """Return the picture with camera grain, and the visible box of every labelled object."""
        grain = 6 * self.rng.standard_normal((self.height, self.width, 1), np.float32)
        self.canvas *= self.rng.uniform(0.88, 1.08)  # exposure
        self.canvas += grain
        image = Image.fromarray(self.canvas.clip(0, 255, out=self.canvas).astype(np.uint8))
        boxes = []
        for number, name in enumerate(self.names, start=1):
            if corners := Image.fromarray(self.visible == number).getbbox():
                x0, y0, x1, y1 = corners
                boxes.append((name, (x0, y0, x1 - x0, y1 - y0)))
        return image, boxes


def paint(labels: frozenset[str], place: str, sky: str, rng: Rng) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Draw a landscape with the objects `labels` and some objects without a label.

    Args:
        labels: the objects that must be visible.
        place: "coast", "meadow" or "street".
        sky: "day" or "night".
        rng: decides everything else.

    Returns:
        The picture, and (label, visible box in pixels) of each object; a label may have several objects.
    """
    width, height = (int(side) for side in rng.integers(128, 177, 2))
    painter = Painter(place, sky, width, height, rng)
    for name, draw in (("mountain", painter.mountain), ("sea", painter.sea), ("road", painter.road)):
        if name in labels:
            draw()
    wanted = [(name, sprite, True) for name, sprite in SPRITES.items() if name in labels]
    kinds = ("balloon", "kite", "rock") if place == "coast" else tuple(DISTRACTORS)
    for name in map(str, rng.choice(kinds, int(rng.integers(0, 3)), replace=False)):
        wanted.insert(int(rng.integers(0, 3)), (name, DISTRACTORS[name], False))
    for name, sprite, labelled in wanted:
        fewest, most = sprite.counts
        for number in range(int(rng.integers(fewest, most + 1))):
            painter.put(name, sprite, labelled=labelled, needed=labelled and number < fewest)
    image, boxes = painter.finish()
    assert labels == {name for name, _ in boxes}, f"{sorted(labels)} drawn, {boxes} visible"
    return image, boxes
