"""What the start promises: signs of life only while bytes advance, and its errors passed on."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_worker import config
from studio_worker.appliance.provisioning import (
    ProvisionProgress,
    SeenFiles,
    open_store,
    provision,
    show_duration,
)
from studio_worker.config.current import Current
from studio_worker.context import called
from studio_worker.errors import DownloadCancelled, DownloadError, StoreError
from studio_worker.models import ModelFile, RequiredModel
from studio_worker.network.addresses import Networks
from studio_worker.report.logs import facts
from studio_worker.store import Store
from studio_worker.store.terms import fixed
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, ServedFile

QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0,))


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A progress and everything it said."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lines: list[str] = []
        self.advances = 0
        self.progress = ProvisionProgress(self.lines.append, self._advance, self.clock)
        self.progress.label = "sample"

    def _advance(self) -> None:
        self.advances += 1


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def required(model_id: str, *files: ServedFile, size: int | None = None) -> RequiredModel:
    return RequiredModel(
        id=model_id,
        engine="sd-cpp",
        files=tuple(
            ModelFile(role="model", url=file.url, filename="m.gguf", sha256=file.sha256, approx_bytes=size)
            for file in files
        ),
    )


def test_progress_says_how_far_it_is(watched: Watched) -> None:
    """The status line names the model, the share and the whole, or what has come where that is unknown."""
    watched.progress(2_730_000, 6_500_000)
    watched.progress.label = "other"
    watched.clock.now += 1
    watched.progress(3_000_000, None)

    assert watched.lines == ["downloading sample: 42% of 6.5 MB", "downloading other: 3.0 MB"]


def test_progress_says_how_fast_it_is_and_how_long_it_takes(watched: Watched) -> None:
    """The status line has the rate of the last seconds and the time that is left at it."""
    watched.progress.label = "z-image"
    total = 7_300_000_000
    for seconds_left in (120, 115, 110):
        watched.progress(total - seconds_left * 38_000_000, total)
        watched.clock.now += 5

    assert watched.lines[-1] == "downloading z-image: 42% of 7.3 GB, 38 MB/s, 1 min 50 s left"


def test_progress_that_begins_anew_speaks_only_of_what_comes_again(watched: Watched) -> None:
    """A download that starts over shows its new count, and a count that falls is no sign of life."""
    watched.progress(5_000_000, 6_000_000)
    watched.clock.now += 1
    watched.progress(0, 6_000_000)
    assert watched.advances == 1

    watched.progress(1_000_000, 6_000_000)
    assert watched.lines[-1] == "downloading sample: 16% of 6.0 MB"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59, "59 s"), (110, "1 min 50 s"), (7500, "2 h 5 min")]
)
def test_duration_is_shown_as_people_say_it(seconds: float, shown: str) -> None:
    """Seconds, then minutes and seconds, then hours and minutes."""
    assert show_duration(seconds) == shown


def test_progress_speaks_once_a_second(watched: Watched) -> None:
    """However often bytes come, a line and a sign of life go out once a second."""
    for done in range(1, 2001):
        watched.progress(done * 1000, 2_000_000)
        watched.clock.now += 0.01

    assert 19 <= len(watched.lines) <= 21
    assert watched.advances == len(watched.lines)


def test_progress_logs_every_ten_seconds(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """The log gets a line every ten seconds, with the bytes as fields."""
    caplog.set_level(logging.INFO, logger="studio_worker")

    with called(model="sample"):
        for second in range(1, 26):
            watched.progress(second * 1000, 2_000_000)
            watched.clock.now += 1

    assert [facts(record)["bytes"] for record in caplog.records] == [1000, 11000, 21000]
    assert facts(caplog.records[0]) == {
        "op": "provision",
        "model": "sample",
        "doing": "downloading",
        "bytes": 1000,
        "bytes_total": 2_000_000,
    }
    assert facts(caplog.records[1])["bytes_per_s"] == 1000
    assert facts(caplog.records[1])["left_s"] == 1989


def test_progress_gives_no_sign_of_life_while_nothing_advances(watched: Watched) -> None:
    """A stalled mirror, and one that never began, lets the start time out."""
    watched.progress(0, 5000)
    assert watched.advances == 0

    watched.progress(1000, 5000)
    for _ in range(60):
        watched.clock.now += 1
        watched.progress(1000, 5000)

    assert watched.advances == 1
    watched.progress(1001, 5000)
    assert watched.advances == 2


def test_provision_fetches_every_file_of_every_model(
    server: FileServer, tmp_path: Path, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """When it returns, every required file is verified; the log names every model."""
    caplog.set_level(logging.INFO, logger="studio_worker.appliance.provisioning")
    files = [server.serve(f"/{name}", name.encode()) for name in "abc"]
    models = [required("one", files[0], files[1]), required("two", files[2])]
    store = Store(tmp_path, fixed(QUICK))

    provision(store, models, watched.progress, threading.Event())

    assert all(store.is_verified(file) for model in models for file in model.files)
    told = [facts(record).get("model") for record in caplog.records if record.message == "model verified"]
    assert told == ["one", "two"]
    assert caplog.messages[-1] == "required models verified"
    assert watched.lines[0].startswith("downloading one: ")


def test_provision_of_nothing_is_done(tmp_path: Path, watched: Watched) -> None:
    """A worker without required models is ready at once."""
    provision(Store(tmp_path), [], watched.progress, threading.Event())

    assert watched.lines == []


def test_provision_is_silent_where_everything_is_verified(
    server: FileServer, tmp_path: Path, watched: Watched
) -> None:
    """The second start reads and fetches nothing."""
    file = server.serve("/a", b"a")
    models = [required("one", file)]
    provision(Store(tmp_path, fixed(QUICK)), models, Watched().progress, threading.Event())

    provision(Store(tmp_path, fixed(QUICK)), models, watched.progress, threading.Event())

    assert len(file.requests) == 1
    assert watched.lines == []


def test_provision_fails_with_the_download(server: FileServer, tmp_path: Path, watched: Watched) -> None:
    """A model that cannot be had fails the start with the status for it, and later models are not tried."""
    missing = server.serve("/a", b"a", answers=[(404, {})])
    other = server.serve("/b", b"b")

    with pytest.raises(DownloadError, match="404") as failure:
        provision(
            Store(tmp_path, fixed(QUICK)),
            [required("one", missing), required("two", other)],
            watched.progress,
            threading.Event(),
        )

    assert failure.value.exit_status == 74
    assert other.requests == []


def test_provision_fails_where_the_disk_is_too_small(
    server: FileServer, tmp_path: Path, watched: Watched
) -> None:
    """A model that the disk cannot hold fails the start before its download."""
    file = server.serve("/a", b"a")

    with pytest.raises(StoreError) as failure:
        provision(
            Store(tmp_path, fixed(QUICK)),
            [required("one", file, size=10**15)],
            watched.progress,
            threading.Event(),
        )

    assert failure.value.exit_status == 74
    assert file.requests == []


def test_provision_can_be_stopped(server: FileServer, tmp_path: Path, watched: Watched) -> None:
    """A stop while a mirror is silent ends the provisioning soon."""
    file = server.serve("/a", b"abc", hold_after=1)
    stop = threading.Event()

    def stop_when_held() -> None:
        assert file.held.wait(10)
        stop.set()

    stopper = threading.Thread(target=stop_when_held)
    stopper.start()

    with pytest.raises(DownloadCancelled):
        provision(Store(tmp_path), [required("one", file)], watched.progress, stop)

    stopper.join()


def test_configured_budget_and_required_models_reach_the_store(server: FileServer, tmp_path: Path) -> None:
    """[models] budget_gb limits what jobs may bring, and what models.d names is never removed for it."""
    wanted = required("one", server.serve("/a", b"a" * 2000), size=2000)
    (tmp_path / "etc" / "models.d").mkdir(parents=True)
    (tmp_path / "etc" / "models.d" / "one.json").write_text(wanted.model_dump_json(by_alias=True))
    (tmp_path / "etc" / "config.toml").write_text(f'[models]\nroot = "{tmp_path}/models"\nbudget_gb = 3e-6\n')
    store = open_store(Current(config.load(tmp_path / "etc"), QUICK))
    store.ensure(wanted.files, model="one")
    other = required("two", server.serve("/b", b"b" * 2000), size=2000)

    with pytest.raises(StoreError, match="budget_gb"):
        store.ensure(other.files, model="two")

    assert store.prune().models == ()
    assert store.is_verified(wanted.files[0])


def test_store_keeps_to_what_a_reload_says(server: FileServer, tmp_path: Path) -> None:
    """Budget, required models and the ways of downloads that a reload brings hold for the next model."""
    (tmp_path / "config.toml").write_text(f'[models]\nroot = "{tmp_path}/models"\n')
    current = Current(config.load(tmp_path), QUICK)
    store = open_store(current)
    old = required("old", server.serve("/old", b"o" * 2000), size=2000)
    new = required("new", server.serve("/new", b"n" * 2000), size=2000)
    store.ensure(old.files, model="old")
    assert store.shortfall_bytes(new.files) == 0

    with (tmp_path / "config.toml").open("a") as file:
        file.write("budget_gb = 3e-6\n")
    settings = config.load(tmp_path).settings
    current.replace(config.Config(settings, (old,)), QUICK)
    assert store.shortfall_bytes(new.files) == 1000
    assert store.prune(dry_run=True).models == ()

    stricter = dataclasses.replace(QUICK, offered=Networks())
    current.replace(config.Config(settings, ()), stricter)
    assert store.shortfall_bytes(new.files) == 0
    with pytest.raises(DownloadError, match="this machine"):
        store.ensure(new.files, model="new")


def test_files_of_a_job_are_shown_while_they_come(server: FileServer, tmp_path: Path) -> None:
    """A model that a job brings is shown like a required one; one that is here is not mentioned."""
    file = server.serve("/a", b"a" * 4000)
    (wanted,) = required("one", file, size=4000).files
    shown: list[str] = []
    moved: list[int] = []
    files = SeenFiles(Store(tmp_path, fixed(QUICK)), shown.append, lambda: shown.append("ready"))

    with files.taken("one", [wanted], progress=lambda done, total: moved.append(done)) as (local,):
        assert local.path.read_bytes() == b"a" * 4000
    with files.taken("one", [wanted]):
        pass

    assert shown[0].startswith("downloading one: ")
    assert shown[-1] == "ready"
    assert shown.count("ready") == 1
    assert moved[-1] == 4000


def test_status_tells_reading_from_downloading(server: FileServer, tmp_path: Path) -> None:
    """A file on disk that has to be hashed is verified, not downloaded; one that comes beside it is."""
    here, coming = server.serve("/a", b"a" * 4000), server.serve("/b", b"b" * 4000)
    (file,) = required("one", here, size=4000).files
    Store(tmp_path, fixed(QUICK)).ensure([file])
    (tmp_path / "ledger.json").unlink()
    shown: list[str] = []
    files = SeenFiles(Store(tmp_path, fixed(QUICK)), shown.append, lambda: None)

    with files.taken("one", [file]):
        pass
    with files.taken("two", required("two", coming, size=4000).files):
        pass

    assert [line.split(":")[0] for line in shown] == ["verifying one", "downloading two"]
    assert len(here.requests) == 1


def test_files_of_a_job_that_cannot_be_had_leave_no_line_behind(server: FileServer, tmp_path: Path) -> None:
    """After a failed download the status line is what it was."""
    file = server.serve("/a", b"a" * 40_000, flip_at=3)
    shown: list[str] = []
    files = SeenFiles(Store(tmp_path, fixed(QUICK)), shown.append, lambda: shown.append("ready"))

    with pytest.raises(DownloadError), files.taken("one", required("one", file).files):
        pass

    assert shown[-1] == "ready"
