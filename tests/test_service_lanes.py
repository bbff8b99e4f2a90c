"""Several lanes in one service: to the studio each is a worker of its own, and they share one device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets import Subprotocol
from websockets.sync.client import connect

from studio_worker.demo import sample_source
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.wire import SUBPROTOCOL, Hello, RegisterRequest
from tests.chaos.proxy import ChaosProxy
from tests.fakes.servers import FileServer, ServedFile
from tests.lab.frames import CAPABILITIES
from tests.lab.service import (
    DONE_S,
    LONG,
    READY_S,
    SYNTHETIC,
    await_log,
    await_status,
    command,
    hurried,
    override,
    queue_synthetic,
    status,
)

NAMES = [socket.gethostname(), f"{socket.gethostname()} (lane 2)"]
ENDS = "lane ends, the others go on"
TWO = "[worker]\nlanes = 2\n"


def queue_long(studio: LocalStudio) -> str:
    """Seconds of work, so that the other lane is offered its job meanwhile."""
    task = dict(LONG, width=1536, height=1536)
    return studio.queue_job(model="placeholder", task=task, model_source=SYNTHETIC)


def await_lanes(studio: LocalStudio, count: int = 2) -> dict[str, str]:
    """The ids of the lanes' workers by their names, once their sessions are open."""

    def are_online() -> bool:
        return sum(studio.is_online(worker.worker_id) for worker in studio.workers()) == count

    studio.wait_for(are_online, READY_S)
    return {worker.name: worker.worker_id for worker in studio.workers()}


def running_jobs(studio: LocalStudio, *jobs: str) -> bool:
    return all(studio.job(job_id).status == "running" for job_id in jobs)


