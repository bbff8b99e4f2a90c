"""The whole service on a copy of another machine's disk: two machines are two workers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from studio_worker.box import machine_id
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.jobs import Picture
from studio_worker.local_studio import LocalStudio
from studio_worker.spool.outbox import Outbox
from tests.lab.service import READY_S, await_log, await_online, command
from tests.lab.spooled import job

Inside = Callable[[str], None]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """From the call on, commands run in the machine with that id, as far as they can tell."""
    hook, root = tmp_path / "hook", tmp_path / "machine"
    hook.mkdir()
    for folder in ("etc", "run/systemd/system"):
        (root / folder).mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(
        "import pathlib\n"
        f"import {machine_id.__name__} as module\n"
        "mark = module.machine_mark\n"
        f"module.machine_mark = lambda *_: mark(pathlib.Path({str(root)!r}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{hook}:{os.environ.get('PYTHONPATH', '')}")

    def enter(name: str) -> None:
        (root / "etc/machine-id").write_text(name * 32 + "\n")

    return enter


@pytest.mark.welcoming_studio
def test_copy_of_a_registered_box_is_a_worker_of_its_own(
    site: Path, studio: LocalStudio, tmp_path: Path, inside: Inside
) -> None:
    """Of a box that starts with another's disk the studio sees a second worker, and nothing under the first
    one's name; adopted, it is the first one, with what that had to deliver.
    """
    state = tmp_path / "work" / "state"
    inside("a")
    with ServiceProcess(site, tmp_path / "first") as running:
        running.await_message("READY=1", READY_S)
        first = await_online(studio)
        assert running.stop() == 0
    studio.wait_for(lambda: not studio.is_online(first), READY_S)
    Outbox(state / "outbox").add(job(), Picture(b"picture", "webp", {}), {})

    inside("b")
    with ServiceProcess(site, tmp_path / "copy") as running:
        running.await_message("READY=1", READY_S)
        studio.wait_for(lambda: any(studio.is_online(w.worker_id) for w in studio.workers()), READY_S)
        ids = [worker.worker_id for worker in studio.workers()]
        assert len(ids) == 2
        assert (studio.is_online(ids[0]), studio.is_online(ids[1])) == (False, True)
        said = command(site, "register").stdout
        assert said.startswith(f"approved as worker {ids[1]}\n")
        assert f"approved as worker {first}" in said
        assert "register --adopt" in said
        assert command(site, "register", "--adopt").returncode == 75  # not under a running service
        assert running.stop() == 0
    lines = running.log_lines()
    assert [each["worker_id"] for each in lines if "register --adopt" in each["message"]] == [first]
    assert not [each for each in lines if each.get("job_id") == "job-1"]

    adopted = command(site, "register", "--adopt")
    assert adopted.stdout == f"from now on approved as worker {first}\n", adopted.stderr
    with ServiceProcess(site, tmp_path / "moved") as running:
        running.await_message("READY=1", READY_S)
        studio.wait_for(lambda: studio.is_online(first), READY_S)
        await_log(running, "result refused for good and dropped")
        assert running.stop() == 0
    assert len(studio.workers()) == 2


def test_copy_that_waits_for_approval_says_what_it_waits_for(
    site: Path, studio: LocalStudio, tmp_path: Path, inside: Inside
) -> None:
    """The status line and doctor say, until somebody has decided, that this was another machine's disk."""
    state = tmp_path / "work" / "state"
    state.mkdir(parents=True)
    known = {"install_id": "i", "worker_id": "w1", "auth_token": "t" * 20, "machine": "0" * 32}
    (state / "identity.json").write_text(json.dumps(known))
    inside("b")
    assert "on another machine: the next start registers this one anew" in command(site, "register").stdout
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        running.await_message("STATUS=ready, waiting for approval", READY_S)
        shown = command(site, "status").stdout
        assert "another machine's identity (approved as worker w1) is kept in" in shown
        found = json.loads(command(site, "doctor", "--json").stdout)["findings"]
        (registration,) = (each for each in found if each["check"] == "registration")
        assert registration["level"] == "warning"
        assert "approved as worker w1" in registration["text"]
        assert "studio-worker register --adopt" in registration["cure"]
        assert running.stop() == 0
