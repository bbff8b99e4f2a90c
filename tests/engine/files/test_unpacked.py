"""Quantised weights that are written out where the device has room: when, and that nobody sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from PIL import Image

from studio_worker.engine import Inputs, Resident
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import FAMILIES, identify
from studio_worker.engine.files.packed import PackedLinear, pack, packed_linears, unpack
from studio_worker.engine.loading import load_part
from studio_worker.engine.loras.adapters import Adapters
from studio_worker.engine.loras.places import LoraPlaces
from studio_worker.engine.loras.wanted import Lora
from studio_worker.engine.memory.placement import Footprint
from studio_worker.engine.parameters import resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.needs import footprint
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.errors import JobCancelled
from studio_worker.gpu_check.tiny.families import tiny
from studio_worker.gpu_check.tiny.model import Tiny
from studio_worker.jobs import Cancel
from studio_worker.models import CliDefaults, LocalFile
from tests.lab.engine import decoded, encoded, request, scene
from tests.lab.flow_models import PROMPT, SEED, make
from tests.lab.memory import GIB, Fake
from tests.lab.quantising import (
    WRITERS,
    written,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CPU = torch.device("cpu")
DEFAULTS = CliDefaults(width=64, height=64, steps=1, cfg_scale=1.0)
SERVED = [family.name for family in FAMILIES if family.name != "sample"]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            made[name] = tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def engine(model: Tiny, memory: Fake) -> DiffusionEngine:
    return DiffusionEngine("cpu", families=(model.family,), memory=memory)


def starting(model: Tiny) -> Starting:
    """What the family's simplest job starts from."""
    is_for_masks = model.family.pipelines.text is None
    return Starting(scene(), Image.new("L", (64, 64), 255)) if is_for_masks else Starting()


def inputs(model: Tiny) -> Inputs:
    """The same, as files."""
    given = starting(model)
    return Inputs(*(None if each is None else encoded(each) for each in (given.picture, given.mask)))


def resident(made: DiffusionEngine) -> Resident:
    (found,) = made.resident().values()
    return found


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", SERVED)
def test_picture_is_the_same_to_the_bit(name: str, form: str, tinies: Callable[[str], Tiny]) -> None:
    """Whatever family and quantisation: with room on the device for it, weights are written out once, and
    the picture is that of the packed weights, byte for byte.
    """
    model = tinies(name)
    if form.startswith("GGUF") and not any(each.architecture for each in model.published.values()):
        pytest.skip("not published so")
    given = written(model, form)
    roomy, narrow = (engine(model, Fake(GIB, host)) for host in (GIB, 0))
    asked = {"defaults": DEFAULTS, "inputs": inputs(model)}
    found, meant = (make(each, given, **asked).data for each in (roomy, narrow))
    assert (resident(roomy).is_unpacked, resident(narrow).is_unpacked) == (True, False)
    assert resident(roomy).size_bytes > resident(narrow).size_bytes
    assert found == meant


@pytest.mark.parametrize("form", ["GGUF of every kind", "8-bit with scales"])
@pytest.mark.parametrize("name", SERVED)
def test_half_precision_is_the_same_to_the_bit(name: str, form: str, tinies: Callable[[str], Tiny]) -> None:
    """So it is in the half precision that a GPU computes in, with a LoRA, too, and when packed again."""
    model = tinies(name)
    family, dtype = model.family, getattr(torch, model.family.halves[0])
    blueprint = identify(written(model, form), (family,))
    placed = LoraPlaces().place(Lora(model.lora(), 1.0), family, blueprint.sections)
    parts: dict[str, torch.nn.Module | None] = {
        part: load_part(family.parts[part], section, CPU, dtype)
        for part, section in blueprint.sections.items()
    }
    quantised = [part for key, part in parts.items() if part is not None and key != "vae"]
    asked, begun = request(defaults=DEFAULTS, inputs=inputs(model)), starting(model)
    parameters = resolve(asked.task, asked.defaults, family.defaults, from_image=begun.picture is not None)

    def pictures() -> Iterator[bytes]:
        adapters = Adapters()
        for loras in ((), (placed,)):
            loaded = LoadedModel(family, {part: parts.get(part) for part in family.parts})
            adapters.set(loaded.parts, loras, {})
            yield loaded.render(parameters, begun, lambda done, total: None, Cancel()).picture.tobytes()
        adapters.clear()

    packed = list(pictures())
    assert packed[0] != packed[1]
    for part in quantised:
        unpack(part, keeps=True)
    assert not any(layer.is_packed for part in quantised for layer in packed_linears(part))
    assert list(pictures()) == packed
    for part in quantised:
        pack(part, CPU)
    assert list(pictures()) == packed


# --- when there is room ---


