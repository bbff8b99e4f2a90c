"""What models are made of: components in their published layouts, and tokenizers.

Nothing here imports torch: library classes are named as text, and what handles tensors uses their methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from studio_worker.engine.families.parts.layer_names import Named
from studio_worker.engine.files.gguf_files import Shape
from studio_worker.engine.files.sections import Section, Tensors
from studio_worker.models import FileRole

CONFIGS = Path(__file__).parents[1] / "configs"


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file that this package carries."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


@dataclass(frozen=True)
class Layout:
    """One published naming of a component's tensors.

    Args:
        name: what people call it: ``diffusers``, ``original``, ``llama.cpp``.
        tells: names and shapes that a section must have to be of it. ``None`` in a shape is any size.
        rename: from all tensors under published names to all under the library class's. It may split and
            transpose them, and leave out what the class has no use for.
        without: names that a section of this layout must not have, since they tell a wider architecture.
        below: how the prefix of a section of this layout begins, where names and shapes do not tell it.
    """

    name: str
    tells: Mapping[str, tuple[int | None, ...]]
    rename: Callable[[Tensors], Tensors] = lambda tensors: tensors
    without: tuple[str, ...] = ()
    below: str = ""

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        return not self.misfits(shapes)

    def misfits(self, shapes: Mapping[str, Shape]) -> list[str]:
        """What of :attr:`tells` is missing or has another shape, and what should not be there."""
        wrong = [f"{name}, which it must not have" for name in self.without if name in shapes]
        for name, expected in self.tells.items():
            found = shapes.get(name)
            if found is None:
                wrong.append(f"no {name}")
            elif not _is_of(found, expected):
                wrong.append(f"{name} is {list(found)}, not {list(expected)}")
        return wrong

    def nested(self, outers: Sequence[str]) -> tuple[Layout, ...]:
        """This layout below each of ``outers``: what libraries, and their versions, put before all names of
        a component, or leave out.
        """
        return tuple(self._within(outer) for outer in outers)

    def _within(self, outer: str) -> Layout:
        def rename(tensors: Tensors) -> Tensors:
            return self.rename({name.removeprefix(outer): tensor for name, tensor in tensors.items()})

        tells = {outer + name: shape for name, shape in self.tells.items()}
        return replace(self, tells=tells, rename=rename)


def _is_of(found: Shape, expected: tuple[int | None, ...]) -> bool:
    # stable-diffusion.cpp's GGUF files leave out outer dimensions of size 1.
    while len(expected) > len(found) and expected[0] == 1:
        expected = expected[1:]
    return len(found) == len(expected) and all(
        want in (None, is_) for want, is_ in zip(expected, found, strict=True)
    )


@dataclass(frozen=True)
class Part:
    """One component of a model: the unit that is loaded, shared and unloaded.

    Args:
        kind: what it is, in words for errors: ``Qwen3-4B text encoder``.
        role: the role under which a source brings it as a file of its own.
        cls: the library class, e.g. ``diffusers.AutoencoderKL``, ``transformers.CLIPTextModel``.
        config: the folder that holds its ``config.json``. Families whose parts have class and folder in
            common share what is loaded.
        layouts: the namings in which it is published, the narrowest first.
        stated: what GGUF files say of it: by their name for it, its place in ``config.json``.
        finish: is given the component once it is loaded, before anything computes with it.
        other_names: from the names of the class's layers to what else those are called in LoRA files.
    """

    kind: str
    role: FileRole
    cls: str
    config: Path
    layouts: tuple[Layout, ...]
    stated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    finish: Callable[[Any], None] | None = None
    other_names: Callable[[Collection[str]], Mapping[str, Named]] = lambda layers: {}  # noqa: ARG005

    @property
    def identity(self) -> str:
        """What parts have in common whose loaded weights are interchangeable."""
        return f"{self.cls} {self.config}"

    def layout(self, section: Section) -> Layout | None:
        """The layout of ``section`` where it is this part."""
        fitting = (layout for layout in self.layouts if section.prefix.startswith(layout.below))
        return next((layout for layout in fitting if layout.fits(section.shapes)), None)

    def fits(self, section: Section) -> bool:
        return self.layout(section) is not None

    def resembles(self, section: Section) -> bool:
        """Whether ``section`` has some of the telling names, whatever their shapes."""
        return any(name in section.shapes for layout in self.layouts for name in layout.tells)

    def has_names(self, section: Section) -> bool:
        """Whether ``section`` has all telling names of a layout, whatever their shapes."""
        return any(layout.tells.keys() <= section.shapes.keys() for layout in self.layouts)

    def why_not(self, section: Section) -> str:
        """What tells that ``section`` is not this part, of the layout that it is nearest to."""
        return ", ".join(min((layout.misfits(section.shapes) for layout in self.layouts), key=len)[:3])


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that this package carries.

    Args:
        cls: transformers' class, by name.
        folder: where its files lie.
        size: how many entries it must have: from a damaged folder transformers silently makes one of two.
        options: further arguments of its ``from_pretrained``.
    """

    cls: str
    folder: Path
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)
