"""What becomes of a job in the local studio: failed, dropped, delivered."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from studio_worker.local_studio import LocalStudio
from tests.fakes.machine import PICTURE, SOURCE, WAIT_S, Machine, queue


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_fail_retryable_tries_until_attempts_are_used_up(studio: LocalStudio, machine: Machine) -> None:
    """A retryable failure queues the job again, until its attempts are used up; then its reason stands."""
    job_id = queue(studio, max_attempts=2)
    for attempt, status in ((1, "queued"), (2, "failed")):
        assert machine.take()["jobId"] == job_id
        machine.say("fail", jobId=job_id, error=f"out of memory {attempt}", retryable=True)
        assert machine.hear() == {"type": "failAck", "jobId": job_id}
        job = studio.job(job_id)
        assert (job.status, job.attempts, job.reason) == (status, attempt, f"out of memory {attempt}")
    machine.beat()


def test_fail_for_good_is_final(studio: LocalStudio, machine: Machine) -> None:
    """A failure that is not retryable ends the job, whatever attempts are left; a person may retry."""
    job_id = queue(studio)
    machine.take()
    machine.say("fail", jobId=job_id, error="unknown engine " + "x" * 9000, retryable=False)
    assert machine.hear()["type"] == "failAck"
    reason = studio.job(job_id).reason or ""
    assert (studio.job(job_id).status, reason[:15], len(reason)) == ("failed", "unknown engine ", 2000)
    machine.beat(job_id="something else")
    studio.retry(job_id)
    assert (studio.job(job_id).status, studio.job(job_id).attempts) == ("queued", 0)
    assert machine.offered()["jobId"] == job_id


def test_drop_releases_the_job_to_others(studio: LocalStudio, machine: Machine) -> None:
    """When a connection ends, its job may go to somebody else at once, and the attempt counts."""
    job_id = queue(studio)
    machine.take()
    machine.hang_up()
    assert (studio.job(job_id).status, studio.job(job_id).attempts) == ("queued", 1)
    other = Machine(studio, name="other").connect()
    assert other.take()["jobId"] == job_id
    assert machine.upload(job_id).status_code == 409
    assert other.upload(job_id).status_code == 200
    assert (studio.job(job_id).completions, studio.job(job_id).refused_uploads) == (1, 1)
    other.hang_up()


def test_drop_uses_attempts_up(studio: LocalStudio) -> None:
    """A job that takes every worker's connection down is not offered for ever."""
    job_id = queue(studio, max_attempts=2)
    machine = Machine(studio)
    for _ in range(2):
        machine.connect().take()
        machine.hang_up()
    assert studio.job(job_id).status == "failed"
    assert studio.job(job_id).reason == "the connection to the worker was lost"
    assert machine.upload(job_id).status_code == 200, "no worker ever said that it cannot be done"


def test_drop_does_not_lose_a_finished_picture(studio: LocalStudio, machine: Machine) -> None:
    """A picture finished after the connection dropped is taken, while nobody else had the job since."""
    job_id = queue(studio)
    machine.take()
    machine.hang_up()
    assert machine.upload(job_id).status_code == 200
    assert studio.job(job_id).status == "done"


def test_drop_and_offered_again_to_the_same_worker(studio: LocalStudio, machine: Machine) -> None:
    """A worker that is offered its own dropped job again may deliver what it has, even before accepting."""
    job_id = queue(studio)
    machine.take()
    machine.hang_up()
    machine.connect()
    assert machine.offered()["jobId"] == job_id
    assert machine.upload(job_id).status_code == 200


def test_upload_is_kept_with_all_facts(studio: LocalStudio, machine: Machine) -> None:
    """A delivered picture is kept with its full prompt, meta data, worker and seconds."""
    job_id = queue(studio)
    machine.take()
    prompt = "a red fox, " * 500
    answer = machine.upload(job_id, prompt=prompt, ext="png", generationMeta='{"seed": 7, "steps": 8}')
    assert answer.status_code == 200
    result = studio.queue.result(job_id)
    assert result is not None
    assert (result.prompt, result.ext, result.worker_id) == (prompt, "png", machine.worker_id)
    assert (result.generation_meta, result.size_bytes) == ({"seed": 7, "steps": 8}, len(PICTURE))
    assert 0 <= result.seconds < WAIT_S
    assert studio.result(job_id) == PICTURE


