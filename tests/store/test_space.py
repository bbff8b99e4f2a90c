"""What a full box promises: old on-demand models make room for new ones, required and used ones never do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.errors import DownloadError, StoreError
from studio_worker.models import ModelFile
from studio_worker.store import Store
from studio_worker.store.terms import fixed
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, ServedFile

QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0,))
SIZE = 1000

HOLDER = """
import sys
from pathlib import Path
from studio_worker.models import ModelFile
from studio_worker.store import Store
from studio_worker.store.terms import fixed
url, root, sha256 = sys.argv[1:]
file = ModelFile(role="model", url=url, filename="model.gguf", sha256=sha256)
with Store(Path(root)).taken("other", [file]):
    print("held", flush=True)
    sys.stdin.read()
"""


class Clock:
    """The time of day, as the test has it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Box:
    """A models folder with a server of 1000-byte files, each of them a model of its own."""

    def __init__(self, root: Path, server: FileServer) -> None:
        self.root = root
        self.server = server
        self.clock = Clock()
        self.served: dict[str, ServedFile] = {}

    def file(self, name: str, size: int = SIZE, **changes: Any) -> ModelFile:
        if name not in self.served:
            content = (name.encode() * size)[:size]
            self.served[name] = self.server.serve(f"/{name}", content)
        served = self.served[name]
        facts: dict[str, Any] = {"filename": "model.gguf", "sha256": served.sha256, "approx_bytes": size}
        return ModelFile(role="model", url=served.url, **(facts | changes))

    def store(self, budget: int | None = None, required: tuple[ModelFile, ...] = (), **options: Any) -> Store:
        terms = fixed(QUICK, budget_bytes=budget, required=required)
        return Store(self.root, terms, clock=self.clock, **options)

    def use(self, store: Store, *files: ModelFile, model: str | None = None) -> None:
        """One job with ``files``, an hour after the last."""
        self.clock.now += 3600
        with store.taken(model or files[0].url.rpartition("/")[2], files):
            pass

    def held(self, store: Store) -> set[str]:
        """The models that are on disk, by the names they are served under."""
        return {name for name in self.served if store.path(self.file(name)).exists()}


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with FileServer() as server:
        yield Box(tmp_path / "models", server)


def test_budget_removes_the_model_used_longest_ago(box: Box) -> None:
    """A new on-demand model takes the place of the one whose last job is longest ago."""
    store = box.store(budget=2 * SIZE)
    a, b, c = map(box.file, "abc")
    box.use(store, a)
    box.use(store, b)
    box.use(store, a)

    box.use(store, c)

    assert box.held(store) == {"a", "c"}
    assert not store.is_verified(b)
    assert not store.path(b).parent.exists()
    assert set(store.entries()) == {f"{a.sha256}/model.gguf", f"{c.sha256}/model.gguf"}


def test_budget_holds_for_the_next_process(box: Box) -> None:
    """Who used what when is known after a restart."""
    first = box.store(budget=2 * SIZE)
    for name in "ab":
        box.use(first, box.file(name))
    box.use(first, box.file("a"))

    again = box.store(budget=2 * SIZE)
    box.use(again, box.file("c"))

    assert box.held(again) == {"a", "c"}


def test_budget_never_removes_required_models(box: Box) -> None:
    """Required models stay, however long ago they were used, and are fetched even beyond the budget."""
    a, b = box.file("a"), box.file("b")
    store = box.store(budget=2 * SIZE, required=(a,))
    store.ensure([a], model="a")
    box.use(store, b)
    box.use(store, box.file("c"))
    assert box.held(store) == {"a", "c"}

    larger = box.store(budget=SIZE, required=(a, box.file("d", 2 * SIZE)))
    larger.ensure([box.file("d", 2 * SIZE)])
    assert box.held(larger) == {"a", "d"}


