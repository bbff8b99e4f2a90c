"""What is asked twice, or of what somebody else has just removed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from studio_worker.local_studio import LocalStudio
from studio_worker.local_studio.rules import QueuedJob
from tests.fakes.machine import SOURCE, WAIT_S, Machine, queue

JOB_ID = "0c6f2d7e-5b0a-4a4e-9f3e-2d1f5a7b8c90"


def order(studio: LocalStudio, **more: Any) -> requests.Response:
    body = {"model": "m", "modelSource": SOURCE, "task": {"prompt": "a red potion", "denoise": 1}} | more
    return requests.post(f"{studio.base_url}/api/jobs", json=body, timeout=WAIT_S)


def test_order_that_is_repeated_is_one_job(studio: LocalStudio) -> None:
    """An order with an id of the client's own may be sent as often as need be; each answer is the same."""
    answers = [order(studio, jobId=JOB_ID) for _ in range(3)]
    assert [(answer.status_code, answer.json()) for answer in answers] == [(201, {"jobId": JOB_ID})] * 3
    assert [job.job_id for job in studio.jobs()] == [JOB_ID]
    assert studio.queue.counts()["queued"] == 1


def test_order_that_is_repeated_at_once_is_one_job(studio: LocalStudio) -> None:
    """So it is where several come at the same moment."""
    with ThreadPoolExecutor(8) as crowd:
        answers = list(crowd.map(lambda _: order(studio, jobId=JOB_ID), range(8)))
    assert [answer.json() for answer in answers] == [{"jobId": JOB_ID}] * 8
    assert len(studio.jobs()) == 1


def test_order_that_is_repeated_after_it_was_made_changes_nothing(studio: LocalStudio) -> None:
    """A repeat that comes late, or after the model was told otherwise, starts nothing anew."""
    studio.register_model("m", SOURCE)
    order(studio, jobId=JOB_ID, modelSource=None)
    machine = Machine(studio).connect()
    machine.take()
    assert machine.upload(JOB_ID).status_code == 200
    studio.register_model("m", SOURCE | {"cliDefaults": {"steps": 9}}, vram_gb_estimate=3.0)
    assert order(studio, jobId=JOB_ID, modelSource=None).status_code == 201
    assert [job.status for job in studio.jobs()] == ["done"]
    assert machine.hears_nothing()
    machine.hang_up()


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"task": {"prompt": "a blue potion", "denoise": 1}},
        {"priority": 1},
        {"submitter": "pia"},
    ],
    ids=["model", "task", "priority", "submitter"],
)
def test_order_with_the_id_of_another_is_refused(studio: LocalStudio, other: dict[str, Any]) -> None:
    """An id that another order has is told, with 409, and the job stays as it is."""
    order(studio, jobId=JOB_ID)
    refused = order(studio, jobId=JOB_ID, **other)
    assert (refused.status_code, refused.json()) == (409, {"error": f"jobId: another order has {JOB_ID}"})
    (job,) = studio.jobs()
    assert (job.model, job.task["prompt"], job.priority, job.submitter) == ("m", "a red potion", 0, "")


def test_order_id_is_a_uuid(studio: LocalStudio) -> None:
    """What is none is refused; one written in another way is the same."""
    for odd in ("", "7", "../../etc/passwd", JOB_ID + "0"):
        refused = order(studio, jobId=odd)
        assert refused.status_code == 400
        assert "jobId" in refused.json()["error"]
    assert order(studio, jobId=JOB_ID.upper()).json() == {"jobId": JOB_ID}
    assert order(studio).json()["jobId"] == str(uuid.UUID(studio.jobs()[0].job_id))


@contextmanager
def deleted_meanwhile(studio: LocalStudio, job_id: str) -> Iterator[None]:
    """Another process removes the job between this one's look and its step."""
    with pytest.MonkeyPatch.context() as patch:
        look = studio.queue.get

        def seen(wanted: str) -> QueuedJob | None:
            found = look(wanted)
            if found is not None and wanted == job_id:
                studio.queue.delete(job_id)
            return found

        patch.setattr(studio.queue, "get", seen)
        yield


@pytest.mark.parametrize(("method", "what"), [("DELETE", ""), ("POST", "/retry")], ids=["delete", "retry"])
def test_job_that_another_process_just_deleted_is_404(studio: LocalStudio, method: str, what: str) -> None:
    """Whoever comes second is told that there is no such job, as a moment later."""
    job_id = queue(studio)
    with deleted_meanwhile(studio, job_id):
        answer = requests.request(method, f"{studio.base_url}/api/jobs/{job_id}{what}", timeout=WAIT_S)
    assert (answer.status_code, answer.json()) == (404, {"error": f"job {job_id} is unknown"})


def test_upload_for_a_job_that_was_just_deleted_is_404(studio: LocalStudio) -> None:
    """A worker whose job goes while its picture comes is told so, and not that the studio made a mistake."""
    machine = Machine(studio).connect()
    job_id = queue(studio)
    machine.take()
    machine.hang_up()  # somebody may delete it now, and its picture is still welcome
    studio.wait_for(lambda: studio.job(job_id).status == "queued")
    with deleted_meanwhile(studio, job_id):
        assert machine.upload(job_id).status_code == 404