def test_pictures_lie_in_a_folder(tmp_path: Path, studio: LocalStudio, machine: Machine) -> None:
    """A picture is a file beside the database, named by its job, the owner's alone; it goes with the job."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id, ext="png").status_code == 200
    folder = tmp_path / "pictures"
    (file,) = folder.glob("*-*")
    assert (file.name[:36], file.suffix, file.read_bytes()) == (job_id, ".png", PICTURE)
    assert (folder.stat().st_mode | file.stat().st_mode) & 0o077 == 0
    url = f"{studio.base_url}/api/jobs/{job_id}/result"
    part = requests.get(url, headers={"Range": "bytes=8-11"}, timeout=WAIT_S)
    assert (part.status_code, part.content) == (206, b"WEBP")
    assert requests.delete(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S).status_code == 204
    assert list(folder.glob("*-*")) == []


@pytest.mark.sqlite
def test_pictures_that_no_row_names_go_at_the_start(tmp_path: Path) -> None:
    """What a crash left between a picture and its row is gone after the next start; nothing else is."""
    database = tmp_path / "studio.sqlite3"
    folder = tmp_path / "pictures"
    with LocalStudio(database) as studio:
        machine, job_id = Machine(studio), queue(studio)
        machine.connect().take()
        assert machine.upload(job_id, ext="png").status_code == 200
        studio.add_picture(png())
        machine.hang_up()
    named = {path.name for path in folder.iterdir()}
    assert len(named) == 3  # with the mark of the database
    (folder / f"{job_id}-0123456789abcdef.png").write_bytes(PICTURE)
    (folder / "input-0123456789abcdef.png").write_bytes(png())
    (folder / "my notes.txt").write_text("of a person")
    with LocalStudio(database) as studio:
        assert {path.name for path in folder.iterdir()} == named | {"my notes.txt"}
        assert studio.result(job_id) == PICTURE


def test_pictures_stay_where_the_database_was_taken_away(tmp_path: Path) -> None:
    """A studio that begins anew beside the pictures of an older one removes none of them."""
    picture = tmp_path / "pictures" / "input-0123456789abcdef.png"
    picture.parent.mkdir()
    picture.write_bytes(png())
    for _ in range(2):
        with LocalStudio(tmp_path / "studio.sqlite3"):
            assert picture.read_bytes() == png()


def test_picture_that_was_taken_away_is_told(tmp_path: Path, studio: LocalStudio, machine: Machine) -> None:
    """A file that somebody has removed from the folder is 404 with a sentence, and costs nothing else."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    for file in (tmp_path / "pictures").glob("*-*"):
        file.unlink()
    answer = requests.get(f"{studio.base_url}/api/jobs/{job_id}/result", timeout=WAIT_S)
    assert (answer.status_code, "not in the studio's folder" in answer.json()["error"]) == (404, True)
    assert requests.delete(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S).status_code == 204


def test_upload_counts_once(studio: LocalStudio, machine: Machine) -> None:
    """A job is completed exactly once: a second delivery is refused with 409 and changes nothing."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    assert machine.upload(job_id, b"another").status_code == 409
    assert studio.result(job_id) == PICTURE
    assert (studio.job(job_id).completions, studio.job(job_id).refused_uploads) == (1, 1)


def test_upload_race_completes_once(tmp_path: Path, studio: LocalStudio, machine: Machine) -> None:
    """Of many deliveries of one job at the same moment exactly one is taken."""
    job_id = queue(studio)
    machine.take()
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(machine.upload(job_id).status_code)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 409, 409, 409, 409, 409]
    assert len(list((tmp_path / "pictures").glob("*-*"))) == 1
    assert studio.job(job_id).completions == 1


def test_upload_refusals(studio: LocalStudio, machine: Machine) -> None:
    """Wrong token is 401, unknown job 404, a job that was never this worker's 409, a failed one 409."""
    machine.beat(job_id="something else")
    job_id = queue(studio)
    assert machine.upload(job_id, token="wrong").status_code == 401
    assert machine.upload("unknown").status_code == 404
    assert machine.upload(job_id).status_code == 409
    machine.take()
    machine.say("fail", jobId=job_id, error="x", retryable=False)
    machine.hear()
    assert machine.upload(job_id).status_code == 409