def test_budget_refuses_a_model_larger_than_it_before_any_request(box: Box) -> None:
    """A model that could never fit is refused with both sizes, costs no request and removes nothing."""
    store = box.store(budget=2 * SIZE)
    box.use(store, box.file("a"))
    huge = box.file("huge", approx_bytes=7 * 10**9)

    with pytest.raises(StoreError, match=r"needs 7\.0 GB and \[models\] budget_gb allows 0\.0 GB"):
        store.ensure([huge])

    assert box.served["huge"].requests == []
    assert box.held(store) == {"a"}
    assert store.shortfall_bytes([huge]) == 7 * 10**9 - 2 * SIZE


def test_budget_says_when_required_models_leave_too_little(box: Box) -> None:
    """A model that would fit alone but not beside the required ones is refused for that reason."""
    a = box.file("a")
    store = box.store(budget=SIZE + 10, required=(a,))
    store.ensure([a])

    with pytest.raises(StoreError, match="required models and those in use leave too little"):
        store.ensure([box.file("b")])

    assert box.served["b"].requests == []


def test_budget_spares_the_job_in_hand(box: Box) -> None:
    """While a job has its files, nothing removes them, and the next model is refused instead."""
    store = box.store(budget=SIZE)
    a, b = box.file("a"), box.file("b")

    with store.taken("a", [a]):
        assert store.shortfall_bytes([b]) == SIZE
        with pytest.raises(StoreError, match="in use"):
            box.store(budget=SIZE).ensure([b])
        assert store.path(a).exists()

    assert store.shortfall_bytes([b]) == 0
    box.use(store, b)
    assert box.held(store) == {"b"}


def test_budget_spares_what_another_process_holds_until_it_dies(box: Box) -> None:
    """A model that another process works with stays; a process that was killed holds nothing."""
    a, b = box.file("a"), box.file("b")
    store = box.store(budget=SIZE)
    box.use(store, a)
    arguments = [a.url, str(box.root), str(a.sha256)]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="in use"):
            store.ensure([b])
        assert store.prune().models == ()
        holder.kill()

    store.ensure([b])
    assert box.held(store) == {"b"}


def test_budget_counts_hard_links_once(box: Box) -> None:
    """One content under two names is counted, and freed, once."""
    store = box.store(budget=2 * SIZE)
    box.use(store, box.file("a"), model="one")
    box.use(store, box.file("a", filename="twin.gguf"), model="two")

    box.use(store, box.file("b"))
    assert box.held(store) == {"a", "b"}

    with store.taken("b", [box.file("b")]):
        assert store.shortfall_bytes([box.file("c")]) == 0
        store.ensure([box.file("c")])
    assert box.held(store) == {"b", "c"}


def test_removal_keeps_a_file_that_another_model_shares(box: Box) -> None:
    """A text encoder that two models share stays until the last of them goes."""
    shared, a, b = map(box.file, ["shared", "a", "b"])
    store = box.store(budget=3 * SIZE)
    box.use(store, shared, a, model="one")
    box.use(store, shared, b, model="two")

    box.use(store, box.file("c"))
    assert box.held(store) == {"shared", "b", "c"}

    store.prune()
    assert box.held(store) == set()


def test_removal_keeps_what_a_required_model_shares(box: Box) -> None:
    """Content of a required model stays, whichever on-demand models use it too."""
    shared, a = box.file("shared"), box.file("a")
    store = box.store(required=(shared,))
    box.use(store, shared, a, model="one")

    pruned = store.prune()

    assert [(each.model, each.size_bytes) for each in pruned.models] == [("one", SIZE)]
    assert box.held(store) == {"shared"}


def test_budget_comes_back_under_it_where_sizes_are_not_declared(box: Box) -> None:
    """A source that hides its size is fetched, and older models go when it has come."""
    store = box.store(budget=2 * SIZE)
    box.use(store, box.file("a"))
    box.use(store, box.file("b"))

    box.use(store, box.file("c", approx_bytes=None))

    assert box.held(store) == {"b", "c"}


