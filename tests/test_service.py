"""The whole service as systemd starts it: a process, a configuration folder, a notify socket, signals."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.report.notify import EXTEND_S
from studio_worker.sample_model import prompt
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import IdentityFile
from studio_worker.studio.http.registration import Registration
from tests.fakes.servers import FileServer
from tests.lab.engine import decoded, encoded, scene
from tests.lab.frames import CAPABILITIES
from tests.lab.service import (
    DONE_S,
    LONG,
    READY_S,
    SYNTHETIC,
    await_file,
    await_log,
    await_online,
    await_status,
    command,
    override,
    queue_synthetic,
    require,
    status,
)

pytestmark = pytest.mark.welcoming_studio


# --- READY ------------------------------------------------------------------------------------------


def test_service_is_not_ready_before_the_last_file_is_verified(site: Path, tmp_path: Path) -> None:
    """READY waits for the last byte of the last required file, and comes when it is there."""
    with FileServer() as server:
        first = server.serve("/first.safetensors", b"first" * 1000)
        last = server.serve("/last.safetensors", b"last" * 1000, hold_after=100)
        require(site, "two", first, last)
        with ServiceProcess(site, tmp_path / "log") as running:
            assert last.held.wait(READY_S)
            assert (tmp_path / "work" / "models" / hashlib.sha256(first.content).hexdigest()).is_dir()
            assert not any(line.startswith("READY") for line in running.messages)
            last.release()
            running.await_message("READY=1", READY_S)
            assert running.stop() == 0
    messages = [line["message"] for line in running.log_lines()]
    assert messages.index("required models verified") < messages.index("service ready")


def test_service_shows_systemd_what_it_downloads(site: Path, tmp_path: Path) -> None:
    """While a required model comes, STATUS says how far it is, and more time is asked for with it."""
    with FileServer() as server:
        held = server.serve("/held.safetensors", b"held" * 100_000, hold_after=200_000)
        require(site, "large", held)
        with ServiceProcess(site, tmp_path / "log") as running:
            running.await_message("STATUS=downloading large: ", READY_S)
            assert not any(line.startswith("READY") for line in running.messages)
            assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in running.messages)
            held.release()
            running.await_message("READY=1", READY_S)
            assert running.stop() == 0


def test_service_says_that_a_host_has_it_wait(site: Path, tmp_path: Path) -> None:
    """A start that a host puts off for an hour says so, and asks systemd for the time that it waits."""
    with FileServer() as server:
        file = server.serve("/m.safetensors", b"m", answers=[(429, {"Retry-After": "3600"})])
        require(site, "m", file)
        with ServiceProcess(site, tmp_path / "log") as running:
            running.await_message("STATUS=waiting 120 s: ", READY_S)
            assert any("asks to wait 3600 s" in line for line in running.messages)
            running.await_message(f"EXTEND_TIMEOUT_USEC={(120 + EXTEND_S) * 1_000_000}", READY_S)
            assert running.stop() == 0
        assert len(file.requests) == 1


def test_service_with_a_wrong_hash_is_never_ready(site: Path, tmp_path: Path) -> None:
    """A file that is not what was required ends the start: exit status 74, and the last line says why."""
    with FileServer() as server:
        require(site, "bad", server.serve("/bad.safetensors", b"evil bytes"), sha256="0" * 64)
        with ServiceProcess(site, tmp_path / "log") as running:
            assert running.wait(READY_S) == 74
    assert not any(line.startswith("READY") for line in running.messages)
    last = running.log_lines()[-1]
    assert (last["message"], last["exit_status"]) == ("service ends with an error", 74)
    assert "sha256 mismatch" in last["error"]
    assert not list((tmp_path / "work" / "models").rglob("*.safetensors"))


def test_service_stopped_while_it_provisions_ends_cleanly_at_once(site: Path, tmp_path: Path) -> None:
    """A stop does not wait for a mirror that stalls."""
    with FileServer() as server:
        slow = server.serve("/slow.safetensors", b"x" * 10_000, hold_after=100)
        require(site, "slow", slow)
        with ServiceProcess(site, tmp_path / "log") as running:
            assert slow.held.wait(READY_S)
            assert running.stop(20) == 0
        slow.release()
    assert not any(line.startswith("READY") for line in running.messages)


def test_service_is_ready_while_it_waits_for_approval(tmp_path: Path) -> None:
    """Approval may take days: READY comes before, and STATUS says what is waited for and where."""
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        (tmp_path / "work").mkdir()
        site = write_configuration(studio, tmp_path / "work")
        (site / "models.d" / "sample.json").unlink()
        with ServiceProcess(site, tmp_path / "log") as running:
            running.await_message("READY=1", READY_S)
            running.await_message("STATUS=ready, waiting for approval: approve ", READY_S)
            assert any(studio.base_url in line for line in running.messages)
            assert running.stop(20) == 0


# --- jobs and stops ---------------------------------------------------------------------------------


def test_service_does_a_job_and_stops_cleanly(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """A job goes from the queue to the gallery; SIGTERM ends with STOPPING=1 and exit status 0."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        job_id = queue_synthetic(studio, ext="png", seed=7)
        await_status(studio, job_id, "done")
        assert running.stop() == 0
        running.await_message("STOPPING=1", 1.0)
    assert studio.result(job_id).startswith(b"\x89PNG")
    assert studio.job(job_id).completions == 1
    result = studio.queue.result(job_id)
    assert result is not None
    assert result.generation_meta is not None
    assert result.generation_meta["seed"] == 7