def test_upload_refusal_is_heard_after_a_large_body(studio: LocalStudio, machine: Machine) -> None:
    """A refused delivery reads the status, however large its body was; it never sees a broken pipe."""
    large = b"x" * (8 << 20)
    assert machine.upload("unknown", large).status_code == 404
    assert machine.upload(queue(studio), large, token="wrong").status_code == 401


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ext": "../../x"}, "ext"),
        ({"ext": ""}, "ext"),
        ({"ext": "WEBP"}, "ext"),
        ({"ext": "x" * 9}, "ext"),
        ({"generationMeta": "{"}, "generationMeta"),
        ({"generationMeta": '{"a": NaN}'}, "generationMeta"),
    ],
)
def test_upload_bad_field_is_named(
    studio: LocalStudio, machine: Machine, fields: dict[str, str], named: str
) -> None:
    """A delivery with a wrong field is 400, says which, and leaves the job where it is."""
    job_id = queue(studio)
    machine.take()
    answer = machine.upload(job_id, **fields)
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert studio.job(job_id).status == "running"


def test_upload_needs_a_file(studio: LocalStudio, machine: Machine) -> None:
    """A delivery without a file, with an empty one, or that is no form at all is 400."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id, b"").status_code == 400
    url = f"{machine.api}/workers/{machine.worker_id}/jobs/{job_id}/complete"
    headers = {"Authorization": f"Bearer {machine.token}"}
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    for body, more in ((b"bytes", {}), (b"not a part", multipart), (b"", multipart)):
        answer = requests.post(url, data=body, headers=headers | more, timeout=WAIT_S)
        assert answer.status_code == 400
        assert answer.json()["error"]
    no_file = {"prompt": (None, "p"), "ext": (None, "webp"), "image": (None, "text")}
    assert requests.post(url, files=no_file, headers=headers, timeout=WAIT_S).status_code == 400  # type: ignore[arg-type]
    assert studio.job(job_id).status == "running"


def test_upload_larger_than_the_limit_is_413(
    studio: LocalStudio, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery beyond the limit is refused, and the job stays where it is."""
    monkeypatch.setattr("studio_worker.local_studio.web.bodies.MAX_UPLOAD_BYTES", 2000)
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id, b"x" * 3000).status_code == 413
    assert studio.job(job_id).status == "running"


def test_json_results_come_over_the_session(studio: LocalStudio, machine: Machine) -> None:
    """A text job is completed by completeJson, acknowledged, and followed by the next offer."""
    chat = {"kind": "llm", "messages": [{"role": "user", "content": "hi"}]}
    job_id = studio.queue_job(model="m", task=chat, model_source=SOURCE | {"engine": "llama-cpp"})
    next_id = queue(studio)
    assert machine.take()["task"] == chat
    assert machine.upload(job_id).status_code == 400
    machine.say("completeJson", jobId=job_id, result={"choices": []}, prompt="hi")
    assert machine.hear() == {"type": "completeAck", "jobId": job_id}
    assert machine.hear()["claim"]["jobId"] == next_id
    assert json.loads(studio.result(job_id)) == {"choices": []}
    assert studio.job(job_id).completions == 1


@pytest.mark.parametrize(("kind", "result"), [("image", {}), ("llm", float("nan"))])
def test_json_result_that_cannot_be_is_a_violation(
    studio: LocalStudio, machine: Machine, kind: str, result: Any
) -> None:
    """A picture is delivered by upload, and a JSON result must be JSON; the job goes back to the queue."""
    job_id = queue(studio, task={"kind": kind})
    machine.take()
    machine.say("completeJson", jobId=job_id, result=result)
    assert machine.closing()[1] == 4002
    studio.wait_for(lambda: studio.job(job_id).status == "queued", WAIT_S)