def test_full_disk_removes_on_demand_models_before_it_refuses(box: Box) -> None:
    """Where the disk is too full for a model, older ones go; offers for it are not refused."""
    size = 4_000_000
    a, b = box.file("a", size), box.file("b", size)
    store = box.store()
    box.use(store, a)
    free = shutil.disk_usage(box.root).free
    # So much has to stay free that only what the first model takes can give the second its room, whatever
    # else this machine writes to its disk meanwhile: within half a model.
    tight = box.store(spare_bytes=free - size // 2)

    assert tight.shortfall_bytes([b]) == 0
    tight.ensure([b])

    assert box.held(tight) == {"b"}


def test_use_is_noted_once_a_minute(box: Box) -> None:
    """Jobs in quick succession do not write the ledger each; a later one does."""
    store = box.store()
    a = box.file("a")
    box.use(store, a)
    ledger = box.root / "ledger.json"
    inode = ledger.stat().st_ino

    box.clock.now += 59
    with store.taken("a", [a]):
        assert ledger.stat().st_ino == inode

    box.clock.now += 2
    with store.taken("a", [a]):
        assert json.loads(ledger.read_text())[f"{a.sha256}/model.gguf"]["models"] == {"a": box.clock.now}


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "..", "a/b/c", "{sha}/..", "{sha}/../../outside", "{sha}/"]
)
def test_removal_goes_by_no_name_that_leaves_the_folder(box: Box, name: str) -> None:
    """A ledger whose names lead elsewhere is not believed: nothing outside is removed by it."""
    store = box.store()
    box.use(store, box.file("a"))
    outside = box.root.parent / "outside"
    outside.write_bytes(b"precious")
    ledger = box.root / "ledger.json"
    entries = json.loads(ledger.read_text())
    stat = outside.stat()
    entries[name.format(sha="0" * 64)] = {
        **next(iter(entries.values())),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
    }
    ledger.write_text(json.dumps(entries))

    box.store().prune()

    assert outside.read_bytes() == b"precious"


# --- prune ---


def abandoned(box: Box, key: str, *, days: float = 0) -> Path:
    """Bytes of a download that no process goes on with."""
    part = box.root / ".staging" / f"{key}.part"
    part.parent.mkdir(exist_ok=True, parents=True)
    for path in (part, part.with_suffix(".json")):
        path.write_bytes(b"12345")
        changed = path.stat().st_mtime - days * 86_400
        os.utime(path, (changed, changed))
    return part


def test_prune_removes_on_demand_models_and_staging_and_says_so(box: Box) -> None:
    """prune leaves the required models, and what it does not know; it tells what it gained."""
    a, b = box.file("a"), box.file("b")
    store = box.store(required=(a,))
    store.ensure([a])
    box.use(store, b)
    part = abandoned(box, "0" * 64)
    kept = abandoned(box, str(a.sha256))
    stranger = box.root / "notes.txt"
    stranger.write_text("mine")

    would = store.prune(dry_run=True)
    assert box.held(store) == {"a", "b"}
    assert part.exists()
    did = store.prune()

    assert would == did
    assert [(each.model, each.size_bytes) for each in did.models] == [("b", SIZE)]
    assert did.staging_bytes == 10
    assert did.strangers == (stranger,)
    assert stranger.exists()
    assert box.held(store) == {"a"}
    assert not part.exists()
    assert kept.exists()
    assert set(store.entries()) == {f"{a.sha256}/model.gguf"}


def test_old_staging_is_removed_at_the_start_and_young_is_kept(box: Box) -> None:
    """What came of a download is kept for two weeks after its last byte."""
    store = box.store()
    old, young = abandoned(box, "0" * 64, days=15), abandoned(box, "1" * 64, days=13)

    store.clean_staging()

    assert not old.exists()
    assert not old.with_suffix(".json").exists()
    assert young.exists()


def test_old_staging_is_removed_before_something_is_fetched(box: Box) -> None:
    """A service that runs for months does not keep what nobody goes on with until its next start."""
    store = box.store()
    old = box.root / ".staging" / f"{'0' * 64}.part"
    old.parent.mkdir()
    old.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))

    box.use(store, box.file("a"))

    assert not old.exists()


