"""gpu-check: what it makes of rows that fail, crash and hang, and the whole of it rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studio_worker.engine.families import FAMILIES
from studio_worker.errors import ConfigError
from studio_worker.gpu_check import check, places, runner
from studio_worker.gpu_check.programme import FORMS, PLACES, rows
from studio_worker.gpu_check.report import Report
from studio_worker.gpu_check.rows import Found, Row
from studio_worker.gpu_check.runner import Runner
from tests.gpu_check import scripted_rows

SCRIPTED = [sys.executable, str(Path(scripted_rows.__file__))]
COMMAND = [str(Path(sys.executable).with_name("studio-worker")), "gpu-check"]


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., dict[str, Found]]:
    """Has a runner look at rows that are named after what they do."""

    def look(*works: str, together: bool = False, minutes: float = 1.0) -> dict[str, Found]:
        found: list[Found] = []
        runner = Runner(SCRIPTED, SCRIPTED, tmp_path, together=2, on_found=found.append)
        asked = [
            Row(work, work, limit_s=2.0 if work == "hang" else 60.0, together=together) for work in works
        ]
        runner.run(asked, deadline=time.monotonic() + 60 * minutes)
        runner.end()
        return {each.name: each for each in found}

    return look


# --- rows that go wrong ---


def test_row_that_fails_does_not_keep_the_next_from_being_looked_at(
    look: Callable[..., dict[str, Found]],
) -> None:
    """Rows go on after one that failed, in the same process, and each has its figures."""
    found = look("fail", "skip", "go")
    assert [(each.state, each.error) for each in found.values()] == [
        ("failed", "Missed: too slow"),
        ("skipped", "no room"),
        ("ok", ""),
    ]
    assert len({each.figures["process"] for each in found.values()}) == 1


def test_row_that_hangs_is_ended_at_its_limit(look: Callable[..., dict[str, Found]]) -> None:
    """A row that hangs has failed at its limit, with the place where it hung and the figures it had told; the
    next one is looked at in another process.
    """
    found = look("hang", "go")
    assert found["hang"].state == "failed"
    assert found["hang"].error == "no end within 2 s"
    assert "hang_in_the_driver" in found["hang"].trace
    assert found["go"].state == "ok"
    assert found["go"].figures["process"] != found["hang"].figures["process"]
    with pytest.raises(ProcessLookupError):
        os.kill(found["hang"].figures["process"], 0)


@pytest.mark.parametrize(("work", "how"), [("crash", "SIGSEGV"), ("leave", "exit status 3")])
def test_row_that_ends_its_process_has_failed(
    look: Callable[..., dict[str, Found]], work: str, how: str
) -> None:
    """A row that takes its process down has failed, with how it ended and what was last said; the next one
    gets another process.
    """
    found = look(work, "go")
    assert found[work].state == "failed"
    assert found[work].error == f"its process ended: {how}"
    assert ("the driver said something" in found[work].trace) == (work == "crash")
    assert found["go"].state == "ok"


@pytest.mark.parametrize(
    ("command", "error", "trace"),
    [
        (["-c", "import sys; sys.exit('no such library')"], "its process ended: exit status 1", "no such"),
        (["-c", "import time; time.sleep(600)"], "its process did not start within 1 s", ""),
        (None, "its process cannot be started: No such file or directory", ""),
    ],
    ids=["ends", "hangs", "is not there"],
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_process_that_does_not_start_is_a_row_that_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str] | None,
    error: str,
    trace: str,
    together: bool,
) -> None:
    """Where libraries cannot be loaded, or hang, each row has failed with how that was; none is lost."""
    monkeypatch.setattr(runner, "START_LIMIT_S", 1.0 if error.endswith("within 1 s") else 60.0)
    words = [sys.executable, *command] if command else [str(tmp_path / "none")]
    found: list[Found] = []
    looking = Runner(words, words, tmp_path, together=2, on_found=found.append)
    asked = [Row(name, "go", together=together) for name in ("one", "two", "three")]
    looking.run(asked, deadline=time.monotonic() + 600)
    looking.end()
    assert {each.name for each in found} == {"one", "two", "three"}
    assert {(each.state, each.error) for each in found} == {("failed", error)}
    assert all(trace in each.trace for each in found)


def test_row_after_one_that_lost_the_device_begins_anew(look: Callable[..., dict[str, Found]]) -> None:
    """After a lost device the next row comes to a process that has it."""
    found = look("lose the device", "go")
    assert found["lose the device"].state == "failed"
    assert found["go"].state == "ok"
    assert found["go"].figures["process"] != found["lose the device"].figures["process"]


def test_rows_beside_each_other_are_all_looked_at(look: Callable[..., dict[str, Found]]) -> None:
    """Rows that may run beside each other are shared between processes; one that crashes costs the others
    nothing.
    """
    works = [f"go {number}" for number in range(8)]
    found = look(*works[:4], "crash", *works[4:], together=True)
    assert {name for name, each in found.items() if each.state == "ok"} == set(works)
    assert found["crash"].state == "failed"


def test_rows_that_are_left_when_the_time_is_over_are_left_out(look: Callable[..., dict[str, Found]]) -> None:
    """When the time is over the rest is left out, and told so; it has not failed."""
    found = look("go", "skip", minutes=0.05)
    assert [each.state for each in found.values()] == ["left out", "left out"]


# --- what is told ---


def test_everything_found_so_far_is_in_the_file(tmp_path: Path) -> None:
    """The file is whole after every row, so that a kill loses nothing that was found."""
    path, shown = tmp_path / "out.json", []
    report = Report(path, "cuda:0 (a card)", shown.append)
    report.add(Found("first", "ok", 1.5, {"ratio": 1.0125, "levels": {"text": 0.5}}))
    told = json.loads(path.read_text())
    assert (told["device"], [row["name"] for row in told["rows"]]) == ("cuda:0 (a card)", ["first"])
    assert told["rows"][0]["figures"] == {"ratio": 1.0125, "levels": {"text": 0.5}}
    report.add(Found("second", "failed", 2.0, {}, "Missed: too slow", "where"))
    assert [row["state"] for row in json.loads(path.read_text())["rows"]] == ["ok", "failed"]
    assert "ratio 1.01" in shown[0]
    assert "levels" not in shown[0]
    assert report.close(4.0) == 1
    assert "    where" in shown
    assert "1 ok, 1 failed in 4 s" in shown[-1]


def test_disk_that_is_full_keeps_no_row_from_being_looked_at(tmp_path: Path) -> None:
    """Where the file can be written no more, the table goes on; its last line and the exit status say so."""
    folder = tmp_path / "out"
    folder.mkdir()
    shown: list[str] = []
    report = Report(folder / "out.json", "cpu", shown.append)
    (folder / "out.json").unlink()
    folder.rmdir()
    report.add(Found("first", "ok"))
    assert report.close(4.0) == os.EX_IOERR
    assert shown[0].startswith("ok       first")
    assert shown[-1].endswith("out.json could not be written: No such file or directory")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"output": "a folder"}, "a folder is no plain file; name another -o FILE"),
        ({"output": "a pipe"}, "a pipe is no plain file; name another -o FILE"),
        ({"output": "none/out.json"}, "folder .*none is not there or not writable; name another -o FILE"),
        ({"work": "none"}, "folder .*none is not there or not writable; name another --work DIR"),
        ({"only": "flux9*"}, "no row has a name like 'flux9\\*'"),
    ],
    ids=["folder", "pipe", "no folder", "no work folder", "no row"],
)
def test_what_cannot_be_done_is_told_before_anything_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], says: str
) -> None:
    """Places that cannot be written and rows that do not exist are told at once; nothing is replaced by the
    file but a file.
    """
    (tmp_path / "a folder").mkdir()
    os.mkfifo(tmp_path / "a pipe")
    monkeypatch.setattr(check, "probe", lambda _name: pytest.fail("it was tried out"))
    output, work = tmp_path / given.get("output", "out.json"), given.get("work")
    with pytest.raises(ConfigError, match=says):
        check.run_check("cpu", output, only=given.get("only", "*"), work=tmp_path / work if work else None)
    assert (tmp_path / "a pipe").is_fifo()


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("skipped", 0), ("left out", 0), ("failed", 1)])
def test_exit_status_says_whether_something_failed(tmp_path: Path, state: str, status: int) -> None:
    """Only a row that failed makes the exit status 1."""
    report = Report(tmp_path / "out.json", "cpu", lambda _line: None)
    report.add(Found("row", state))  # type: ignore[arg-type]
    assert report.close(1.0) == status


def test_box_without_a_gpu_is_told_so() -> None:
    """Without a GPU the command ends with 69 and what to do, and looks at nothing."""
    done = subprocess.run(
        COMMAND, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 69
    assert done.stderr.startswith("studio-worker: ")
    assert done.stdout == ""


def test_device_that_does_not_compute_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch cannot compute on the device, that is the one thing told, with its cure, and 69."""
    facts = {"device": "cpu", "ok": False, "error": "no kernel image; another package"}
    monkeypatch.setattr(check, "probe", lambda _name: facts)
    shown: list[str] = []
    assert check.run_check("cpu", tmp_path / "out.json", show=shown.append) == 69
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["probe"]
    assert any("no kernel image; another package" in line for line in shown)


