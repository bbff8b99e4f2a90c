"""Object removal through the engine's own door: a picture and a mask, and a small graph in LaMa's place.

What the graph paints proves nothing about LaMa's quality; it proves what is shown to it and what becomes of
what it paints.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image, ImageDraw

from studio_worker.box.device import Device
from studio_worker.engine import Inputs, default_router
from studio_worker.engine.faults import OutOfMemory
from studio_worker.engine.removal import engine as removal
from studio_worker.engine.removal.engine import RemovalEngine
from studio_worker.engine.removal.holes import holes
from studio_worker.engine.rendering.estimate import Estimates
from studio_worker.errors import FileDamaged, JobCancelled, JobError, JobImpossible, NotServed
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import CliDefaults, LocalFile, ModelSource
from tests.lab.engine import decoded, encoded, request
from tests.lab.removal_graphs import (
    IMAGE,
    MASK,
    constant,
    greedy,
    mask_alone,
    mean_of_known,
    pull_push,
    removal_graph,
    same,
)

FAR_PX = 16
"""Beyond the feather: four of its sigmas."""

Box = tuple[int, int, int, int]


def backdrop(width: int, height: int) -> Image.Image:
    """A smooth picture, in which whatever does not belong shows."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, Image.new("L", (width, height), 90)))


def noise(width: int, height: int) -> Image.Image:
    """A picture that no resampling leaves as it is."""
    levels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def masked(size: tuple[int, int], *boxes: Box) -> Image.Image:
    mask = Image.new("L", size, 0)
    for box in boxes:
        mask.paste(255, box)
    return mask


def remove(
    graph: LocalFile,
    picture: Image.Image | bytes,
    mask: Image.Image | bytes,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancel: Cancel | None = None,
    **task: Any,
) -> Picture:
    given = [each if isinstance(each, bytes) else encoded(each) for each in (picture, mask)]
    asked = request(
        files=(graph,), inputs=Inputs(given[0], given[1]), defaults=CliDefaults(width=512, height=512), **task
    )
    return RemovalEngine("cpu").generate(asked, progress, cancel or Cancel())


def removed(graph: LocalFile, picture: Image.Image, mask: Image.Image, **task: Any) -> np.ndarray[Any, Any]:
    return np.asarray(decoded(remove(graph, picture, mask, **task).data)).astype(int)


def levels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture.convert("RGB")).astype(int)


def far_from(size: tuple[int, int], *boxes: Box) -> np.ndarray[Any, Any]:
    """Where nothing of ``boxes`` is near."""
    grown = ((box[0] - FAR_PX, box[1] - FAR_PX, box[2] + FAR_PX, box[3] + FAR_PX) for box in boxes)
    return np.asarray(masked(size, *grown)) == 0


@pytest.fixture
def pull(tmp_path: Path) -> LocalFile:
    return removal_graph(tmp_path / "pull.onnx", pull_push)


# --- what becomes of the picture ---


