"""What a job asks for and what comes out of it, free of sockets, disks and torch.

A :class:`Job` is an offer that was accepted. Field names and defaults of :class:`ImageTask` are the
wire's (camelCase in JSON); ``None`` means "not given", so that a model's own defaults can win.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from studio_worker.errors import JobCancelled
from studio_worker.models import CAMEL, Count, Label, ModelSource
from studio_worker.plain import REPLACEMENT, plain_lines

MAX_PROMPT_BYTES = 128 * 1024
"""In UTF-8. The longest text encoder served reads 1,024 tokens, some 5,000 letters, and cuts off what is
beyond, as stable-diffusion.cpp does, so that ten thousand words still make a picture."""


def _readable(prompt: str) -> str:
    size = len(prompt.encode("utf-8", "replace"))
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"has {size} bytes; at most {MAX_PROMPT_BYTES} are read")
    return plain_lines(prompt).replace(REPLACEMENT, " ")


Prompt = Annotated[str, AfterValidator(_readable)]


class ImageTask(BaseModel):
    """One picture: text-to-image, image-to-image (``init_image_url``) or inpainting (and ``mask_url``).

    Sizes are pixels. ``denoise`` is 0..1: how far the result may leave the initial picture.
    """

    model_config = CAMEL

    kind: Literal["image"] = "image"
    prompt: Prompt
    negative_prompt: Prompt | None = None
    init_image_url: str | None = None
    mask_url: str | None = None
    ref_image_url: str | None = None
    denoise: float = Field(default=0.75, ge=0, le=1)
    cfg_scale: float | None = None
    sampling_method: Label | None = None
    width: Count | None = Field(default=None, ge=0)
    height: Count | None = Field(default=None, ge=0)
    steps: Count | None = Field(default=None, ge=0)
    seed: Annotated[int, Field(ge=-(2**64), le=2**65)] | None = None
    ext: Label = "webp"

    @property
    def input_urls(self) -> tuple[str, ...]:
        """The addresses of the pictures that it starts from."""
        given = (self.init_image_url, self.mask_url, self.ref_image_url)
        return tuple(url for url in given if url is not None)


@dataclass(frozen=True)
class Job:
    """One accepted job. ``taken_at`` is :func:`time.monotonic` when its offer arrived."""

    job_id: str
    model: str
    task: ImageTask
    source: ModelSource
    taken_at: float = 0.0
    vram_gb_estimate: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A finished picture: encoded bytes, its extension, and what made it.

    ``meta`` becomes ``generationMeta`` (JSON); ``timings_s`` maps stage names (``load``, ``generate``,
    ``encode``) to seconds.
    """

    data: bytes
    ext: str
    meta: Mapping[str, Any]
    timings_s: Mapping[str, float] = field(default_factory=dict)


class Cancel:
    """A request to stop the job in hand, set from any thread and checked by the engine at every step."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._reason = ""

    def set(self, reason: str) -> None:
        """Ask the job to stop; the first reason is kept."""
        if not self._event.is_set():
            self._reason = reason
            self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    @property
    def reason(self) -> str:
        """Why the job was asked to stop; empty while it was not."""
        return self._reason

    def check(self) -> None:
        """Raises JobCancelled if the job was asked to stop."""
        if self._event.is_set():
            raise JobCancelled(self._reason)
