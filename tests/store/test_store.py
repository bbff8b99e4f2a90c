"""What the models folder promises: verified once and trusted after, stored once, never too full."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from studio_worker.errors import DownloadError, StoreError
from studio_worker.models import ModelFile
from studio_worker.store import Store
from studio_worker.store.terms import fixed
from studio_worker.transfer.policy import Policy
from tests.bench.store import large_models
from tests.fakes.servers import FileServer, ServedFile, refused_url

BODY = b"a tiny pretend model"
WRONG = b"a tiny pretend modem"
QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0,))

KILLED_BEFORE_LEDGER = """
import os, signal, sys
from pathlib import Path
from studio_worker.models import ModelFile
from studio_worker.store import Store
url, root, sha256 = sys.argv[1:]
store = Store(Path(root))

def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("ledger.json"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
store.ensure([ModelFile(role="model", url=url, filename="model.gguf", sha256=sha256 or None)])
"""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def served(server: FileServer) -> ServedFile:
    return server.serve("/model.gguf", BODY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models", fixed(QUICK))


def model_file(served: ServedFile, **changes: Any) -> ModelFile:
    facts: dict[str, Any] = {
        "role": "model",
        "url": served.url,
        "filename": "model.gguf",
        "sha256": served.sha256,
    }
    return ModelFile(**(facts | changes))


def reopened(store: Store, file: ModelFile) -> Store:
    """The store as the next process sees it."""
    return Store(root_of(store, file), fixed(QUICK))


def root_of(store: Store, file: ModelFile) -> Path:
    return store.path(file).parent.parent


def change_unseen(path: Path, content: bytes) -> None:
    """Change the content of a file, but nothing that ``stat`` shows."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_seen(path: Path, content: bytes) -> None:
    """Change the content of a file as any program would."""
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def as_nobody(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or raises, where it is done by a user without rights."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as somebody else")
    ended: list[Any] = []

    def run() -> None:
        # setfsuid(2) changes one thread only, and takes root's right to pass over permissions from it.
        ctypes.CDLL(None).setfsuid(65534)
        try:
            ended.append(work())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return ended[0]


@pytest.fixture
def closed(served: ServedFile) -> Iterator[tuple[Store, ModelFile]]:
    """A store of that user's, and a verified file in it that it may not read any more."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        store, file = Store(Path(name) / "models", fixed(QUICK)), model_file(served)
        store.ensure([file])
        for path in (store.root, *store.root.rglob("*")):
            os.chown(path, 65534, 65534)
        os.chown(store.path(file), 0, 0)
        store.path(file).chmod(0o600)
        yield store, file


# --- what cannot be read ---


def test_file_that_cannot_be_read_is_not_verified(
    closed: tuple[Store, ModelFile], served: ServedFile
) -> None:
    """A verified file that the service may not read any more is no reason to be ready. It is named, stays
    where it is, and is good again as soon as it can be read.
    """
    store, file = closed
    assert as_nobody(lambda: store.is_verified(file)) is False
    error = as_nobody(lambda: store.ensure([file]))
    assert isinstance(error, StoreError)
    assert f"{store.path(file)}: cannot be read by this user" in str(error)
    assert not error.is_final_here
    assert store.path(file).read_bytes() == BODY
    os.chown(store.path(file), 65534, 65534)
    assert as_nobody(lambda: store.is_verified(file)) is True
    assert len(served.requests) == 1


@pytest.mark.parametrize("on_damage", ["remove", "repair"])
def test_file_that_cannot_be_read_is_no_damage(closed: tuple[Store, ModelFile], on_damage: Any) -> None:
    """Nobody knows what is in a file that may not be read: it is told so, and neither removed nor fetched."""
    store, file = closed
    (checked,) = as_nobody(lambda: list(store.verify(on_damage=on_damage)))
    assert (checked.state, checked.is_right) == ("unreadable", False)
    assert checked.error == "Permission denied; nothing was changed"
    assert isinstance(as_nobody(lambda: store.is_as_registered(store.path(file))), StoreError)
    assert store.path(file).read_bytes() == BODY
    assert store.is_verified(file)


# --- fetching ---


def test_store_fetches_what_is_missing(store: Store, served: ServedFile) -> None:
    """A missing file is downloaded and verified, and nothing of the way it took is left."""
    file = model_file(served, role="vae")

    (local,) = store.ensure([file])

    assert local == ("vae", store.path(file), served.sha256)
    assert local.path.read_bytes() == BODY
    assert store.is_verified(file)
    assert list((root_of(store, file) / ".staging").iterdir()) == []


def test_store_reports_a_file_that_cannot_be_fetched(store: Store, served: ServedFile) -> None:
    """A failed download is an error, and the file is not taken for verified."""
    served.answers = [(404, {})]
    file = model_file(served)

    with pytest.raises(DownloadError, match="404"):
        store.ensure([file])

    assert not store.is_verified(file)


def test_store_holds_equal_content_once(store: Store, server: FileServer, served: ServedFile) -> None:
    """Two models that share a file share its download, and under two names its bytes on disk."""
    other = server.serve("/other.safetensors", BODY)
    same = model_file(other)
    renamed = model_file(other, filename="other.safetensors")

    first, second, third = store.ensure([model_file(served), same, renamed])

    assert first.path == second.path
    assert first.path.samefile(third.path)
    assert third.path.name == "other.safetensors"
    assert (len(served.requests), len(other.requests)) == (1, 0)
    assert store.is_verified(renamed)


def test_store_holds_files_without_a_hash_by_their_address(
    store: Store, server: FileServer, served: ServedFile
) -> None:
    """Without a hash two addresses are two contents, though their names are equal."""
    other = server.serve("/other/model.gguf", WRONG)

    first, second = store.ensure([model_file(served, sha256=None), model_file(other, sha256=None)])

    assert (first.path.read_bytes(), second.path.read_bytes()) == (BODY, WRONG)


# --- trust ---


def test_store_trusts_a_verified_file_without_reading_it(store: Store, served: ServedFile) -> None:
    """A file whose size, mtime and inode are unchanged is not read again, by the next process either."""
    file = model_file(served)
    store.ensure([file])
    change_unseen(store.path(file), WRONG)  # reading it would show

    again = reopened(store, file)
    (local,) = again.ensure([file])

    assert local.path.read_bytes() == WRONG
    assert len(served.requests) == 1


def test_store_checks_twenty_gigabytes_without_opening_a_file(tmp_path: Path) -> None:
    """The start of a box with five models of 4 GB opens no model file, so it takes no time that grows."""
    files = large_models(tmp_path, count=5, size_bytes=4_000_000_000)
    script = """
import json, sys
from pathlib import Path
from studio_worker.models import ModelFile
from studio_worker.store import Store
from studio_worker.store.terms import fixed
files = [ModelFile(**facts) for facts in json.loads(sys.argv[2])]
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
store = Store(Path(sys.argv[1]), fixed(required=files))
store.clean_staging()
store.ensure(files, model="large")
print(json.dumps([path for path in opened if path.endswith(".gguf")]), all(map(store.is_verified, files)))
"""
    facts = json.dumps([asdict(file) for file in files])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), facts], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] True\n"


@pytest.mark.parametrize("has_hash", [True, False])
def test_store_repairs_a_file_that_was_changed(store: Store, served: ServedFile, has_hash: bool) -> None:
    """A file that looks changed is hashed again, and fetched anew where it is."""
    file = model_file(served) if has_hash else model_file(served, sha256=None)
    store.ensure([file])
    change_seen(store.path(file), WRONG)
    assert not store.is_verified(file)

    store.ensure([file])

    assert store.path(file).read_bytes() == BODY
    assert len(served.requests) == 2


@pytest.mark.parametrize("has_hash", [True, False])
def test_store_keeps_a_file_that_only_looks_changed(store: Store, served: ServedFile, has_hash: bool) -> None:
    """A touched or copied file with the right bytes costs a hash, not a download."""
    file = model_file(served) if has_hash else model_file(served, sha256=None)
    store.ensure([file])
    change_seen(store.path(file), BODY)

    store.ensure([file])

    assert store.is_verified(file)
    assert len(served.requests) == 1


def test_store_hashes_a_file_it_does_not_know(store: Store, served: ServedFile) -> None:
    """A file that somebody put there is taken if its hash is right, and replaced if not."""
    right = model_file(served)
    store.path(right).parent.mkdir()
    store.path(right).write_bytes(BODY)
    store.ensure([right])
    assert served.requests == []

    wrong = model_file(served, filename="wrong.gguf")
    other = Store(root_of(store, right).with_name("other"), fixed(QUICK))
    other.path(wrong).parent.mkdir()
    other.path(wrong).write_bytes(WRONG)
    other.ensure([wrong])
    assert other.path(wrong).read_bytes() == BODY


@pytest.mark.parametrize(
    "ledger", ["", "[]", "{", '{"x": 1}', '{"x": {"size": 1}}', "\0\0\0\0", '{"x": {"colour": "blue"}}']
)
def test_store_rebuilds_a_corrupt_ledger(
    store: Store, served: ServedFile, caplog: pytest.LogCaptureFixture, ledger: str
) -> None:
    """A ledger that cannot be read costs one reading of the files and a warning, no download."""
    caplog.set_level(logging.INFO, logger="studio_worker")
    file = model_file(served)
    store.ensure([file])
    (root_of(store, file) / "ledger.json").write_text(ledger)

    rebuilt = reopened(store, file)
    assert not rebuilt.is_verified(file)
    rebuilt.ensure([file])

    assert rebuilt.is_verified(file)
    assert reopened(store, file).is_verified(file)
    assert len(served.requests) == 1
    assert "ledger is unreadable" in caplog.messages


@pytest.mark.parametrize("has_hash", [True, False])
def test_store_survives_a_kill_between_rename_and_ledger(
    store: Store, served: ServedFile, has_hash: bool
) -> None:
    """A process that dies with the file in place and the ledger not yet written costs no second download."""
    file = model_file(served) if has_hash else model_file(served, sha256=None)
    arguments = [served.url, str(root_of(store, file)), file.sha256 or ""]
    child = subprocess.run([sys.executable, "-c", KILLED_BEFORE_LEDGER, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL
    assert store.path(file).read_bytes() == BODY

    again = reopened(store, file)
    assert not again.is_verified(file)
    again.ensure([file])

    assert again.is_verified(file)
    assert len(served.requests) == 1
    assert sorted(path.name for path in root_of(store, file).iterdir()) == sorted(
        [".ledger.lock", ".staging", "ledger.json", store.path(file).parent.name]
    )


def test_stores_of_two_processes_keep_each_others_entries(
    store: Store, server: FileServer, served: ServedFile
) -> None:
    """What one process verifies is not forgotten when another writes the ledger."""
    first = model_file(served)
    second = model_file(server.serve("/second.gguf", WRONG), filename="second.gguf")
    other = reopened(store, first)

    store.ensure([first])
    other.ensure([second])

    after = reopened(store, first)
    assert after.is_verified(first)
    assert after.is_verified(second)


# --- verify ---


def test_verify_finds_a_flipped_byte_and_the_next_ensure_repairs_it(
    store: Store, server: FileServer, served: ServedFile
) -> None:
    """Damage that the ledger cannot see is found by reading everything, and mended by the next start."""
    damaged = model_file(served)
    sound = model_file(server.serve("/sound.gguf", WRONG), filename="sound.gguf")
    gone = model_file(server.serve("/gone.gguf", b"gone"), filename="gone.gguf")
    store.ensure([damaged, sound, gone])
    change_unseen(store.path(damaged), WRONG)
    store.path(gone).unlink()

    states = {checked.path.name: checked.state for checked in store.verify()}

    assert states == {"model.gguf": "damaged", "sound.gguf": "verified", "gone.gguf": "missing"}
    assert not store.is_verified(damaged)
    assert not store.path(damaged).exists()
    assert reopened(store, damaged).is_verified(sound)

    store.ensure([damaged, gone])
    assert store.path(damaged).read_bytes() == BODY
    assert {checked.state for checked in store.verify()} == {"verified"}


def test_verify_renews_the_trust_in_a_touched_file(store: Store, served: ServedFile) -> None:
    """A file that only looks changed is trusted again after it was read."""
    file = model_file(served)
    store.ensure([file])
    change_seen(store.path(file), BODY)

    assert [checked.state for checked in store.verify()] == ["verified"]
    assert store.is_verified(file)


# --- space ---


def test_store_refuses_what_the_disk_cannot_hold_before_any_request(store: Store, served: ServedFile) -> None:
    """A model larger than the disk is refused at once, with the room that is missing."""
    file = model_file(served, approx_bytes=10**15)

    assert store.shortfall_bytes([file]) > 9 * 10**14
    with pytest.raises(StoreError, match=r"1000000\.0 GB more and \d+\.\d GB of it are missing") as failure:
        store.ensure([file])

    assert str(root_of(store, file)) in str(failure.value)
    assert served.requests == []


def test_shortfall_counts_only_what_has_yet_to_come(store: Store, served: ServedFile) -> None:
    """Room is asked neither for files that are here, nor twice for one content, nor for kept bytes."""
    free = shutil.disk_usage(root_of(store, model_file(served))).free
    large = free - 300 * 1024 * 1024
    file = model_file(served, approx_bytes=large)
    twin = model_file(served, approx_bytes=large, filename="twin.gguf")
    assert store.shortfall_bytes([file]) == 0
    assert store.shortfall_bytes([file, twin]) == 0

    too_large = model_file(served, approx_bytes=free * 2)
    assert store.shortfall_bytes([too_large]) > 0
    staging = root_of(store, file) / ".staging"
    staging.mkdir()
    with (staging / f"{served.sha256}.part").open("wb") as part:
        part.truncate(free * 2)  # sparse: it takes no room
    assert store.shortfall_bytes([too_large]) == 0
    (staging / f"{served.sha256}.part").unlink()

    store.ensure([model_file(served)])
    assert store.shortfall_bytes([too_large, model_file(served, approx_bytes=free * 2, filename="b")]) == 0


def test_shortfall_is_none_where_no_size_is_declared(store: Store, served: ServedFile) -> None:
    """A source that declares no size is tried."""
    assert store.shortfall_bytes([model_file(served)]) == 0


# --- the folder ---


@pytest.mark.parametrize(
    "name", ["../evil", "..", ".", "", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 300]
)
def test_file_names_cannot_leave_the_folder(served: ServedFile, name: str) -> None:
    """A source whose file name is a path is refused before anything is done with it."""
    with pytest.raises(ValidationError):
        model_file(served, filename=name)


@pytest.mark.parametrize("name", ["ledger.json", ".staging", ".ledger.lock", "…", "a b", "-rf"])
def test_odd_file_names_stay_in_their_own_folder(store: Store, served: ServedFile, name: str) -> None:
    """A name that means something elsewhere, or looks odd, is just a name."""
    file = model_file(served, filename=name)

    (local,) = store.ensure([file])

    assert local.path == root_of(store, file) / served.sha256 / name
    assert reopened(store, file).is_verified(file)


def test_store_tells_when_its_folder_cannot_be_used(tmp_path: Path) -> None:
    """A models folder that cannot be made is an error of the store that names it."""
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        Store(tmp_path / "file" / "models")


def test_store_tells_when_a_file_is_in_its_way(store: Store, served: ServedFile) -> None:
    """What the file system refuses during a download is an error, not a crash."""
    file = model_file(served)
    store.path(file).mkdir(parents=True)

    with pytest.raises(DownloadError, match="directory"):
        store.ensure([file])


def test_ledger_names_no_secret_of_an_address(store: Store, served: ServedFile) -> None:
    """The ledger tells where a file came from without the query string of its address."""
    file = model_file(served, url=f"{served.url}?token=hunter2hunter2")
    store.ensure([file])

    ledger = (root_of(store, file) / "ledger.json").read_text()

    assert json.loads(ledger)[f"{served.sha256}/model.gguf"]["url"] == served.url
    assert "hunter2" not in ledger


def test_store_fetches_nothing_for_a_verified_file_when_the_server_is_gone(
    store: Store, served: ServedFile
) -> None:
    """A box starts without the network when its models are here."""
    store.ensure([model_file(served)])

    (local,) = store.ensure([model_file(served, url=refused_url())])

    assert local.path.read_bytes() == BODY