@pytest.mark.parametrize(
    "size",
    [(512, 512), (1024, 768), (300, 200), (64, 48), (40, 900), (777, 333)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_object_is_gone_and_its_surroundings_are_there(pull: LocalFile, size: tuple[int, int]) -> None:
    """In a picture of any size the object makes room for what is around it, up to its very edge."""
    width, height = size
    clean, dirty = backdrop(*size), backdrop(*size)
    box = (width // 3, height // 3, width // 3 + width // 5, height // 3 + height // 5)
    dirty.paste((255, 255, 255), box)
    mask = masked(size, box)
    found = removed(pull, dirty, mask)
    assert found.shape == (height, width, 3)
    white = np.asarray(mask) > 128
    assert np.abs(found - levels(clean))[white].max() < 64, "white shines through"
    assert np.abs(found - levels(clean))[white].mean() < 16


@pytest.mark.parametrize("ext", ["png", "webp"])
def test_what_is_far_from_the_mask_stays_to_the_bit(pull: LocalFile, ext: str) -> None:
    """Beyond the feather every pixel is the one that came, in the studio's own format too."""
    picture = noise(700, 600)
    boxes = (100, 50, 220, 130), (500, 400, 520, 590)
    found = removed(pull, picture, masked(picture.size, *boxes), ext=ext)
    far = far_from(picture.size, *boxes)
    assert np.array_equal(found[far], levels(picture)[far])
    assert not np.array_equal(found, levels(picture))


@pytest.mark.parametrize("size", [(1400, 900), (200, 100)], ids=["large", "small"])
def test_surroundings_are_shown_at_the_size_they_have(tmp_path: Path, size: tuple[int, int]) -> None:
    """What is around a hole reaches the graph, and comes back, without being made larger or smaller."""
    picture = noise(*size)
    mask = masked(size, (20, 30, 120, 90))
    found = removed(removal_graph(tmp_path / "same.onnx", same), picture, mask)
    assert np.array_equal(found, levels(picture))


def test_hole_larger_than_the_graph_is_filled_whole(pull: LocalFile) -> None:
    """An object that a window of 512 px does not hold is shown smaller, and gone as well."""
    clean, dirty = backdrop(1200, 1000), backdrop(1200, 1000)
    box = (200, 200, 900, 800)
    dirty.paste((255, 255, 255), box)
    mask = masked(dirty.size, box)
    found = removed(pull, dirty, mask)
    white, far = np.asarray(mask) > 128, far_from(dirty.size, box)
    assert np.abs(found - levels(clean))[white].mean() < 30
    assert found[white].max() < 250
    assert np.array_equal(found[far], levels(dirty)[far])


def test_banner_is_filled_within_modest_memory(pull: LocalFile) -> None:
    """A hole as long as a very long picture is shown in its proportions: no square of that side is made."""
    clean = backdrop(12_000, 300)
    dirty = clean.copy()
    box = (50, 140, 11_950, 160)
    dirty.paste((255, 255, 255), box)
    tracemalloc.start()
    try:
        found = removed(pull, dirty, masked(dirty.size, box))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 300e6
    assert np.abs(found - levels(clean)).mean() < 10
    assert np.abs(found - levels(clean))[150, 100:11_900].mean() < 80


def test_largest_hole_is_filled_within_modest_memory(tmp_path: Path) -> None:
    """Where all of a large picture is one hole, what is laid in takes no more than pictures do."""
    picture, mask = Image.new("RGB", (4000, 3000), "red"), Image.new("L", (4000, 3000), 255)
    graph = removal_graph(tmp_path / "same.onnx", same)
    tracemalloc.start()
    try:
        found = remove(graph, picture, mask)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * 4000 * 3000
    assert (levels(decoded(found.data)) == levels(picture)).all()


def test_each_hole_sees_its_own_surroundings(tmp_path: Path) -> None:
    """Two holes in one picture are each filled from what is around them, not from each other's place."""
    picture = Image.new("RGB", (1600, 600), (200, 0, 0))
    picture.paste((0, 0, 200), (800, 0, 1600, 600))
    boxes = (100, 250, 160, 310), (1400, 250, 1460, 310)
    seen: list[tuple[int, int]] = []
    graph = removal_graph(tmp_path / "mean.onnx", mean_of_known)
    made = remove(
        graph, picture, masked(picture.size, *boxes), progress=lambda done, total: seen.append((done, total))
    )
    found = levels(decoded(made.data))
    assert found[280, 130].tolist() == [200, 0, 0]
    assert found[280, 1430].tolist() == [0, 0, 200]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert made.meta["holes"] == 2


def test_another_hole_in_sight_counts_as_removed(tmp_path: Path) -> None:
    """An object that is to go is never what another one's place is filled with."""
    picture = Image.new("RGB", (600, 600), (90, 90, 90))
    boxes = (100, 100, 160, 160), (300, 100, 400, 200)
    for box in boxes:
        picture.paste((255, 255, 255), box)
    found = removed(removal_graph(tmp_path / "mean.onnx", mean_of_known), picture, masked((600, 600), *boxes))
    assert abs(found - 90).max() <= 1


def test_mask_of_specks_is_taken_in_few_pieces() -> None:
    """A mask of thousands of specks does not take thousands of runs, and every speck is in one hole."""
    mask = np.zeros((4000, 6000), dtype=np.bool_)
    mask[50::100, 50::100] = True
    found = holes(mask)
    assert 1 <= len(found) <= 64
    again = np.zeros_like(mask)
    for hole in found:
        assert not (again[hole.window.part] & hole.white).any()
        again[hole.window.part] |= hole.white
    assert np.array_equal(again, mask)


def test_edge_is_feathered_outwards(tmp_path: Path) -> None:
    """Around a hole what was painted fades, a little with every pixel; within it there is nothing else."""
    picture = Image.new("RGB", (600, 600), (0, 0, 0))
    graph = removal_graph(tmp_path / "grey.onnx", constant(200 / 255))
    row = removed(graph, picture, masked((600, 600), (200, 200, 400, 400)))[300, :, 0]
    assert (row[200:400] == 200).all()
    falling = row[399:430]
    assert (np.diff(falling) <= 0).all()
    assert np.abs(np.diff(falling)).max() < 50, "a visible step"
    assert 20 < row[404] < 100, "a sigma away about a third"
    assert row[400 + FAR_PX] == 0


@pytest.mark.parametrize(("grey", "is_removed"), [(128, False), (129, True)])
def test_white_is_brighter_than_128(tmp_path: Path, grey: int, is_removed: bool) -> None:
    """A mask's grey up to 128 keeps, what is brighter goes: the upstream worker's threshold."""
    mask = masked((300, 300), (10, 10, 20, 20))
    mask.paste(grey, (150, 150, 200, 200))
    found = removed(removal_graph(tmp_path / "grey.onnx", constant(0.5)), backdrop(300, 300), mask)
    changed = np.abs(found - levels(backdrop(300, 300)))[150:200, 150:200].max() > 0
    assert changed == is_removed


@pytest.mark.parametrize("highest", [1.0, 255.0])
@pytest.mark.parametrize("shade", [0, 1, 60, 255])
def test_output_of_either_range_is_understood(tmp_path: Path, highest: float, shade: int) -> None:
    """Graphs that paint 0 to 1 and those that paint 0 to 255 give the same picture, a black one too."""
    picture = Image.new("RGB", (128, 128), (shade, shade, shade))
    picture.paste((200, 30, 30), (50, 50, 60, 60))
    graph = removal_graph(tmp_path / "range.onnx", pull_push, highest=highest)
    found = removed(graph, picture, masked((128, 128), (48, 48, 62, 62)))
    assert np.abs(found - shade).max() <= 1


def test_line_of_one_pixel_is_removed(pull: LocalFile) -> None:
    """A mask as thin as a hair removes what is under it, wholly."""
    clean, dirty = backdrop(600, 400), backdrop(600, 400)
    ImageDraw.Draw(dirty).line((50, 200, 550, 200), fill=(255, 255, 255))
    mask = Image.new("L", (600, 400))
    ImageDraw.Draw(mask).line((50, 200, 550, 200), fill=255)
    assert np.abs(removed(pull, dirty, mask) - levels(clean)).max() < 16


# --- what may come in ---


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_every_mode_are_taken(pull: LocalFile, mode: str) -> None:
    """Grey, palettes, alpha and print colours come in, and the picture is what a viewer shows on white."""
    source = Image.new("I;16", (90, 70), 30_000) if mode == "I;16" else backdrop(90, 70).convert(mode)
    if mode in {"LA", "RGBA"}:
        source.putalpha(128)
    picture = encoded(source, "TIFF" if mode == "CMYK" else "PNG")
    mask = masked((90, 70), (10, 10, 20, 20))
    found = np.asarray(decoded(remove(pull, picture, encoded(mask)).data)).astype(int)
    far = far_from((90, 70), (10, 10, 20, 20))
    if mode in {"LA", "RGBA"}:
        expected = levels(backdrop(90, 70).convert("L" if mode == "LA" else "RGB")) / 2 + 127.5
    else:
        expected = np.full((70, 90, 3), 30_000 / 257) if mode == "I;16" else levels(source)
    assert np.abs(found - expected)[far].max() <= 1.5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_masks_of_every_mode_are_taken(tmp_path: Path, mode: str) -> None:
    """A mask is what is white in it, whatever it is kept in; what is transparent keeps."""
    mask = masked((300, 300), (100, 100, 150, 150)).convert(mode)
    if mode in {"RGBA", "LA"}:
        mask.putalpha(255)
        mask.paste((255,) * len(mask.getbands()[:-1]) + (0,), (200, 200, 250, 250))
    found = removed(removal_graph(tmp_path / "grey.onnx", constant(0.5)), backdrop(300, 300), mask)
    change = np.abs(found - levels(backdrop(300, 300))).max(axis=2) > 0
    assert change[100:150, 100:150].mean() > 0.9
    assert not change[200:250, 200:250].any()


def test_mask_of_another_size_lies_over_the_whole_picture(tmp_path: Path) -> None:
    """A mask in other proportions is made to fit, and its thin lines still remove."""
    mask = Image.new("L", (2000, 500))
    ImageDraw.Draw(mask).line((1000, 0, 1000, 500), fill=255)
    found = removed(removal_graph(tmp_path / "grey.onnx", constant(1.0)), Image.new("RGB", (500, 500)), mask)
    assert (found[:, 250] == 255).all()
    assert (found[:, [250 - FAR_PX - 2, 250 + FAR_PX + 2]] == 0).all()


def test_picture_keeps_its_size_unless_the_task_names_one(pull: LocalFile) -> None:
    """The graph's 512 px are no picture's size: what came in at 640x360 leaves so; a task may say another."""
    picture, mask = backdrop(640, 360), masked((640, 360), (100, 100, 200, 200))
    assert removed(pull, picture, mask).shape == (360, 640, 3)
    assert removed(pull, picture, mask, width=320, height=180).shape == (180, 320, 3)


def test_photo_taken_sideways_is_turned_first(pull: LocalFile) -> None:
    """A photo whose Exif says how to hold it is upright in the result."""
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    picture = encoded(backdrop(120, 80), "JPEG", exif=exif)
    made = remove(pull, picture, masked((80, 120), (10, 10, 20, 20)))
    assert decoded(made.data).size == (80, 120)


def test_picture_says_what_made_it(pull: LocalFile) -> None:
    """generationMeta names engine, provider, size and number of holes."""
    made = remove(pull, backdrop(100, 80), masked((100, 80), (10, 10, 20, 20)), ext="webp")
    told = {name: made.meta[name] for name in ("engine", "family", "width", "height", "holes", "provider")}
    assert told == {
        "engine": "onnx",
        "family": "object-removal",
        "width": 100,
        "height": 80,
        "holes": 1,
        "provider": "CPUExecutionProvider",
    }
    assert set(made.timings_s) == {"load", "generate", "encode"}


# --- what is refused, by name ---


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (Inputs(), "initImageUrl"),
        (Inputs(init_image=encoded(backdrop(64, 64))), "maskUrl"),
        (Inputs(mask=encoded(masked((64, 64), (1, 1, 9, 9)))), "initImageUrl"),
        (Inputs(encoded(backdrop(64, 64)), encoded(masked((64, 64)))), "black everywhere"),
        (Inputs(b"no picture", encoded(masked((64, 64), (1, 1, 9, 9)))), "initial picture"),
        (Inputs(encoded(backdrop(64, 64)), b"no picture"), "the mask"),
    ],
    ids=["neither", "no mask", "no picture", "black mask", "odd picture", "odd mask"],
)
def test_job_without_what_it_needs_fails_for_good(pull: LocalFile, inputs: Inputs, words: str) -> None:
    """A picture and a mask with something white in it are needed; what is missing is said."""
    asked = request(files=(pull,), inputs=inputs)
    with pytest.raises(JobImpossible, match=words):
        RemovalEngine("cpu").generate(asked, lambda done, total: None, Cancel())


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"inputs": (("img", IMAGE), ("mask", MASK))}, "inputs are img, mask; they must be image, mask"),
        ({"inputs": (("image", IMAGE), ("mask", MASK), ("more", MASK))}, "image, mask, more"),
        ({"inputs": (("image", (1, 3, 256, 256)), ("mask", MASK))}, r"image is .*\[1,3,256,256\]"),
        ({"inputs": (("image", IMAGE), ("mask", (1, 512, 512)))}, r"mask is .*\[1,512,512\]"),
        ({"inputs": (("image", IMAGE), ("mask", (1, 3, 512, 512)))}, r"mask is .*\[1,3,512,512\]"),
        ({"outputs": (("output", MASK),), "body": mask_alone}, r"output is .*\[1,1,512,512\]"),
        ({"outputs": (("first", IMAGE), ("second", IMAGE))}, "first, second"),
        ({"type_": TensorProto.FLOAT16}, "float16"),
    ],
    ids=["names", "more inputs", "size", "rank", "channels", "output", "outputs", "type"],
)
def test_graph_with_another_contract_fails_for_good(
    tmp_path: Path, graph: dict[str, Any], words: str
) -> None:
    """A graph that is none for removing objects is refused by what is wrong with it."""
    file = removal_graph(tmp_path / "other.onnx", **{"body": same, "checks": False} | graph)
    with pytest.raises(JobImpossible, match=words):
        remove(file, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))


