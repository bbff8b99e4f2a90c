"""A look at the headers of files that are not here yet: what it shows, and what it may cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker.errors import DownloadError
from studio_worker.models import ModelFile
from studio_worker.network.uplink import Uplink
from studio_worker.store import Store
from studio_worker.store.previews import MOST_OF_MODEL_BYTES, Previews
from studio_worker.store.terms import Terms, fixed
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, ServedFile
from tests.lab.headers import hollow_gguf, hollow_safetensors

SHAPES = {f"layers.{number}.weight": (4096, 4096) for number in range(300)}
LARGE = hollow_safetensors(SHAPES)
SMALL = b"a tiny pretend model"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models", fixed(Policy(delays_s=())))


def model_file(served: ServedFile, sha256: str | None = None) -> ModelFile:
    name = served.url.rpartition("/")[2]
    return ModelFile(role="model", url=served.url, filename=name, sha256=sha256)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_preview_shows_files_of_full_length_and_leaves_nothing(server: FileServer, store: Store) -> None:
    """What is shown has the file's name, length and header and takes next to no room; nothing of it stays,
    and nothing of it is in the models folder, where a download would go on from it.
    """
    before = entries(store.root)
    files = [model_file(server.serve(f"/{n}/m.safetensors", LARGE)) for n in range(2)]
    with store.previews.shown(files) as preview:
        for local in preview.files:
            stat = local.path.stat()
            assert (local.path.name, stat.st_size) == ("m.safetensors", len(LARGE))
            assert stat.st_blocks * 512 < 2**20
            assert local.path.open("rb").read(len(LARGE.header)) == LARGE.header
        assert not any(local.path.is_relative_to(store.root) for local in preview.files)
        assert entries(store.root) == before
    assert not any(local.path.exists() for local in preview.files)
    assert not any(store.is_verified(file) for file in files)


def test_file_that_is_here_is_not_asked_for(server: FileServer, store: Store) -> None:
    """Of a model only what is missing is asked for: what is here is shown as it lies there."""
    here = server.serve("/vae.safetensors", SMALL)
    file = model_file(here, hashlib.sha256(SMALL).hexdigest())
    store.ensure([file])
    assert not store.previews.are_of_use([file])
    missing = model_file(server.serve("/m.safetensors", LARGE))
    assert store.previews.are_of_use([file, missing])
    with store.previews.shown([file, missing]) as preview:
        assert preview.files[0].path == store.path(file)
    assert len(here.requests) == 1


def test_required_file_is_not_asked_for(server: FileServer, tmp_path: Path) -> None:
    """A required model comes anyway; its headers are read when it is here."""
    file = model_file(server.serve("/m.safetensors", LARGE))
    store = Store(tmp_path / "models", fixed(Policy(), required=[file]))
    assert not store.previews.are_of_use([file])


def test_headers_are_remembered_for_the_next_offer(server: FileServer, store: Store) -> None:
    """A studio offers again what was rejected: the same headers are asked for once."""
    served = server.serve("/m.safetensors", LARGE)
    with (
        store.previews.shown([model_file(served)]) as first,
        store.previews.shown([model_file(served)]) as again,
    ):
        assert again.files[0].path.stat().st_size == first.files[0].path.stat().st_size
        assert (first.received_bytes, again.received_bytes) == (served.bytes_sent, 0)
    assert len(served.requests) == 1


def test_one_server_that_hangs_ends_the_look_at_all_files(server: FileServer) -> None:
    """However many files a model has, and whatever their servers do, the look has one limit."""
    terms = Terms(Policy())
    previews = Previews(lambda: terms, lambda file: None, within_s=0.3)
    files = [model_file(server.serve(f"/{n}.safetensors", LARGE, hold_head=n > 1)) for n in range(20)]
    with pytest.raises(DownloadError), previews.shown(files):
        pytest.fail("it was shown")


def test_headers_come_while_pictures_are_uploaded(server: FileServer, tmp_path: Path) -> None:
    """What is small and waited for does not give way to uploads, as models do: over a thin link one upload
    follows the other, and every offer would be answered late and without a look.
    """
    uplink = Uplink(clock=lambda: 0.0)  # time stands still, in a rest of downloads
    store = Store(tmp_path / "models", fixed(Policy(uplink=uplink)))
    file = model_file(server.serve("/m.safetensors", LARGE))
    with uplink.turn(), store.previews.shown([file]) as preview:
        assert preview.received_bytes > 0


def test_model_of_many_files_costs_no_more_than_one(server: FileServer, store: Store) -> None:
    """All headers of a model together have a limit, whichever their number is."""
    wordy = hollow_gguf(SHAPES, 12, words=500_000)
    served = [server.serve(f"/{n}.gguf", wordy) for n in range(40)]
    with pytest.raises(DownloadError), store.previews.shown([model_file(each) for each in served]):
        pytest.fail("it was shown")
    assert sum(each.bytes_sent for each in served) <= MOST_OF_MODEL_BYTES
