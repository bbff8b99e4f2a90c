"""Judges the embedded sample model's pictures without anything of what trained it.

It asks the stock diffusers pipeline for pictures of chosen combinations and then looks at pixels only:
the colour by the hue most of the object's pixels have, the object by its silhouette against the reference
silhouettes in `data/sample_model/`, the background by the colours along the picture's border.

    python -m tests.sample_model_check --sheet /tmp/sheet.png
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from studio_worker import sample_model
from tests.lab.stock import sample_pipeline

ROOT = Path(__file__).resolve().parents[1]
SILHOUETTES = ROOT / "tests" / "data" / "sample_model" / "silhouettes.png"
HELD_OUT_FILE = ROOT / "packaging" / "sample-model" / "held-out.json"

PROMPTS = 144
HELD_OUT_PROMPTS = 60
STEPS = 20
GUIDANCE = 4.0
BATCH = 12

HUES_DEG = {
    "red": 0,
    "orange": 30,
    "yellow": 52,
    "green": 126,
    "cyan": 183,
    "blue": 226,
    "purple": 274,
    "pink": 329,
}
"""What the colour words mean, as hues on the usual circle."""

GROUNDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "grass": ((118, 184, 82), (83, 151, 63), (158, 210, 105)),
    "sky": ((148, 206, 248), (212, 235, 252)),
    "stone": ((136, 136, 142), (93, 93, 101), (157, 157, 162)),
    "night": ((34, 36, 84),),
    "sand": ((230, 206, 150), (198, 168, 114)),
    "white": ((250, 250, 250),),
}
"""What the background words mean: the ground's colour and, where it has a texture, the texture's."""

SIDE = 48  # silhouettes are compared on a square this wide
AREA = 0.32 * SIDE * SIDE  # after each has been scaled to this area, so that size does not matter
BORDER = 3  # pixels; the ring that shows only background
UNLIKE = 17.0  # CIELAB distance from every ground colour that makes a pixel part of the object
LEAST_SHARE = 0.1  # of the picture; a smaller patch is a stray bit of texture, not an object
LEAST_OVERLAP = 0.72  # intersection over union below which a silhouette is nothing known

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float64]


@dataclass(frozen=True)
class Combination:
    """What one picture should show."""

    colour: str
    object: str
    background: str
    held_out: bool = False


@dataclass(frozen=True)
class Verdict:
    """What one picture does show; object is "nothing" where no silhouette fits."""

    colour: str
    object: str
    background: str
    overlap: float


@dataclass(frozen=True)
class Figures:
    """Shares (0 to 1) of pictures that show the wanted colour, object and background."""

    count: int
    colour: float
    object: float
    background: float

    def __str__(self) -> str:
        return (
            f"{self.count} pictures: colour {self.colour:.1%}, object {self.object:.1%}, "
            f"background {self.background:.1%}"
        )


def to_lab(rgb: Pixels) -> Pixels:
    """sRGB (0 to 255, last axis) to CIELAB under D65, where distances are roughly what an eye sees."""
    linear = rgb / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    lab: Pixels = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
    return lab


def _distances(lab: Pixels, ground: str) -> Pixels:
    """From each pixel to the nearest of the ground's colours."""
    colours = to_lab(np.array(GROUNDS[ground], dtype=np.float64))
    nearest: Pixels = np.linalg.norm(lab[..., None, :] - colours, axis=-1).min(axis=-1)
    return nearest


