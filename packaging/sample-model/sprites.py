"""Draws the sample model's training pictures: one game sprite on one background.

Everything is drawn from polygons in the sprite's own square (x to the right, y down, both -1..1), so
that one description serves every picture size, tilt and place. This module knows nothing of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]  # (n, 2) sprite coordinates
Rgb = tuple[int, int, int]

SUPERSAMPLE = 4  # sprites are drawn this much larger, then averaged down: smooth edges without blur
OUTLINE: Rgb = (26, 18, 34)
STEEL: Rgb = (188, 194, 206)
WOOD: Rgb = (128, 82, 48)
CREAM: Rgb = (244, 228, 200)
GOLD: Rgb = (236, 186, 60)
GLASS: Rgb = (214, 232, 240)
WHITE: Rgb = (255, 255, 255)

# Neighbours are a clear step apart in hue, or in lightness where the hues are close (pink and purple).
COLOURS: dict[str, Rgb] = {
    "red": (214, 36, 40),
    "orange": (246, 134, 24),
    "yellow": (250, 218, 44),
    "green": (44, 160, 56),
    "cyan": (40, 204, 212),
    "blue": (40, 84, 220),
    "purple": (132, 52, 196),
    "pink": (250, 130, 190),
}

BACKGROUNDS: dict[str, Rgb] = {
    "grass": (118, 184, 82),
    "sky": (148, 206, 248),
    "stone": (136, 136, 142),
    "night": (34, 36, 84),
    "sand": (230, 206, 150),
    "white": (250, 250, 250),
}


def mix(colour: Rgb, other: Rgb, share: float) -> Rgb:
    """The colour moved towards the other by share (0 to 1)."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def shape(*points: tuple[float, float]) -> Points:
    """A polygon from its corners."""
    corners: Points = np.array(points, dtype=np.float64)
    return corners


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """An upright rectangle."""
    return shape((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> Points:
    """An ellipse, or the arc of it from start to end (degrees clockwise from the right), as a polygon."""
    angles = np.radians(np.linspace(start, end, 40))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def shrunk(points: Points, share: float, dx: float = 0.0, dy: float = 0.0) -> Points:
    """A copy scaled about the middle of its bounding box and shifted: the lit part of a shaded body."""
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    moved: Points = (points - middle) * share + middle + np.array([dx, dy])
    return moved


class Canvas:
    """A transparent picture, supersampled, that takes polygons in sprite coordinates."""

    def __init__(
        self,
        size: tuple[int, int],
        centre: tuple[float, float],
        radius: float,
        tilt_deg: float,
        mirrored: bool,
    ) -> None:
        self._image = Image.new("RGBA", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), (*OUTLINE, 0))
        self._draw = ImageDraw.Draw(self._image)
        cos, sin = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
        flip = -1.0 if mirrored else 1.0
        self._matrix = np.array([[cos * flip, -sin], [sin * flip, cos]]) * radius * SUPERSAMPLE
        self._centre = np.array(centre) * SUPERSAMPLE
        self._line = max(2, round(0.1 * radius * SUPERSAMPLE))

    def _place(self, points: Points) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in points @ self._matrix.T + self._centre]

    def outline(self, *parts: Points) -> None:
        """The dark rim around all parts together; the parts are painted over it afterwards."""
        for part in parts:
            placed = self._place(part)
            self._draw.polygon(placed, fill=(*OUTLINE, 255))
            self._draw.line(
                [*placed, placed[0], placed[1]], fill=(*OUTLINE, 255), width=2 * self._line, joint="curve"
            )

    def fill(self, points: Points, colour: Rgb) -> None:
        self._draw.polygon(self._place(points), fill=(*colour, 255))

    def hole(self, points: Points) -> None:
        """Cut through to the background."""
        self._draw.polygon(self._place(points), fill=(*OUTLINE, 0))

    def lines(self, width: float, colour: Rgb, *strokes: Points) -> None:
        """Open strokes; width as a share of the outline's."""
        for stroke in strokes:
            self._draw.line(self._place(stroke), fill=(*colour, 255), width=max(1, round(self._line * width)))

    def finished(self) -> Image.Image:
        # reduce() averages colour and coverage apart; transparent pixels carry the outline's colour,
        # so the averaged rim stays dark instead of turning grey.
        return self._image.reduce(SUPERSAMPLE)


def _shades(colour: Rgb) -> tuple[Rgb, Rgb]:
    return mix(colour, WHITE, 0.42), mix(colour, (30, 10, 50), 0.3)