@pytest.mark.parametrize(
    "graph",
    [
        {"outputs": (("painted", IMAGE),)},
        {"outputs": (("extra", IMAGE), ("output", IMAGE))},
        {"inputs": (("mask", MASK), ("image", IMAGE))},
        {"inputs": (("image", ("n", 3, "h", "w")), ("mask", ("n", 1, "h", "w")))},
    ],
    ids=["output's name", "two outputs", "order", "open sides"],
)
def test_graph_may_word_the_contract_in_its_own_way(tmp_path: Path, graph: dict[str, Any]) -> None:
    """One output of any name, inputs in any order, sides that are left open: all are served."""
    file = removal_graph(tmp_path / "own.onnx", **{"body": same} | graph)
    assert remove(file, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20))).meta["holes"] == 1


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"GGUF" + bytes(2000)],
    ids=["cut", "empty", "other"],
)
def test_damaged_graph_is_named(pull: LocalFile, spoil: Callable[[bytes], bytes]) -> None:
    """A file that is no graph is told as damaged, so that its hash decides whose fault it is."""
    pull.path.write_bytes(spoil(pull.path.read_bytes()))
    with pytest.raises(FileDamaged, match=r"pull\.onnx") as caught:
        remove(pull, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))
    assert caught.value.path == pull.path