@pytest.mark.welcoming_studio
def test_lanes_are_workers_of_their_own_that_share_a_box(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """Two jobs are in hand at once, one of them at the device; all are made, each once, and `status`, the
    journal and `register` say which lane does what.
    """
    override(site, TWO)
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        workers = await_lanes(studio)
        assert sorted(workers) == NAMES
        running.await_message("STATUS=ready, connected", READY_S)
        jobs = [queue_long(studio), queue_long(studio)]
        studio.wait_for(lambda: running_jobs(studio, *jobs), DONE_S)
        facts = status(site)
        assert {lane["job"]["job_id"] for lane in facts["lanes"] if lane["job"]} <= set(jobs)
        assert {lane["registration"]["worker_id"] for lane in facts["lanes"]} == set(workers.values())
        more = [queue_synthetic(studio) for _ in range(6)]
        for job_id in jobs + more:
            await_status(studio, job_id, "done")
        assert {studio.job(job_id).completions for job_id in jobs + more} == {1}
        assert {studio.job(job_id).worker_id for job_id in jobs} == set(workers.values())
        assert "lane 2: approved as worker" in command(site, "register").stdout
        assert running.stop() == 0
    done = [line for line in running.log_lines() if line["message"] == "job done"]
    by_worker = {workers[NAMES[lane - 1]]: lane for lane in (1, 2)}
    assert all(line["lane"] == by_worker[studio.job(line["job_id"]).worker_id] for line in done)
    shipped = studio.logs(workers[NAMES[1]])
    assert shipped
    assert not any("service ready" in line.message for line in shipped)


def test_lanes_are_approved_one_by_one(tmp_path: Path, studio: LocalStudio, site: Path) -> None:
    """READY waits for no approval, and a box works with as many lanes as are approved so far."""
    override(site, TWO)
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        running.await_message("READY=1", READY_S)
        studio.wait_for(lambda: len(studio.pending()) == 2, READY_S)
        first = next(each for each in studio.pending() if each.capabilities.machine_name == NAMES[0])
        studio.approve(first.request_id)
        running.await_message("STATUS=ready, 1 of 2 lanes connected; lane 2: waiting for approval", DONE_S)
        job_id = queue_synthetic(studio)
        await_status(studio, job_id, "done")
        assert running.stop() == 0


@pytest.mark.welcoming_studio
def test_lane_that_is_deleted_ends_alone_and_the_last_one_ends_the_service(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """One lane deleted at the studio: a line says so, the other makes its jobs. Both deleted: exit 77."""
    override(site, TWO)
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        workers = await_lanes(studio)
        studio.delete_worker(workers[NAMES[1]])
        running.await_message("STATUS=ready, 1 of 2 lanes connected; lane 2: ended: ", READY_S)
        jobs = [queue_synthetic(studio) for _ in range(3)]
        for job_id in jobs:
            await_status(studio, job_id, "done")
        shown = command(site, "register").stdout
        assert f"lane 2: approved as worker {workers[NAMES[1]]}; ended: this worker was deleted" in shown
        studio.delete_worker(workers[NAMES[0]])
        assert running.wait(READY_S) == 77
    (line,) = [line for line in running.log_lines() if line["message"] == "lane ends, the others go on"]
    assert line["lane"] == 2
    assert "deleted at the studio" in line["error"]
    assert "register --reset --lane 2, then" in line["error"]  # which forgets the other lane not
    last = running.log_lines()[-1]["error"]
    assert "register --reset --lane 1, then" in last
    assert last.endswith(
        "; and for the lanes that ended before: lane 2: studio-worker register --reset --lane 2"
    )


def ended_lanes(running: ServiceProcess) -> dict[int, str]:
    """By lane, what was said when it ended."""
    lines = [line for line in running.log_lines() if line["message"] == ENDS]
    assert len({line["lane"] for line in lines}) == len(lines), "it was said twice"
    return {line["lane"]: line["error"] for line in lines}


def identity_of(folder: Path, lane: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "work" / "state" / f"identity-{lane}.json").read_text())
    return found


def register_again(studio: LocalStudio, install_id: str) -> None:
    """As somebody with a copy of that lane's identity would: its token is another one from then on."""
    asked = RegisterRequest(
        install_id=install_id,
        registration_secret_hash=hashlib.sha256(b"secret").hexdigest(),
        capabilities=CAPABILITIES,
        user_agent="a copy",
    )
    studio.approve(StudioApi(studio.base_url).register(asked).request_id)


@contextlib.contextmanager
def copy_of(studio: LocalStudio, identity: dict[str, str]) -> Iterator[None]:
    """A session elsewhere with this lane's identity."""
    url = StudioApi(studio.base_url).session_url(identity["worker_id"])
    token = identity["auth_token"]
    headers = {"Authorization": f"Bearer {token}"}
    with connect(url, additional_headers=headers, subprotocols=[Subprotocol(SUBPROTOCOL)]) as copy:
        copy.send(Hello(auth_token=token, capabilities=CAPABILITIES).to_json())
        yield


def test_lane_that_the_studio_refuses_ends_alone_and_is_back_when_that_is_mended(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """Of four lanes one is rejected, one's token is refused, one's worker connects from elsewhere: each ends
    alone, with one line that says why and what helps. `status` and `doctor` show it, jobs are made by the
    lane that is left; mended, and started again, all four are there.
    """
    override(site, "[worker]\nlanes = 4\n")
    environment = hurried(tmp_path, 30.0)
    with ServiceProcess(site, tmp_path / "log", environment) as running:
        studio.wait_for(lambda: len(studio.pending()) == 4, READY_S)
        for each in studio.pending():
            if each.capabilities.machine_name.endswith("(lane 2)"):
                studio.reject(each.request_id, "not this one")
            else:
                studio.approve(each.request_id)
        await_lanes(studio, 3)
        register_again(studio, identity_of(tmp_path, 3)["install_id"])
        with copy_of(studio, identity_of(tmp_path, 4)):
            await_log(running, ENDS, 3)
            said = ended_lanes(running)
            assert "rejected this worker's registration (not this one)" in said[2]
            assert "does not accept this worker's token" in said[3]
            assert "another process is connected as this worker" in said[4]
            assert all(f"register --reset --lane {lane}" in said[lane] for lane in said)
            facts = status(site)
            assert [lane["registration"]["state"] for lane in facts["lanes"]] == ["approved", *["ended"] * 3]
            assert [lane["registration"]["detail"] for lane in facts["lanes"][1:]] == [
                said[2],
                said[3],
                said[4],
            ]
            told = command(site, "doctor").stdout
            assert "lane 2, 3, 4 ended" in told
            jobs = [queue_synthetic(studio) for _ in range(3)]
            for job_id in jobs:
                await_status(studio, job_id, "done")
        assert len(ended_lanes(running)) == 3
        assert running.stop() == 0
    for lane in ("2", "3"):
        assert command(site, "register", "--reset", "--lane", lane).returncode == 0
    with ServiceProcess(site, tmp_path / "again", environment) as running:
        studio.wait_for(lambda: len(studio.pending()) == 2, READY_S)
        for each in studio.pending():
            studio.approve(each.request_id)
        running.await_message("STATUS=ready, connected", READY_S)
        assert running.stop() == 0


@pytest.mark.welcoming_studio
def test_stop_finishes_the_jobs_of_all_lanes_and_a_second_signal_hands_them_back(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """The first signal waits for what every lane has in hand; the second gives all of it back at once."""
    override(site, TWO)
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        await_lanes(studio)
        jobs = [queue_long(studio), queue_long(studio)]
        studio.wait_for(lambda: running_jobs(studio, *jobs), DONE_S)
        assert running.stop(DONE_S) == 0
    assert {studio.job(job_id).status for job_id in jobs} == {"done"}
    with ServiceProcess(site, tmp_path / "second", hurried(tmp_path, 30.0)) as running:
        await_lanes(studio)
        jobs = [studio.queue_job(model="m", task=LONG, model_source=sample_source(studio)) for _ in "ab"]
        studio.wait_for(lambda: running_jobs(studio, *jobs), DONE_S)
        running.signal(signal.SIGTERM)
        await_log(running, "stop requested")
        running.signal(signal.SIGTERM)
        assert running.wait(READY_S) == 0
    assert {studio.job(job_id).status for job_id in jobs} == {"queued"}
    ended = [line for line in running.log_lines() if line["message"] == "job failed"]
    assert {line["lane"] for line in ended} == {1, 2}


@pytest.mark.welcoming_studio
def test_fewer_lanes_keep_the_identities_of_the_others(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """A box that goes down to one lane and back up is known to its studio as before."""
    override(site, TWO)
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        before = await_lanes(studio)
        assert running.stop() == 0
    override(site, "")
    with ServiceProcess(site, tmp_path / "one", hurried(tmp_path, 30.0)) as running:
        assert await_lanes(studio, 1).keys() == before.keys()
        assert running.stop() == 0
    assert not any("lane" in line for line in running.log_lines())
    override(site, TWO)
    with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
        assert await_lanes(studio) == before
        assert running.stop() == 0
    identity = json.loads((tmp_path / "work" / "state" / "identity-2.json").read_text())
    assert identity["worker_id"] == before[NAMES[1]]


def file_entry(file: ServedFile) -> dict[str, str]:
    return {"role": "model", "url": file.url, "filename": "m.safetensors", "sha256": file.sha256}


def queue_on_demand(studio: LocalStudio, file: ServedFile) -> str:
    """A job that brings a model's file, which is fetched and then no further looked at."""
    return studio.queue_job(
        model="on demand",
        task={"kind": "image", "prompt": "a castle"},
        model_source={**SYNTHETIC, "files": [file_entry(file)]},
    )


@pytest.mark.welcoming_studio
def test_download_for_one_lane_holds_up_no_other(tmp_path: Path, studio: LocalStudio, site: Path) -> None:
    """While a model comes for one job, the other lane's jobs are made; two jobs that want it share it."""
    override(site, TWO)
    with FileServer() as server:
        file = server.serve("/m.safetensors", b"m" * 10_000, hold_after=100)
        waiting = [queue_on_demand(studio, file)]
        with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
            await_lanes(studio)
            assert file.held.wait(READY_S)
            for job_id in [queue_synthetic(studio) for _ in range(3)]:
                await_status(studio, job_id, "done")
            waiting.append(queue_on_demand(studio, file))
            studio.wait_for(lambda: running_jobs(studio, *waiting), DONE_S)
            file.release()
            for job_id in waiting:
                await_status(studio, job_id, "done")
            assert running.stop() == 0
        assert len(file.requests) == 1


@pytest.mark.welcoming_studio
def test_lanes_fetch_nothing_before_a_job_wants_it(tmp_path: Path, studio: LocalStudio, site: Path) -> None:
    """Lanes that wait, and jobs that are only queued, fetch nothing: a model comes when its job is taken."""
    override(site, TWO)
    with FileServer() as server:
        held = [server.serve(f"/{name}/m.safetensors", name.encode() * 5000, hold_after=100) for name in "ab"]
        later, unwanted = (server.serve(f"/{name}/m.safetensors", name.encode() * 5000) for name in "cd")
        statuses: list[str] = []
        later.on_request = lambda _: statuses.append(studio.job(waiting).status)
        registered = {**SYNTHETIC, "files": [file_entry(unwanted)]}
        studio.register_model("unwanted", registered, label="of which nobody wants a picture")
        with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
            await_lanes(studio)
            jobs = [queue_on_demand(studio, file) for file in held]
            studio.wait_for(lambda: running_jobs(studio, *jobs), DONE_S)
            waiting = queue_on_demand(studio, later)
            for file in held:
                assert file.held.wait(READY_S)
                file.release()
            for job_id in (*jobs, waiting):
                await_status(studio, job_id, "done")
            assert running.stop() == 0
        assert statuses == ["running"]
        assert [len(file.requests) for file in (*held, later, unwanted)] == [1, 1, 1, 0]


@pytest.mark.welcoming_studio
def test_each_lane_speaks_as_a_worker_does(tmp_path: Path, studio: LocalStudio, site: Path) -> None:
    """A studio hears of two lanes what it hears of two workers: one hello each and nothing before welcome,
    an answer to each offer, one upload for each job, and no session that it has to end.
    """
    with ChaosProxy(studio.port) as proxy:
        override(site, f'{TWO}[studio]\napi_base_url = "{proxy.url}"\n')
        with ServiceProcess(site, tmp_path / "log", hurried(tmp_path, 30.0)) as running:
            await_lanes(studio)
            for job_id in [queue_synthetic(studio) for _ in range(8)]:
                await_status(studio, job_id, "done")
            assert running.stop() == 0
        assert proxy.violations == []
        counts = proxy.counts
        assert (counts["hello"], counts["welcome"], counts["accept"], counts["upload"]) == (2, 2, 8, 8)
        assert counts["offer"] == counts["accept"] + counts["reject"]
