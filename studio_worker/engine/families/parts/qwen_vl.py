"""Qwen2.5-VL as a text encoder that sees: put together from its parts, and pictures prepared for it.

This module owns what transformers wants done around the model. Its own processor needs torchvision, which the
worker leaves out; the picture half of it works without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PICTURE_TOKEN = "<|image_pad|>"


class SeeingTextEncoder(Qwen2_5_VLModel):  # type: ignore[misc]
    """Qwen2.5-VL without its head, as the Qwen-Image pipelines call it."""

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """See transformers; ``input_ids`` is (batch, tokens)."""
        if inputs.get("pixel_values") is not None:
            # transformers numbers a picture's patches by their place only where it is told which tokens they
            # are, and diffusers' Qwen-Image-Edit pipelines (0.42) do not tell: they would be read in a row.
            inputs.setdefault("mm_token_type_ids", (input_ids == self.config.image_token_id).int())
        return super().forward(input_ids=input_ids, **inputs)


def join(language: Any, vision: Any) -> SeeingTextEncoder:
    """One model of two loaded ones, whose weights it shares; without ``vision`` it reads text alone."""
    # Built without layers, since both halves are there: a model is put together for every job.
    hollow = {"num_hidden_layers": 0, "layer_types": [], "vocab_size": 0}
    text, pictures = language.config.to_dict(), {} if vision is None else vision.config.to_dict()
    with torch.device("meta"):
        model = SeeingTextEncoder(
            Qwen2_5_VLConfig(text_config=text | hollow, vision_config=pictures | {"depth": 0})
        )
    model.config = Qwen2_5_VLConfig(text_config=text, vision_config=pictures)
    model.language_model, model.visual = language, vision
    model.eval()
    return model


class PictureProcessor:
    """Prompts with pictures in them, as the Qwen-Image-Edit pipelines call transformers' processor."""

    def __init__(self, tokenizer: Any, vision: Any) -> None:
        self._tokenizer = tokenizer
        self._pictures = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            # Qwen-Image-Edit's processor/preprocessor_config.json; the class's own upper bound is lower.
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384},
        )
        self._merged = vision.spatial_merge_size**2

    def __call__(
        self, text: Sequence[str], images: Sequence[Image.Image], *, padding: bool, return_tensors: str
    ) -> BatchFeature:
        """Tokens of ``text``, a picture's place in it widened to one token for each of its merged patches.

        Places beyond the pictures are somebody's prompt, and are left out.
        """
        seen = self._pictures(images=images, return_tensors=return_tensors)
        counts = iter((seen["image_grid_thw"].prod(dim=1) // self._merged).tolist())
        widened = []
        for prompt in text:
            first, *rest = prompt.split(PICTURE_TOKEN)
            widened.append(first + "".join(PICTURE_TOKEN * next(counts, 0) + part for part in rest))
        tokens = self._tokenizer(widened, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **seen})