@pytest.mark.parametrize("graph", [{"opset": 99}, {"domain": "org.example"}], ids=["opset", "operation"])
def test_graph_for_a_newer_runtime_is_left_to_another_worker(tmp_path: Path, graph: dict[str, Any]) -> None:
    """What this onnxruntime does not know, another worker's may."""
    file = removal_graph(tmp_path / "newer.onnx", same, checks=False, **graph)
    with pytest.raises(NotServed, match="onnxruntime"):
        remove(file, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))


def test_graph_with_weights_in_another_file_is_refused(tmp_path: Path) -> None:
    """A graph is one file: nothing else on the box is read, whatever it names."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "weights.bin").write_bytes(np.float32(255).tobytes())
    for place in ("weights.bin", "../weights.bin", "/etc/hostname"):
        file = removal_graph(tmp_path / "folder" / "beside.onnx", same, checks=False, white_in=place)
        with pytest.raises(JobImpossible, match="one file"):
            remove(file, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))


def test_graph_that_computes_no_numbers_is_told(tmp_path: Path) -> None:
    """NaN never becomes a picture."""
    file = removal_graph(tmp_path / "nan.onnx", constant(float("nan")))
    with pytest.raises(JobError, match="not finite"):
        remove(file, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))


def test_graph_that_memory_does_not_suffice_for_is_left_to_another_worker(tmp_path: Path) -> None:
    """Out of memory is told as that, with figures, and is nobody's fault for good."""
    file = removal_graph(tmp_path / "greedy.onnx", greedy)
    with pytest.raises(OutOfMemory, match="out of memory on cpu") as caught:
        remove(file, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))
    assert caught.value.retryable