def potion(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    belly, neck = ellipse(0, 0.3, 0.66, 0.64), box(-0.2, -0.6, 0.2, -0.2)
    lip, cork = box(-0.34, -0.68, 0.34, -0.5), box(-0.17, -0.96, 0.17, -0.68)
    c.outline(belly, neck, lip, cork)
    c.fill(cork, WOOD)
    c.fill(neck, GLASS)
    c.fill(lip, GLASS)
    c.fill(belly, dark)
    c.fill(shrunk(belly, 0.84, -0.06, -0.05), colour)
    c.fill(ellipse(-0.02, -0.08, 0.44, 0.1), light)
    c.fill(ellipse(-0.3, 0.2, 0.1, 0.17), WHITE)
    c.fill(ellipse(0.22, 0.5, 0.09, 0.09), light)


def sword(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)

    def turned(points: Points) -> Points:  # the blade points up and to the right
        half = math.sqrt(0.5)
        placed: Points = points @ np.array([[half, -half], [half, half]]).T
        return placed

    blade = turned(shape((-0.24, 0.3), (-0.24, -0.98), (0, -1.28), (0.24, -0.98), (0.24, 0.3)))
    edge = turned(shape((0, 0.3), (0, -1.28), (0.24, -0.98), (0.24, 0.3)))
    guard, grip = turned(box(-0.56, 0.28, 0.56, 0.5)), turned(box(-0.13, 0.5, 0.13, 0.98))
    pommel = turned(ellipse(0, 1.05, 0.2, 0.2))
    c.outline(blade, guard, grip, pommel)
    c.fill(blade, colour)
    c.fill(edge, dark)
    c.fill(turned(box(-0.19, -0.9, -0.08, 0.24)), light)
    c.fill(grip, WOOD)
    c.fill(guard, STEEL)
    c.fill(pommel, STEEL)


def shield(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    rim = np.concatenate(
        [
            shape((-0.78, -0.86), (0.78, -0.86)),
            np.array(
                [(0.78 * math.cos(t) ** 0.8, 0.02 + 0.94 * math.sin(t)) for t in np.linspace(0, 1.55, 12)]
            ),
            np.array(
                [(-0.78 * math.cos(t) ** 0.8, 0.02 + 0.94 * math.sin(t)) for t in np.linspace(1.55, 0, 12)]
            ),
        ]
    )
    face = shrunk(rim, 0.78, 0, -0.01)
    c.outline(rim)
    c.fill(rim, STEEL)
    c.fill(face, colour)
    c.fill(np.array([(max(x, 0.0), y) for x, y in face]), dark)
    c.fill(box(-0.5, -0.6, -0.38, -0.1), light)
    c.fill(ellipse(0, -0.12, 0.24, 0.24), OUTLINE)
    c.fill(ellipse(0, -0.12, 0.17, 0.17), STEEL)


def key(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    ring, shaft = ellipse(0, -0.5, 0.48, 0.46), box(-0.15, -0.1, 0.15, 0.96)
    teeth = box(0.15, 0.32, 0.52, 0.52), box(0.15, 0.7, 0.46, 0.92)
    c.outline(ring, shaft, *teeth)
    c.fill(ring, colour)
    c.fill(ellipse(0, -0.5, 0.48, 0.46, -60, 120), dark)
    c.fill(shaft, colour)
    c.fill(box(0.03, 0.0, 0.15, 0.96), dark)
    for tooth in teeth:
        c.fill(tooth, colour)
    c.fill(ellipse(0, -0.5, 0.27, 0.26), OUTLINE)
    c.hole(ellipse(0, -0.5, 0.18, 0.17))
    c.fill(ellipse(-0.33, -0.62, 0.06, 0.13), light)


def heart(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    t = np.linspace(0, 2 * math.pi, 60)
    body = np.stack(
        [
            0.95 * np.sin(t) ** 3,
            -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.2,
        ],
        axis=1,
    )
    c.outline(body)
    c.fill(body, dark)
    c.fill(shrunk(body, 0.84, -0.05, -0.04), colour)
    c.fill(ellipse(-0.46, -0.34, 0.2, 0.15), light)
    c.fill(ellipse(-0.5, -0.38, 0.1, 0.07), WHITE)


def gem(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    left, right, bottom = (-0.98, -0.22), (0.98, -0.22), (0.0, 0.9)
    body = shape((-0.54, -0.74), (0.54, -0.74), right, bottom, left)
    c.outline(body)
    c.fill(body, colour)
    c.fill(shape(right, bottom, (0.36, -0.22)), dark)
    c.fill(shape(left, (-0.36, -0.22), (-0.54, -0.74)), light)
    c.fill(shape((0.54, -0.74), (0.0, -0.74), (0.36, -0.22)), light)
    c.fill(shape((-0.3, -0.22), (0.02, -0.22), (-0.04, 0.5)), mix(colour, WHITE, 0.6))
    c.lines(0.5, OUTLINE, shape(left, right))


def mushroom(c: Canvas, colour: Rgb) -> None:
    _, dark = _shades(colour)
    cap = np.concatenate([ellipse(0, 0.0, 0.94, 0.86, 180, 360), ellipse(0, 0.0, 0.94, 0.24, 0, 180)])
    stem = np.concatenate([shape((-0.32, 0.1), (0.32, 0.1)), ellipse(0, 0.7, 0.42, 0.24, 0, 180)])
    c.outline(cap, stem)
    c.fill(stem, CREAM)
    c.fill(shrunk(stem, 0.5, 0.2, 0.06), mix(CREAM, WOOD, 0.3))
    c.lines(1.6, OUTLINE, ellipse(0, 0.04, 0.6, 0.26, 0, 180))
    c.fill(cap, dark)
    c.fill(shrunk(cap, 0.86, -0.05, -0.06), colour)
    for x, y, rx, ry in ((-0.44, -0.2, 0.2, 0.17), (0.16, -0.5, 0.2, 0.15), (0.5, -0.08, 0.15, 0.14)):
        c.fill(ellipse(x, y, rx, ry), WHITE)


def tree(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    trunk = box(-0.17, 0.5, 0.17, 0.98)
    tiers = [
        shape((0, -0.36), (0.86, 0.62), (-0.86, 0.62)),
        shape((0, -0.7), (0.68, 0.2), (-0.68, 0.2)),
        shape((0, -1.0), (0.5, -0.26), (-0.5, -0.26)),
    ]
    c.outline(trunk, *tiers)
    c.fill(trunk, WOOD)
    for tier in tiers:
        c.fill(tier, dark)
        c.fill(shrunk(tier, 0.78, -0.06, -0.04), colour)
    for tier in tiers:
        c.fill(shrunk(tier, 0.22, -0.2, 0.12), light)


def chest(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    lid = np.concatenate([ellipse(0, -0.12, 0.9, 0.62, 180, 360), shape((0.9, -0.1), (-0.9, -0.1))])
    body = box(-0.9, -0.1, 0.9, 0.74)
    c.outline(lid, body)
    c.fill(lid, colour)
    c.fill(body, dark)
    c.fill(box(-0.9, 0.02, 0.9, 0.58), colour)
    c.fill(ellipse(-0.1, -0.44, 0.46, 0.1), light)
    for x in (-0.72, 0.58):
        c.fill(box(x, -0.36, x + 0.14, 0.74), STEEL)
    c.lines(1.0, OUTLINE, shape((-0.9, -0.08), (0.9, -0.08)))
    c.fill(box(-0.23, -0.26, 0.23, 0.28), OUTLINE)
    c.fill(box(-0.15, -0.18, 0.15, 0.2), GOLD)
    c.fill(box(-0.05, -0.04, 0.05, 0.12), OUTLINE)


def ghost(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)

    def cloth(half: float, top: float, hem: float) -> Points:
        waves = [(x, hem + 0.17 * math.cos(x / half * 3 * math.pi)) for x in np.linspace(half, -half, 30)]
        return np.concatenate([ellipse(0, top + 0.72, half, 0.72, 180, 360), np.array(waves)])

    body = cloth(0.74, -0.94, 0.74)
    c.outline(body)
    c.fill(body, dark)
    c.fill(shrunk(body, 0.84, -0.06, -0.05), colour)
    c.fill(ellipse(-0.36, -0.6, 0.16, 0.12), light)
    for x in (-0.3, 0.26):
        c.fill(ellipse(x, -0.2, 0.15, 0.21), WHITE)
        c.fill(ellipse(x - 0.03, -0.15, 0.085, 0.13), OUTLINE)
    c.fill(ellipse(-0.02, 0.24, 0.13, 0.1), OUTLINE)


def star(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    corners = [
        (r * math.sin(a), 0.06 - r * math.cos(a))
        for r, a in ((1.0 if i % 2 == 0 else 0.48, i * math.pi / 5) for i in range(10))
    ]
    middle = (0.0, 0.06)
    c.outline(shape(*corners))
    c.fill(shape(*corners), colour)
    for tip in (2, 4, 6):  # the right-hand side of each lower point lies in shade
        c.fill(shape(corners[tip], corners[tip + 1 if tip != 2 else 3], middle), dark)
    c.fill(shape(corners[0], corners[9], middle), light)
    c.fill(shape(corners[8], corners[9], middle), light)


def fish(c: Canvas, colour: Rgb) -> None:
    light, dark = _shades(colour)
    body = ellipse(-0.2, 0.06, 0.72, 0.5)
    tail = shape((0.4, 0.06), (0.98, -0.42), (0.84, 0.06), (0.98, 0.54))
    fin = shape((-0.36, -0.36), (0.06, -0.78), (0.24, -0.26))
    c.outline(body, tail, fin)
    c.fill(tail, dark)
    c.fill(fin, dark)
    c.fill(body, dark)
    c.fill(shrunk(body, 0.84, -0.03, -0.06), colour)
    c.fill(ellipse(-0.2, 0.34, 0.4, 0.13), light)
    c.lines(0.8, dark, ellipse(-0.4, 0.06, 0.2, 0.34, -60, 60))
    c.fill(ellipse(-0.56, -0.06, 0.17, 0.17), WHITE)
    c.fill(ellipse(-0.6, -0.06, 0.09, 0.1), OUTLINE)


OBJECTS: dict[str, Callable[[Canvas, Rgb], None]] = {
    "potion": potion,
    "sword": sword,
    "shield": shield,
    "key": key,
    "heart": heart,
    "gem": gem,
    "mushroom": mushroom,
    "tree": tree,
    "chest": chest,
    "ghost": ghost,
    "star": star,
    "fish": fish,
}
MIRRORED = frozenset({"fish"})  # kinds that may face either way


def _jittered(rng: np.random.Generator, colour: Rgb, spread: int) -> Rgb:
    red, green, blue = (int(np.clip(v + rng.integers(-spread, spread + 1), 0, 255)) for v in colour)
    return red, green, blue


def draw_background(rng: np.random.Generator, name: str, size: tuple[int, int]) -> Image.Image:
    """The ground behind the sprite: one colour and a coarse texture.

    Textures are painted in blocks of 2x2 pixels: finer ones would be lost in the autoencoder.
    """
    width, height = size[0] // 2, size[1] // 2
    base = _jittered(rng, BACKGROUNDS[name], 4)
    image = Image.new("RGB", (width, height), base)
    draw = ImageDraw.Draw(image)

    def scatter(share: float) -> list[tuple[int, int]]:
        """Random blocks, that share of all."""
        count = round(width * height * share)
        columns, rows = rng.integers(0, width, count), rng.integers(0, height, count)
        return [(int(x), int(y)) for x, y in zip(columns, rows, strict=True)]

    if name == "grass":
        for x, y in scatter(0.025):
            blade = mix(base, (40, 110, 40), 0.45) if rng.random() < 0.7 else mix(base, (220, 250, 140), 0.4)
            draw.point([(x - 1, y - 1), (x, y), (x + 1, y - 1)], fill=blade)
    elif name == "sky":
        for x, y in scatter(0.004):
            for dx, dy, rx, ry in ((0, 0, 5, 1), (-2, -1, 2, 1), (1, -2, 2, 2)):
                draw.ellipse([x + dx - rx, y + dy - ry, x + dx + rx, y + dy + ry], fill=mix(base, WHITE, 0.6))
    elif name == "stone":
        seam = mix(base, (40, 40, 50), 0.45)
        shift = int(rng.integers(0, 8))
        for row, y in enumerate(range(int(rng.integers(-5, 0)), height, 5)):
            draw.line([(0, y), (width, y)], fill=seam)
            for x in range(shift - 8 + 4 * (row % 2), width, 8):
                draw.line([(x, y), (x, y + 5)], fill=seam)
    elif name == "night":
        for x, y in scatter(0.013):
            draw.point((x, y), fill=mix(base, (255, 250, 210), 0.85 if rng.random() < 0.6 else 0.45))
    elif name == "sand":
        for x, y in scatter(0.018):
            draw.line([(x, y), (x + int(rng.integers(1, 4)), y)], fill=mix(base, (150, 110, 60), 0.4))
    return image.resize(size, Image.Resampling.NEAREST)


def draw_sprite(rng: np.random.Generator, colour: str, kind: str, size: tuple[int, int]) -> Image.Image:
    """The sprite alone (RGBA), scaled to the picture's shorter side, a little moved, tilted and tinted."""
    width, height = size
    short = min(size)
    radius = short * rng.uniform(0.35, 0.405)
    room = [max(0.0, side / 2 - radius - 0.075 * short) for side in size]
    centre = (width / 2 + rng.uniform(-room[0], room[0]), height / 2 + rng.uniform(-room[1], room[1]))
    mirrored = kind in MIRRORED and rng.random() < 0.5
    canvas = Canvas(size, centre, radius, rng.uniform(-7, 7), mirrored)
    OBJECTS[kind](canvas, _jittered(rng, COLOURS[colour], 6))
    return canvas.finished()


def draw(
    rng: np.random.Generator, colour: str, kind: str, background: str, size: tuple[int, int] = (64, 64)
) -> Image.Image:
    """One training picture (RGB); size is (width, height) in pixels."""
    image = draw_background(rng, background, size)
    sprite = draw_sprite(rng, colour, kind, size)
    image.paste(sprite, mask=sprite.getchannel("A"))
    return image


def contact_sheet(images: Sequence[Image.Image], columns: int, enlarge: int = 2) -> Image.Image:
    """Equal-sized pictures side by side, enlarged without smoothing."""
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), WHITE)
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST)
