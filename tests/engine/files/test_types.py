"""Which number types weights may have, known without torch."""

from __future__ import annotations

from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

from studio_worker.engine.files.types import BLOCKS
from studio_worker.engine.rendering.needs import UNPACKING


def test_blocks_are_those_that_the_library_computes_with() -> None:
    """What an offer is judged by is what the library can do, and what each of them takes is known."""
    assert {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} == BLOCKS == UNPACKING.keys()