@dataclass
class Shelf:
    """Two models that share nothing, and what their pictures need."""

    model: Tiny
    first: tuple[LocalFile, ...]
    second: tuple[LocalFile, ...]

    def needed(self, side: int = 64) -> Footprint:
        return footprint(identify(self.first, (self.model.family,)), "float32", side * side, guided=False)


@pytest.fixture(scope="module")
def shelf(tinies: Callable[[str], Tiny]) -> Shelf:
    model = tinies("z-image")
    first = model.files("Q8_0")
    second = tuple(file._replace(content=f"other {file.content}") for file in first)
    return Shelf(model, first, second)


def test_unpacked_weights_are_given_up_before_a_model_leaves(shelf: Shelf) -> None:
    """Where another model wants to the device, the one that is there has its weights packed again, and
    stays; its next picture is the same.
    """
    roomy = shelf.needed().plans()[0].peak_bytes
    made = engine(shelf.model, Fake(roomy))
    before = make(made, shelf.first, defaults=DEFAULTS).data
    whole = resident(made)
    assert whole.is_unpacked
    other = made.generate(
        replace(request(files=shelf.second, defaults=DEFAULTS, prompt=PROMPT, seed=SEED), model="other"),
        lambda done, total: None,
        Cancel(),
    )
    assert {each.place for each in made.resident().values()} == {"device"}
    assert len(made.resident()) == 2
    assert made.resident()["sample-model"].size_bytes < whole.size_bytes
    assert make(made, shelf.first, defaults=DEFAULTS).data == before
    assert decoded(other.data).tobytes() == decoded(before).tobytes()


def test_picture_that_needs_the_room_has_it(shelf: Shelf) -> None:
    """A larger picture of the same model has the memory that unpacked weights took; a smaller one after it
    gives it back to them.
    """
    roomy = shelf.needed().plans()[0].peak_bytes
    side = next(side for side in range(64, 512, 32) if shelf.needed(side).plans()[0].peak_bytes > roomy)
    made = engine(shelf.model, Fake(roomy))
    small, whole = make(made, shelf.first, defaults=DEFAULTS).data, resident(made)
    assert whole.is_unpacked
    make(made, shelf.first, defaults=DEFAULTS, width=side, height=side)
    assert resident(made).size_bytes < whole.size_bytes
    assert make(made, shelf.first, defaults=DEFAULTS).data == small
    assert resident(made) == whole


def test_model_that_waits_in_ram_is_packed(shelf: Shelf) -> None:
    """A model that leaves the device takes no more of RAM than its file."""
    made = engine(shelf.model, Fake(GIB))
    before = make(made, shelf.first, defaults=DEFAULTS).data
    made.release()
    assert (resident(made).place, resident(made).is_unpacked) == ("ram", False)
    assert resident(made).size_bytes == pytest.approx(shelf.needed().weight_bytes, rel=0.01)
    assert make(made, shelf.first, defaults=DEFAULTS).data == before
    assert resident(made).is_unpacked


def test_model_whose_unpacking_was_cancelled_is_unpacked_by_the_next_job(shelf: Shelf) -> None:
    """A job that is cancelled while weights are written out leaves nothing half done: the next one writes the
    rest out, and has the same picture.
    """
    whole = engine(shelf.model, Fake(GIB))
    meant = make(whole, shelf.first, defaults=DEFAULTS).data
    made, cancel = engine(shelf.model, Fake(GIB)), Cancel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLinear, "unpack", _cancelling(PackedLinear.unpack, cancel))
        with pytest.raises(JobCancelled):
            made.generate(
                request(files=shelf.first, defaults=DEFAULTS, prompt=PROMPT, seed=SEED),
                lambda done, total: None,
                cancel,
            )
    assert make(made, shelf.first, defaults=DEFAULTS).data == meant
    assert resident(made) == resident(whole)
    packed = [
        layer for part in made.components("sample-model") for layer in packed_linears(part) if layer.is_packed
    ]
    assert packed == []


def _cancelling(unpack: Callable[..., None], cancel: Cancel) -> Callable[..., None]:
    def unpack_and_cancel(layer: PackedLinear, **how: Any) -> None:
        unpack(layer, **how)
        cancel.set("the studio wants it no more")

    return unpack_and_cancel


def test_on_a_cpu_weights_are_unpacked_where_ram_has_room(shelf: Shelf) -> None:
    """A CPU unpacks weights at every step too, and slowly; with room for it in RAM it does so once."""
    made = DiffusionEngine("cpu", families=(shelf.model.family,))
    tight = DiffusionEngine("cpu", families=(shelf.model.family,), budget_bytes=shelf.needed().weight_bytes)
    pictures = [make(each, shelf.first, defaults=DEFAULTS).data for each in (made, tight)]
    assert pictures[0] == pictures[1]
    assert (resident(made).is_unpacked, resident(tight).is_unpacked) == (True, False)