# --- which rows there are ---


def test_every_family_is_looked_at_in_every_form_and_place() -> None:
    """No family, form or place is forgotten: each family has a row for each form, with all places."""
    asked = {(row.given["family"], row.given["form"]) for row in rows(small=False) if "form" in row.given}
    assert asked == {(family.name, form) for family in FAMILIES for form in FORMS}
    assert PLACES == ("whole", "component", "layers")


def test_rehearsal_has_every_kind_of_row() -> None:
    """Whatever is done on a GPU is rehearsed: every function, family, form and place."""
    whole, small = rows(small=False), rows(small=True)
    assert {row.work for row in small} == {row.work for row in whole}
    given = [row.given for row in small if "form" in row.given]
    assert {each["family"] for each in given} == {family.name for family in FAMILIES}
    assert {each["form"] for each in given} == set(FORMS)
    assert {place for each in given for place in each["places"]} == set(PLACES)
    assert {lora for each in given for lora in each["loras"]} == {True, False}


def test_what_leads_the_check_has_no_torch() -> None:
    """The process that leads the check never has the device: a GPU that hangs cannot hang it."""
    script = "import sys, studio_worker.gpu_check.check\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "diffusers", "transformers"}


def test_files_are_written_where_a_disk_has_room() -> None:
    """Large files go to a disk rather than to memory, by what is mounted where."""
    mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n"
    on_disk = {name: places.is_on_disk(Path(name), mounts) for name in ("/var/tmp", "/dev/shm/x", "/tmp")}
    assert on_disk == {"/var/tmp": True, "/dev/shm/x": False, "/tmp": False}