def judge_background(lab: Pixels) -> str:
    """The ground that most border pixels are nearest to; lab is (height, width, 3)."""
    ring = np.ones(lab.shape[:2], dtype=bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    distances = np.stack([_distances(lab[ring], ground) for ground in GROUNDS])
    votes = np.bincount(distances.argmin(axis=0), minlength=len(GROUNDS))
    return list(GROUNDS)[int(votes.argmax())]


def object_mask(lab: Pixels, background: str) -> Mask:
    """The largest connected patch unlike the background, its holes filled."""
    height, width = lab.shape[:2]
    unlike = _distances(lab, background) > UNLIKE
    canvas = Image.new("L", (width + 2, height + 2), 0)
    canvas.paste(Image.fromarray(unlike.astype(np.uint8)), (1, 1))
    labels = canvas.copy()
    best, best_size = 1, 0
    for label in range(2, 250):
        left = np.argwhere(np.asarray(labels) == 1)
        if not len(left):
            break
        ImageDraw.floodfill(labels, (int(left[0][1]), int(left[0][0])), label)
        size = int((np.asarray(labels) == label).sum())
        if size > best_size:
            best, best_size = label, size
    patch = labels.point([255 if value == best else 0 for value in range(256)])
    ImageDraw.floodfill(patch, (0, 0), 128)  # the outside; what it does not reach is object or hole
    mask: Mask = np.asarray(patch)[1:-1, 1:-1] != 128
    return mask


def judge_colour(picture: Image.Image, mask: Mask) -> str:
    """The colour word most of the object's vivid pixels are nearest to, by hue."""
    hsv = np.asarray(picture.convert("HSV"), dtype=np.float64)[mask] / 255
    vivid = hsv[(hsv[:, 1] > 0.35) & (hsv[:, 2] > 0.3)]
    if not len(vivid):
        return "none"
    away = np.abs(vivid[:, :1] * 360 - np.array(list(HUES_DEG.values())))
    nearest = np.minimum(away, 360 - away).argmin(axis=1)
    return list(HUES_DEG)[int(np.bincount(nearest, minlength=len(HUES_DEG)).argmax())]


def normalised(mask: Mask, turn_deg: float = 0.0, mirrored: bool = False) -> Mask:
    """The silhouette turned, scaled to AREA and centred on a square of SIDE."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rows, columns = np.nonzero(np.asarray(image))
    if not len(rows):
        return np.zeros((SIDE, SIDE), dtype=bool)
    scale = float(np.sqrt(len(rows) / AREA))  # source pixels per target pixel
    cos, sin = scale * np.cos(np.radians(turn_deg)), scale * np.sin(np.radians(turn_deg))
    x, y, half = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, SIDE / 2
    placed = image.transform(
        (SIDE, SIDE),
        Image.Transform.AFFINE,
        (cos, -sin, x - cos * half + sin * half, sin, cos, y - sin * half - cos * half),
        Image.Resampling.BILINEAR,
    )
    result: Mask = np.asarray(placed) > 127
    return result


@cache
def references() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Every reference silhouette, a little turned and shifted each way: flat masks, and whose each is."""
    with Image.open(SILHOUETTES) as strip:
        masks = np.asarray(strip.convert("1"))
    flat, names = [], []
    for index, name in enumerate(sample_model.OBJECTS):
        mask = masks[:, index * SIDE : (index + 1) * SIDE]
        for turn in (-10, -5, 0, 5, 10):
            for mirrored in (False, True):
                upright = normalised(mask, turn, mirrored)
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        flat.append(np.roll(upright, (down, right), axis=(0, 1)).ravel())
                        names.append(name)
    return np.array(flat, dtype=np.float32), tuple(names)


def judge_object(mask: Mask) -> tuple[str, float]:
    """The kind whose silhouette overlaps best, and that overlap (intersection over union)."""
    if mask.mean() < LEAST_SHARE:
        return "nothing", 0.0
    wanted, names = references()
    seen = normalised(mask).ravel().astype(np.float32)
    common = wanted @ seen
    overlaps = common / (wanted.sum(axis=1) + seen.sum() - common)
    best = int(overlaps.argmax())
    overlap = float(overlaps[best])
    return (names[best] if overlap >= LEAST_OVERLAP else "nothing"), overlap


def judge(picture: Image.Image) -> Verdict:
    """What the picture shows, from its pixels alone."""
    lab = to_lab(np.asarray(picture, dtype=np.float64))
    background = judge_background(lab)
    mask = object_mask(lab, background)
    kind, overlap = judge_object(mask)
    return Verdict(judge_colour(picture, mask), kind, background, overlap)


def figures(wanted: Sequence[Combination], verdicts: Sequence[Verdict]) -> Figures:
    """How often the verdicts agree with what was wanted."""
    pairs = list(zip(wanted, verdicts, strict=True))
    count = len(pairs)
    return Figures(
        count,
        sum(want.colour == saw.colour for want, saw in pairs) / count,
        sum(want.object == saw.object for want, saw in pairs) / count,
        sum(want.background == saw.background for want, saw in pairs) / count,
    )


def chosen_combinations() -> list[Combination]:
    """The fixed questions: HELD_OUT_PROMPTS never trained on, the rest trained on, every object as often."""
    rng = random.Random(2026)
    never = {tuple(entry) for entry in json.loads(HELD_OUT_FILE.read_text(encoding="utf-8"))}
    per_kind, held_per_kind = (
        PROMPTS // len(sample_model.OBJECTS),
        HELD_OUT_PROMPTS // len(sample_model.OBJECTS),
    )
    chosen: list[Combination] = []
    for kind in sample_model.OBJECTS:
        pairs = [(colour, ground) for colour in sample_model.COLOURS for ground in sample_model.BACKGROUNDS]
        rng.shuffle(pairs)
        held = [pair for pair in pairs if (pair[0], kind, pair[1]) in never][:held_per_kind]
        known = [pair for pair in pairs if (pair[0], kind, pair[1]) not in never][: per_kind - len(held)]
        chosen += [Combination(colour, kind, ground, held_out=True) for colour, ground in held]
        chosen += [Combination(colour, kind, ground) for colour, ground in known]
    rng.shuffle(chosen)
    return chosen


def generate(
    pipe: Any, wanted: Sequence[Combination], steps: int = STEPS, guidance: float = GUIDANCE, **options: Any
) -> list[Image.Image]:
    """One picture for each combination; picture i has seed i."""
    import torch

    pictures: list[Image.Image] = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        prompts = [sample_model.prompt(want.colour, want.object, want.background) for want in part]
        seeds = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
        pictures += pipe(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, **options
        ).images
    return pictures


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 8, enlarge: int = 2) -> Image.Image:
    """The pictures side by side, enlarged without smoothing."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheet", type=Path, help="write the first 48 pictures there, as a PNG")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args()
    wanted = chosen_combinations()
    pipe = sample_pipeline()
    began = time.monotonic()
    pictures = generate(pipe, wanted, options.steps, options.guidance)
    seconds = time.monotonic() - began
    verdicts = [judge(picture) for picture in pictures]
    print(f"all:      {figures(wanted, verdicts)}")
    for name, held_out in (("held out", True), ("trained", False)):
        part = [(want, saw) for want, saw in zip(wanted, verdicts, strict=True) if want.held_out is held_out]
        print(f"{name + ':':<9} {figures([want for want, _ in part], [saw for _, saw in part])}")
    print(
        f"mean overlap of silhouettes {np.mean([saw.overlap for saw in verdicts]):.3f}; "
        f"{seconds / len(pictures):.3f} s a picture in batches of {BATCH}, {options.steps} steps"
    )
    for want, saw in zip(wanted, verdicts, strict=True):
        if (want.colour, want.object, want.background) != (saw.colour, saw.object, saw.background):
            print(
                f"  wanted {want.colour} {want.object} on {want.background}, saw {saw.colour} {saw.object} "
                f"({saw.overlap:.2f}) on {saw.background}"
            )
    if options.sheet:
        contact_sheet(pictures[:48]).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
