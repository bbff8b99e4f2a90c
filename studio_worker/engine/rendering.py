"""What a loaded model is to the engine: something that renders decided parameters to a picture.

This module owns the seam between the engine and the model families. It imports no torch at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from studio_worker.engine import Progress
from studio_worker.engine.parameters import Parameters
from studio_worker.jobs import Cancel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Starting:
    """The pictures a job starts from, both of its size: RGB, and a mask of mode L (255 = may change)."""

    picture: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Rendered:
    """A picture (RGB) and facts about its making that belong into ``generationMeta``."""

    picture: Image.Image
    facts: Mapping[str, Any] = field(default_factory=dict)


class LoadedModel(Protocol):
    """A model on its device."""

    def modules(self) -> Iterable[torch.nn.Module]:
        """Every module that holds weights, once each."""
        ...

    def render(
        self, parameters: Parameters, starting: Starting, progress: Progress, cancel: Cancel
    ) -> Rendered:
        """Make one picture. ``progress`` is called and ``cancel`` checked at every model evaluation.

        Raises:
            JobError: the parameters ask for what this family cannot do.
            JobCancelled: ``cancel`` was set; the model stays usable.
        """
        ...