# --- the whole of it ---


@pytest.mark.timeout(1000)  # 2 minutes of computing, which a busy machine shares
def test_rehearsal_on_the_cpu_finds_nothing_wrong(tmp_path: Path) -> None:
    """The command looks at everything at small sizes on the CPU, and nothing fails: doctor and the whole
    service, every family, cancelled jobs, memory that ran out, models that are timed, compiled blocks.
    """
    output = tmp_path / "out.json"
    done = subprocess.run(
        [*COMMAND, "--device", "cpu", "--output", str(output), "--minutes", "15"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    told = json.loads(output.read_text())
    failed = {row["name"]: (row["error"], row["trace"]) for row in told["rows"] if row["state"] != "ok"}
    assert failed == {}, done.stdout
    assert done.returncode == 0
    assert len(told["rows"]) == 1 + len(rows(small=True))
    by_name = {row["name"]: row["figures"] for row in told["rows"]}
    assert by_name["service, sample model"]["jobs"] == 6
    assert all("memory" in end for end in by_name["after memory ran out"]["ends"])
    assert by_name["sdxl: compiled"]["levels_apart"] < 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda each: each.name)
def test_check_that_is_ended_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """At SIGTERM, Ctrl-C, and where the terminal goes away, its processes end, its files are removed, and
    what was found so far stays.
    """
    work, output = tmp_path / "work", tmp_path / "out.json"
    work.mkdir()
    words = ["--device", "cpu", "--output", str(output), "--work", str(work), "--only", "libraries"]
    process = subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a suite in the background may ignore it
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("ok       probe"):
        assert process.poll() is None
    while not list(work.iterdir()):
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert list(work.iterdir()) == []
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == ["probe"]
