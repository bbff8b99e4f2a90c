"""The embedded sample model: where its weights and configuration lie, and the words it understands.

A text-to-image model of about four million parameters that draws game sprites, so that a fresh install
can make a picture without a download. `packaging/sample-model/` holds the script that made it. This
module is constants only: importing it loads nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).resolve().parent

WEIGHTS: Final[Path] = _HERE / "sample.safetensors"
"""Half-precision weights in Stable Diffusion's original single-file layout."""

CONFIG_DIR: Final[Path] = _HERE / "config"
"""The diffusers configuration folder that goes with WEIGHTS: model_index.json, tokenizer, scheduler, ..."""

SHA256: Final[str] = "7f8c06acddecfb27480c1da7d99afb1b8ddca4b4b9274af2dfe383f211c5c6be"
"""Of WEIGHTS; the training script writes it here."""

DEFAULTS: Final = {"cfgScale": 4.0, "steps": 20, "width": 64, "height": 64}
"""The ``cliDefaults`` that a source of it says."""

OBJECTS: Final = (
    "potion",
    "sword",
    "shield",
    "key",
    "heart",
    "gem",
    "mushroom",
    "tree",
    "chest",
    "ghost",
    "star",
    "fish",
)
COLOURS: Final = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS: Final = ("grass", "sky", "stone", "night", "sand", "white")


def prompt(colour: str, obj: str, background: str) -> str:
    """The wording the model knows best, for one of COLOURS, OBJECTS and BACKGROUNDS each."""
    return f"a {colour} {obj}, {background} background, game sprite"