def test_source_without_a_graph_is_refused(pull: LocalFile) -> None:
    """A source must say which file is the graph: the role is model."""
    with pytest.raises(JobImpossible, match="role model"):
        remove(pull._replace(role="vae"), backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))


# --- how the engine behaves ---


def test_nobody_is_told_that_a_graph_runs(pull: LocalFile, tmp_path: Path) -> None:
    """onnxruntime's own builds report their use to their maker, and keep an identity for it: not from here,
    whoever has started the process.
    """
    home = tmp_path / "home"
    home.mkdir()
    script = """
import sys
from pathlib import Path
from studio_worker.engine.removal.graph import RemovalGraph
RemovalGraph(Path(sys.argv[1]), "cpu")
"""
    own = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    own = {name: value for name, value in own.items() if not name.startswith(("ORT_", "XDG_"))}
    subprocess.run([sys.executable, "-c", script, str(pull.path)], env=own, check=True, timeout=120)
    assert list(home.rglob("*")) == []


def test_job_stops_between_holes(tmp_path: Path) -> None:
    """A job that is called back is not finished first: it ends with the hole in hand."""
    cancel, seen = Cancel(), []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == 1:
            cancel.set("the worker is stopping")

    mask = masked((900, 300), (20, 20, 60, 60), (800, 20, 840, 60))
    with pytest.raises(JobCancelled):
        remove(removal_graph(tmp_path / "same.onnx", same), backdrop(900, 300), mask, progress, cancel)
    assert seen == [0, 1]