def test_service_whose_output_nobody_reads_goes_on(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """Where whoever reads the service's output is gone (a crashed journal, a closed pipe), jobs are done."""
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        os.close(reader)
        (tmp_path / "log").unlink()
        (tmp_path / "log").touch()  # for whoever asks ServiceProcess what was logged
        job_id = queue_synthetic(studio)
        await_status(studio, job_id, "done")
        assert running.stop() == 0
    assert studio.job(job_id).completions == 1


def test_service_paints_within_a_mask_that_came_in_the_offer(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """Picture and mask as data: addresses make a picture that keeps what the mask protects; an unreadable one
    fails its job for good. No log line holds any of them.
    """
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    urls = [f"data:image/png;base64,{base64.b64encode(encoded(each)).decode()}" for each in (scene(), mask)]
    task = {"prompt": prompt("red", "gem", "sky"), "steps": 2, "width": 64, "height": 64, "ext": "png"}
    inputs = {"initImageUrl": urls[0], "maskUrl": urls[1], "denoise": 1.0}
    with ServiceProcess(site, tmp_path / "log") as running:
        source = sample_source(studio)
        good = studio.queue_job(model=MODEL_ID, task=task | inputs, model_source=source)
        bad = studio.queue_job(
            model=MODEL_ID, task=task | {"initImageUrl": urls[0] + "*"}, model_source=source
        )
        await_status(studio, good, "done")
        await_status(studio, bad, "failed")
        assert running.stop() == 0
        lines = json.dumps(running.log_lines())
    painted = np.asarray(decoded(studio.result(good)))
    assert (painted[:, :32] == np.asarray(scene())[:, :32]).all()
    assert (painted[:, 32:] != np.asarray(scene())[:, 32:]).any()
    assert "an input picture is a data: address that is not base64" in str(studio.job(bad).reason)
    assert urls[0][40:80] not in lines


def test_service_logs_one_summary_line_a_job_with_every_stage(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A finished job is one line with wait, file, preparation, load, generation, encode and upload times."""
    with ServiceProcess(site, tmp_path / "log") as running:
        job_id = queue_synthetic(studio)
        await_status(studio, job_id, "done")
        assert running.stop() == 0
    lines = [line for line in running.log_lines() if line["message"] == "job done"]
    assert [line["job_id"] for line in lines] == [job_id]
    stages = {key.removesuffix("_ms") for key in lines[0] if key.endswith("_ms")}
    assert stages == {"wait", "files", "prepare", "load", "generate", "encode", "upload"}


def test_service_told_to_stop_finishes_the_job_in_hand(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """SIGTERM in a job: the job is finished and delivered, no other is taken, exit status 0."""
    with ServiceProcess(site, tmp_path / "log") as running:
        task = {"kind": "image", "prompt": prompt("red", "gem", "sky"), "width": 128, "height": 128}
        first = studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(studio))
        second = queue_synthetic(studio)
        await_status(studio, first, "running")
        assert running.stop(DONE_S) == 0
    assert studio.job(first).status == "done"
    assert studio.job(second).status == "queued"
    assert studio.job(second).attempts == 0


def test_service_told_twice_hands_the_job_back(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """A second SIGTERM stops the job at its next step: the studio may give it to another worker."""
    with ServiceProcess(site, tmp_path / "log") as running:
        job_id = studio.queue_job(model=MODEL_ID, task=LONG, model_source=sample_source(studio))
        await_status(studio, job_id, "running")
        running.signal(signal.SIGTERM)
        running.await_message("STOPPING=1", 10.0)
        assert running.stop(DONE_S) == 0
    job = studio.job(job_id)
    assert job.status == "queued"
    assert job.reason == "the worker is stopping"


def test_service_past_its_stop_limit_hands_the_job_back(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A job longer than stop_timeout_s is handed back, so that systemd need not kill the service."""
    override(site, "[worker]\nstop_timeout_s = 0.2\n")
    with ServiceProcess(site, tmp_path / "log") as running:
        job_id = studio.queue_job(model=MODEL_ID, task=LONG, model_source=sample_source(studio))
        await_status(studio, job_id, "running")
        assert running.stop(DONE_S) == 0
    assert studio.job(job_id).reason == "the worker is stopping"
    back = [line for line in running.log_lines() if line["message"] == "handing the job in hand back"]
    assert [(line["reason"], line["job_id"]) for line in back] == [("stop limit", job_id)]


def test_service_killed_in_a_job_says_so_at_the_next_start(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """After kill -9 the next start names the job that was in hand, and the job is done in the end, once."""
    with ServiceProcess(site, tmp_path / "log") as running:
        task = {"kind": "image", "prompt": prompt("red", "gem", "sky")}
        job_id = studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(studio))
        await_file(tmp_path / "work" / "state" / "spool" / "job-in-hand.json")
        running.kill()
    with ServiceProcess(site, tmp_path / "log2") as running:
        await_status(studio, job_id, "done", "failed")
        assert running.stop(DONE_S) == 0
    job = studio.job(job_id)
    assert (job.status, job.completions) == ("done", 1)
    found = [
        line for line in running.log_lines() if line["message"].startswith("the last process ended with")
    ]
    assert [line["job_id"] for line in found] == [job_id]
    shipped = [
        line for line in studio.logs() if "the last process ended with this job in hand" in line.message
    ]
    assert [(line.level, line.job_id) for line in shipped] == [("warn", job_id)]


def test_service_refuses_a_job_that_was_in_hand_at_two_crashes(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A job that kills twice is not tried here a third time, but left to another worker; the next job is."""
    job_id = studio.queue_job(model=MODEL_ID, task=LONG, model_source=sample_source(studio), max_attempts=9)
    note = tmp_path / "work" / "state" / "spool" / "job-in-hand.json"
    for number in range(2):
        with ServiceProcess(site, tmp_path / f"log{number}") as running:
            await_status(studio, job_id, "running")  # by then the last process's note is gone
            await_file(note)
            running.kill()
        studio.wait_for(lambda: studio.job(job_id).status == "queued", READY_S)
    with ServiceProcess(site, tmp_path / "log") as running:
        after = queue_synthetic(studio)
        await_status(studio, after, "done")
        assert running.stop() == 0
    job = studio.job(job_id)
    assert job.status == "queued"
    assert [said for said in job.rejections.values() if "crashed twice" in said.reason]


# --- preload ----------------------------------------------------------------------------------------


def test_preloaded_model_is_there_for_its_first_job(tmp_path: Path, studio: LocalStudio) -> None:
    """With `preload` the required model is loaded after READY, the status line says so, and the first job
    does not wait for it.
    """
    (tmp_path / "work").mkdir()
    site = write_configuration(studio, tmp_path / "work")
    override(site, "[worker]\npreload = true\n")
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        await_log(running, "model preloaded")
        (resident,) = status(site)["resident"]
        assert (resident["model"], resident["place"]) == (MODEL_ID, "device")
        task = {"kind": "image", "prompt": prompt("red", "gem", "sky"), "steps": 2}
        job_id = studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(studio))
        await_status(studio, job_id, "done")
        facts = status(site)
        assert running.stop() == 0
    (told,) = facts["last_jobs"]
    assert told["stages_s"]["load"] == 0
    said = f"; loading {MODEL_ID}"
    loading = [index for index, line in enumerate(running.messages) if said in line]
    assert loading
    assert running.messages.index("READY=1") < loading[0]
    assert said not in facts["status"]


def test_job_that_comes_while_models_are_preloaded_goes_first(tmp_path: Path, studio: LocalStudio) -> None:
    """A job that waits already is done after the component at hand, not after all required models."""
    (tmp_path / "work").mkdir()
    site = write_configuration(studio, tmp_path / "work")
    override(site, "[worker]\npreload = true\n")
    job_id = queue_synthetic(studio)  # offered at once, long before torch is imported
    with ServiceProcess(site, tmp_path / "log") as running:
        await_status(studio, job_id, "done")
        assert running.stop() == 0
    messages = [line["message"] for line in running.log_lines()]
    assert "model not preloaded" in messages
    assert "model preloaded" not in messages


# --- status, pause, resume ---------------------------------------------------------------------------


def test_status_answers_before_ready_and_says_what_is_downloaded(site: Path, tmp_path: Path) -> None:
    """While a required model comes, `status` shows how far it is; afterwards it shows that nobody answers."""
    with FileServer() as server:
        held = server.serve("/held.safetensors", b"held" * 100_000, hold_after=200_000)
        require(site, "large", held)
        with ServiceProcess(site, tmp_path / "log") as running:
            running.await_message("STATUS=downloading large: ", READY_S)
            facts = status(site)
            assert facts["phase"] == "provisioning"
            assert re.match(r"downloading large: \d+% of 400 kB", facts["status"])
            held.release()
            running.await_message("READY=1", READY_S)
            assert running.stop() == 0
    done = command(site, "status")
    assert (done.returncode, done.stdout) == (3, "")
    assert f"studio-worker run --config {site}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_status_shows_what_the_service_has_done(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """Registration, session, ended jobs with their stages, outbox, device, starts and crashes are shown."""
    with ServiceProcess(site, tmp_path / "log") as running:
        await_online(studio)
        running.kill()
    with ServiceProcess(site, tmp_path / "log") as running:
        good = queue_synthetic(studio)
        bad = studio.queue_job(
            model="placeholder",
            task={
                "kind": "image",
                "prompt": "a hidden castle",
                "initImageUrl": "ftp://pictures.example/a.png",
            },
            model_source=SYNTHETIC,
        )
        await_status(studio, good, "done")
        await_status(studio, bad, "failed")
        running.await_message("STATUS=ready, connected", READY_S)
        facts = status(site)
        shown = command(site, "status")
        assert running.stop() == 0
    assert (facts["phase"], facts["paused"], facts["job"]) == ("ready", False, None)
    assert facts["registration"] == {
        "state": "approved", "worker_id": studio.workers()[0].worker_id, "detail": None, "is_given": False,
    }  # fmt: skip
    assert facts["session"]["state"] == "connected"
    assert facts["jobs"] == {"done": 1, "failed": 1, "handed_back": 0, "refused": 0, "unconfirmed": 0}
    ends = {job["job_id"]: job for job in facts["last_jobs"]}
    assert ends[good]["stages_s"].keys() == {
        "wait", "files", "prepare", "load", "generate", "encode", "upload",
    }  # fmt: skip
    assert "is not an http(s) URL" in ends[bad]["reason"]
    assert facts["outbox"]["count"] == 0
    assert facts["device"]["name"] == "cpu"
    assert (facts["process"]["starts"], facts["process"]["crashes"]) == (2, 1)
    assert facts["process"]["pid"] == running.process.pid
    assert "a hidden castle" not in json.dumps(facts)
    assert shown.returncode == 0
    for part in (good, "is not an http(s) URL", "approved as", "2 start(s)", "1 crash(es)", studio.base_url):
        assert part in shown.stdout


def test_paused_service_finishes_its_job_and_takes_no_other(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """`pause` lets the job in hand finish, its model leave memory, and no other job begin; `resume` goes on,
    and so does a restart.
    """
    with ServiceProcess(site, tmp_path / "log") as running:
        task = {"kind": "image", "prompt": prompt("red", "gem", "sky"), "width": 128, "height": 128}
        worker_id = await_online(studio)
        first = studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(studio))
        await_status(studio, first, "running")
        paused = command(site, "pause")
        assert (paused.returncode, paused.stdout) == (0, f"paused; job {first} is being finished\n")
        running.await_message("STATUS=ready, connected, paused", READY_S)
        studio.wait_for(lambda: studio.attendance.live[worker_id].is_paused, READY_S)
        second = queue_synthetic(studio)
        await_status(studio, first, "done")
        await_log(running, "components left the device")
        facts = status(site)
        assert (facts["paused"], facts["resident"]) == (True, [])
        assert (studio.job(second).status, studio.job(second).attempts) == ("queued", 0)
        assert command(site, "resume").stdout == "resumed\n"
        await_status(studio, second, "done")
        assert command(site, "pause").stdout == "paused; no job is in hand\n"
        assert running.stop() == 0
    with ServiceProcess(site, tmp_path / "log") as running:
        third = queue_synthetic(studio)
        await_status(studio, third, "done")
        assert status(site)["paused"] is False
        assert running.stop() == 0


def test_lasting_pause_outlasts_a_restart(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """`pause --lasting` holds over a restart, which says so, until `resume` ends it for good."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        assert command(site, "pause", "--lasting").stdout == "paused; no job is in hand\n"
        assert running.stop() == 0
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected, paused", READY_S)
        assert status(site)["paused"] is True
        job_id = queue_synthetic(studio)
        assert command(site, "resume").stdout == "resumed\n"
        await_status(studio, job_id, "done")
        assert running.stop() == 0
    assert "paused since before this start" in [line["message"] for line in running.log_lines()]
    assert not (tmp_path / "work" / "state" / "paused").exists()


# --- ends -------------------------------------------------------------------------------------------


def test_service_deleted_at_the_studio_ends_with_its_own_status(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A worker that was deleted ends with 77, which systemd does not restart, and names the cure."""
    with ServiceProcess(site, tmp_path / "log") as running:
        studio.delete_worker(await_online(studio))
        assert running.wait(READY_S) == 77
    assert "register --reset" in running.log_lines()[-1]["error"]


def test_service_deleted_in_a_job_stops_at_its_next_step(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A picture that nobody would take keeps neither the GPU nor the end waiting; the job is another's."""
    with ServiceProcess(site, tmp_path / "log") as running:
        job_id = studio.queue_job(model=MODEL_ID, task=LONG, model_source=sample_source(studio))
        await_status(studio, job_id, "running")
        studio.delete_worker(studio.workers()[0].worker_id)
        assert running.wait(DONE_S) == 77
    assert studio.job(job_id).status == "queued"
    (failed,) = [line for line in running.log_lines() if line["message"] == "job failed"]
    assert (failed["job_id"], failed["retryable"]) == (job_id, True)


def test_service_without_the_gpu_it_was_asked_for_does_not_start(site: Path, tmp_path: Path) -> None:
    """No GPU, no CPU instead: exit status 69 and what to write into the configuration."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    override(site, '[worker]\ndevice = "auto"\n')
    with ServiceProcess(site, tmp_path / "log") as running:
        assert running.wait(READY_S) == 69
    assert 'device = "cpu"' in running.log_lines()[-1]["error"]


def test_service_does_not_share_its_state_folder(site: Path, tmp_path: Path) -> None:
    """A second service on the same state folder ends with 75 instead of fighting with the first."""
    with ServiceProcess(site, tmp_path / "log") as first:
        first.await_message("READY=1", READY_S)
        with ServiceProcess(site, tmp_path / "log2") as second:
            assert second.wait(READY_S) == 75
        assert "in use by a running service" in second.log_lines()[-1]["error"]
        assert first.stop() == 0


def test_service_that_crashes_says_so_in_its_log(site: Path, tmp_path: Path) -> None:
    """A fault of the program's own, on any thread, is a line like all others: JSON, with its traceback."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(
        "import threading\n"
        "import studio_worker.appliance.preparation as starting\n"
        "def crash(*_):\n"
        "    thread = threading.Thread(target=lambda: 1 / 0, name='helper')\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    raise RuntimeError('a fault')\n"
        "starting.wait_for_device = lambda *_, **__: crash()\n"
    )
    with ServiceProcess(site, tmp_path / "log", {"PYTHONPATH": str(tmp_path / "python")}) as running:
        assert running.wait(READY_S) == 1
    text = running.log_path.read_text()
    told = running.log_lines()
    assert len(told) == len(text.splitlines())
    assert [(line["level"], line["message"]) for line in told[-2:]] == [
        ("CRITICAL", "thread crashed"),
        ("CRITICAL", "service crashed"),
    ]
    assert "ZeroDivisionError" in told[-2]["exc_info"]
    assert "a fault" in told[-1]["exc_info"]


def test_service_with_bad_configuration_ends_with_one_clear_line(site: Path, tmp_path: Path) -> None:
    """An unknown key ends the start with 78; the line names file, key and the nearest known one."""
    override(site, "[worker]\ndevcie = 1\n")
    with ServiceProcess(site, tmp_path / "log") as running:
        assert running.wait(READY_S) == 78
    assert len(running.log_lines()) == 1
    error = running.log_lines()[0]["error"]
    assert "50-test.toml:2: worker.devcie: unknown key; did you mean device?" in error


def test_service_given_its_credentials_asks_nobody(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """With worker id and token from systemd credentials the worker connects without a registration, and
    when the studio takes them no more it is told to renew them.
    """
    given = Registration(
        StudioApi(studio.base_url), IdentityFile(tmp_path / "elsewhere.json"), lambda: CAPABILITIES,
        on_waiting=lambda line: None, stop=threading.Event(), tick_s=0.1,
    ).run()  # fmt: skip
    assert given is not None
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "studio-worker.worker-id").write_text(given.worker_id)
    (folder / "studio-worker.auth-token").write_text(given.auth_token)
    environment = {"CREDENTIALS_DIRECTORY": str(folder)}
    with ServiceProcess(site, tmp_path / "log", environment) as running:
        assert await_online(studio) == given.worker_id
        assert command(site, "register").stdout == f"worker {given.worker_id}, by systemd credentials\n"
        studio.delete_worker(given.worker_id)
        assert running.wait(READY_S) == 77
    assert "give it an approved worker's id and token as" in running.log_lines()[-1]["error"]
    assert "--reset" not in running.log_lines()[-1]["error"]
    assert not (tmp_path / "work" / "state" / "identity.json").exists()
    assert not studio.pending()
    assert given.auth_token not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("damaged", "status", "text"),
    [("identity.json", 78, "register --reset"), ("spool", 74, "File exists")],
)
def test_service_with_damaged_state_says_so_before_it_is_ready(
    site: Path, tmp_path: Path, damaged: str, status: int, text: str
) -> None:
    """What is wrong with the state folder ends the start with one line, not with a traceback."""
    state = tmp_path / "work" / "state"
    state.mkdir(exist_ok=True)
    (state / damaged).write_text("{")
    with ServiceProcess(site, tmp_path / "log") as running:
        assert running.wait(READY_S) == status
    assert not any(line.startswith("READY") for line in running.messages)
    assert text in running.log_lines()[-1]["error"]
    assert "Traceback" not in (tmp_path / "log").read_text()
