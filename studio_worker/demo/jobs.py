"""What the demo asks for: its jobs, in order, and the pictures that two of them start from."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

from studio_worker import sample_model


@dataclass(frozen=True)
class Shown:
    """One job of the demo. ``must_fail`` is a word its failure must contain, empty where it must succeed."""

    title: str
    prompt: str
    task: dict[str, Any] = field(default_factory=dict)
    must_fail: str = ""


def shown_jobs(init_url: str, mask_url: str) -> list[Shown]:
    """What the demo asks for, in order. ``init_url`` and ``mask_url`` are pictures of 64 by 64 pixels."""
    say = sample_model.prompt
    pair = {"seed": 7, "ext": "png"}
    potion = say("red", "potion", "grass")
    return [
        Shown("seeded", potion, pair),
        Shown("seeded, again", potion, pair),
        Shown("png", say("blue", "sword", "stone"), {"seed": 1, "ext": "png"}),
        Shown("webp", say("green", "gem", "night"), {"seed": 2, "ext": "webp"}),
        Shown("jpg", say("purple", "mushroom", "grass"), {"seed": 3, "ext": "jpg"}),
        Shown("128 x 128", say("red", "chest", "sand"), {"seed": 4, "width": 128, "height": 128}),
        Shown("128 x 64", say("yellow", "star", "night"), {"seed": 5, "width": 128, "height": 64}),
        Shown(
            "negative prompt",
            say("pink", "heart", "sky"),
            {"seed": 6, "negativePrompt": "night background"},
        ),
        Shown(
            "sampler dpm++2m",
            say("cyan", "ghost", "night"),
            {"seed": 8, "samplingMethod": "dpm++2m", "steps": 12},
        ),
        Shown(
            "image-to-image",
            say("blue", "potion", "grass"),
            {"seed": 9, "initImageUrl": init_url, "denoise": 0.75, "ext": "png"},
        ),
        Shown(
            "inpainting",
            say("green", "potion", "grass"),
            {"seed": 10, "initImageUrl": init_url, "maskUrl": mask_url, "denoise": 0.9, "ext": "png"},
        ),
        Shown(
            "unknown sampler",
            say("red", "fish", "white"),
            {"samplingMethod": "guess"},
            must_fail="unknown samplingMethod",
        ),
        Shown("the one after", say("yellow", "key", "sand"), {"seed": 11}),
        Shown("held-out words", say("pink", "tree", "sky"), {"seed": 12}),
    ]


def mask() -> bytes:
    """White, where the picture may change: the middle, where the object stands."""
    drawn = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(drawn).ellipse((8, 8, 55, 59), fill=255)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()