def test_graph_stays_loaded_until_it_is_released(pull: LocalFile, tmp_path: Path) -> None:
    """The next job finds the graph loaded, a pause gives its memory back, another graph takes its place."""
    engine = RemovalEngine("cpu")
    inputs = Inputs(encoded(backdrop(64, 64)), encoded(masked((64, 64), (10, 10, 20, 20))))
    asked = request(files=(pull,), inputs=inputs)
    assert engine.preload("lama", (pull,), CliDefaults(), lambda: True)
    assert list(engine.resident()) == ["lama"]
    pull.path.unlink()  # would be missed if it were read again
    engine.generate(asked, lambda done, total: None, Cancel())
    other = removal_graph(tmp_path / "other.onnx", same)
    assert not engine.preload("other", (other,), CliDefaults(), lambda: True), "the first would have to leave"
    engine.generate(request(files=(other,), inputs=inputs), lambda done, total: None, Cancel())
    engine.release()
    assert engine.resident() == {}


def test_memory_is_asked_for_before_a_graph_is_loaded(
    pull: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a removal needs is known from its file, before an offer is taken: of RAM, so that a GPU need have
    no room. A box that is short of it says so with figures, and another worker may try.
    """
    task, size_bytes = request().task, pull.path.stat().st_size
    needed = Estimates(Device("cpu", "", 8.0)).needed_bytes([pull], task, CliDefaults(), "onnx")
    assert needed is not None
    assert needed > 2 * size_bytes
    assert Estimates(Device("cuda:0", "", 8.0)).needed_bytes([pull], task, CliDefaults(), "onnx") is None
    monkeypatch.setattr(removal, "available_ram_bytes", lambda: needed - 1)
    with pytest.raises(JobError, match=r"needs 1\.0 GiB of RAM, 1\.0 GiB are free") as caught:
        remove(pull, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))
    assert caught.value.retryable


def test_engine_is_there_only_with_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker tells the studio of onnx models where onnxruntime is installed, and nowhere else."""
    assert "onnx" in default_router("cpu").names()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    without = default_router("cpu")
    assert "onnx" not in without.names()
    with pytest.raises(NotServed, match="onnx"):
        without.for_source(ModelSource(engine="onnx"))


def test_onnxruntime_that_cannot_be_loaded_leaves_jobs_to_others(
    pull: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed and broken, a job says so, and its source goes to other workers from then on."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotServed, match="onnxruntime cannot be loaded"):
        remove(pull, backdrop(64, 64), masked((64, 64), (10, 10, 20, 20)))