def test_staging_of_a_running_download_is_not_removed(box: Box) -> None:
    """However old its bytes look, a download that a process works on is left alone."""
    store = box.store()
    a = box.file("a")
    box.served["a"].hold_after = 10
    with subprocess.Popen([sys.executable, "-c", HOLDER, a.url, str(box.root), str(a.sha256)]) as running:
        assert box.served["a"].held.wait(30)
        (part,) = (box.root / ".staging").glob("*.part")
        os.utime(part, (0, 0))
        store.clean_staging()
        assert store.prune().staging_bytes == 0
        assert part.exists()
        running.kill()

    store.prune()
    assert not part.exists()


# --- a disk that fills ---


def test_full_disk_in_the_middle_of_an_on_demand_model(small_disk: Path, box: Box) -> None:
    """A model that turns out too large is one clear error; the disk is usable, and the next model comes."""
    box.root = small_disk / "models"
    store = box.store(spare_bytes=0)
    huge = box.file("huge", 6_000_000, approx_bytes=None)

    with pytest.raises(StoreError, match=r"no space left on the disk.*set another \[models\] root.*removed"):
        store.ensure([huge], model="huge")

    assert shutil.disk_usage(small_disk).free > 3_900_000
    assert not store.path(huge).exists()
    box.use(store, box.file("b"))
    assert box.held(store) == {"b"}


def test_full_disk_in_the_middle_of_a_required_model_keeps_what_came(small_disk: Path, box: Box) -> None:
    """What has come of a required model waits for the operator to make room, and nothing comes twice."""
    box.root = small_disk / "models"
    required = box.file("required", 3_500_000, approx_bytes=None)
    box.served["required"].chunked = True  # its length is not told before
    store = box.store(spare_bytes=0, required=(required,))
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 2_000_000)

    with pytest.raises(StoreError, match=r"no space left on the disk.*goes on from there"):
        store.ensure([required])
    ballast.unlink()
    store.ensure([required])

    assert store.is_verified(required)
    assert any(asked.range for asked in box.served["required"].requests)


def test_full_disk_in_the_middle_removes_older_models_and_goes_on(small_disk: Path, box: Box) -> None:
    """Where an on-demand model can go, a full disk is no error at all."""
    box.root = small_disk / "models"
    store = box.store(spare_bytes=0)
    box.use(store, box.file("a", 2_500_000))

    box.use(store, box.file("b", 2_500_000, approx_bytes=None))

    assert box.held(store) == {"b"}
    assert store.is_verified(box.file("b", 2_500_000))


def test_full_disk_costs_no_job_whose_files_are_here(
    small_disk: Path, box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the use of a model cannot be written down, a warning says so and the job is done."""
    box.root = small_disk / "models"
    store = box.store(spare_bytes=0)
    a = box.file("a")
    box.use(store, a)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))

    for model in ("a", "another"):
        box.clock.now += 3600
        with store.taken(model, [a]) as (local,):
            assert local.path.exists()
        store.ensure([a], model="a third")

    assert {record.message for record in caplog.records} == {"use of a model not noted"}


def test_room_that_another_download_needs_is_not_given_away(small_disk: Path, box: Box) -> None:
    """A model is refused where what is free has yet to be filled by a download under way."""
    box.root = small_disk / "models"
    first, second = box.file("a", 2_500_000), box.file("b", 2_500_000)
    box.served["a"].hold_after = 300_000
    thread = threading.Thread(target=box.store(spare_bytes=0).ensure, args=([first],))
    thread.start()
    assert box.served["a"].held.wait(10)

    with pytest.raises(StoreError, match="free some space"):
        box.store(spare_bytes=0).ensure([second])

    assert box.served["b"].requests == []
    box.served["a"].release()
    thread.join()
    assert box.store(spare_bytes=0).is_verified(first)


# --- several files at once ---


def test_files_of_one_model_come_at_the_same_time(box: Box) -> None:
    """Three files of a model are on their way at once, and a fourth waits for one of them."""
    files = [box.file(name) for name in "abcd"]
    for served in box.served.values():
        served.hold_after = 10

    def let_go() -> None:
        assert all(box.served[name].held.wait(10) for name in "abc")
        assert box.served["d"].requests == []
        for served in box.served.values():
            served.release()

    releaser = threading.Thread(target=let_go)
    releaser.start()
    seen: list[tuple[int, int | None]] = []
    box.store().ensure(files, progress=lambda done, total: seen.append((done, total)))
    releaser.join()

    assert box.held(box.store()) == set("abcd")
    assert seen[-1] == (4 * SIZE, 4 * SIZE)


def test_one_failed_file_ends_the_others(box: Box) -> None:
    """A model whose one file cannot be had fails with that file's error, not after the others have come."""
    files = [box.file(name) for name in "ab"]
    box.served["a"].hold_after = 10
    box.served["b"].answers = [(404, {})]

    with pytest.raises(DownloadError, match="404"):
        box.store().ensure(files)

    assert box.held(box.store()) == set()


def test_room_is_made_of_what_another_process_has_fetched_since(box: Box) -> None:
    """A process knows of models that others of this box have brought since it started."""
    store, other = box.store(budget=SIZE), box.store(budget=SIZE)
    box.use(other, box.file("a"))
    assert store.shortfall_bytes([box.file("b")]) == 0
    box.use(store, box.file("b"))
    assert box.held(store) == {"b"}


def test_model_whose_files_are_wanted_is_not_its_own_room(box: Box) -> None:
    """What a model has here already stays while room is made for the rest of it, however old it is."""
    store = box.store(budget=2 * SIZE)
    box.use(store, box.file("a"), model="one")
    box.use(store, box.file("c"))
    box.use(store, box.file("a"), box.file("b"), model="two")
    assert box.held(store) == {"a", "b"}
    assert len(box.served["a"].requests) == 1


def test_model_is_as_old_as_its_last_use(box: Box) -> None:
    """A model counts as used when any of its files was, and goes after those that were not since."""
    store = box.store(budget=4 * SIZE)
    shared = box.file("shared")
    box.use(store, shared, box.file("a"), model="one")
    box.use(store, box.file("b"), model="two")
    box.use(store, shared, model="one")
    box.use(store, box.file("c"), box.file("d"), model="three")
    assert box.held(store) == {"shared", "a", "c", "d"}


def test_removal_gives_what_the_file_takes_of_the_disk(box: Box) -> None:
    """A file with holes gives back no more room than it has taken."""
    store = box.store()
    box.use(store, box.file("a"))
    path = store.path(box.file("a"))
    path.write_bytes(b"")
    os.truncate(path, 50_000_000)
    tight = box.store(spare_bytes=shutil.disk_usage(box.root).free - 20_000_000)
    assert tight.shortfall_bytes([box.file("b", approx_bytes=60_000_000)]) > 20_000_000


def test_budget_refuses_a_model_that_is_required_in_part(box: Box) -> None:
    """One required file does not exempt a model's others from the budget."""
    a, big = box.file("a"), box.file("big", 3 * SIZE)
    store = box.store(budget=2 * SIZE, required=(a,))
    with pytest.raises(StoreError, match="raise budget_gb"):
        box.use(store, a, big)


def test_two_processes_may_use_one_model(box: Box) -> None:
    """Holding a model keeps it from being removed, and nobody from using it."""
    store, file = box.store(), box.file("a")
    with store.taken("one", [file]):
        arguments = [sys.executable, "-c", HOLDER, file.url, str(box.root), str(file.sha256)]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            other.communicate()


def test_model_that_was_taken_meanwhile_is_not_removed(box: Box) -> None:
    """Whoever takes a model between the look for room and its removal keeps it."""
    store, file = box.store(), box.file("a")
    box.use(store, file)
    (removal,) = store._space.removals()
    with store.taken("other", [file]):
        assert not store._space.remove(removal, "room for another model")
        assert box.held(store) == {"a"}
    assert store._space.remove(removal, "room for another model")
    assert box.held(store) == set()
