"""The local studio as people and scripts meet it: the page, ``/api``, files, tokens, mistakes."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from sqlalchemy import text

from studio_worker.errors import ConfigError
from studio_worker.jobs import MAX_PROMPT_BYTES
from studio_worker.local_studio import Door, LocalStudio, Places, run_local_studio
from tests.fakes.machine import PICTURE, SOURCE, WAIT_S, Machine, queue

TOKEN = "a token of sufficient length"
MODEL_BYTES = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "models"
    folder.mkdir()
    (folder / "tiny.safetensors").write_bytes(MODEL_BYTES)
    (folder / "folder").mkdir()
    (folder.parent / "secret.txt").write_text("not to be served")
    return folder


@pytest.fixture
def studio(tmp_path: Path, models_dir: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "studio.sqlite3", models_dir=models_dir) as running:
        yield running


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[LocalStudio]:
    """One studio for all tests that do not mind what others left in it."""
    database = tmp_path_factory.mktemp("studio") / "studio.sqlite3"
    with LocalStudio(database, models_dir=models_dir) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[LocalStudio]:
    """A studio with a token."""
    database = tmp_path_factory.mktemp("studio") / "studio.sqlite3"
    with LocalStudio(database, door=Door(token=TOKEN), models_dir=models_dir) as running:
        yield running


def ask(studio: LocalStudio, method: str, path: str, **more: Any) -> requests.Response:
    return requests.request(method, studio.base_url + path, timeout=WAIT_S, allow_redirects=False, **more)


def picture(media: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "orange").save(buffer, media)
    return buffer.getvalue()


# --- the page ---------------------------------------------------------------------------------------


def test_page_and_its_parts_are_served(anywhere: LocalStudio) -> None:
    """The page and everything it names come from this studio, under a policy that allows nothing else."""
    page = ask(anywhere, "GET", "/")
    assert page.status_code == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    for part in ("style.css", "app.js", "dom.js", "form.js", "pictures.js", "icon.svg"):
        assert ask(anywhere, "GET", f"/page/{part}").status_code == 200
    assert "https://" not in page.text
    assert ask(anywhere, "GET", "/page/nothing.js").status_code == 404
    assert ask(anywhere, "GET", "/nothing").json() == {"error": "Not Found"}


def test_events_tell_of_every_change(studio: LocalStudio) -> None:
    """The event stream speaks at once, and again when something changes."""
    with requests.get(f"{studio.base_url}/api/events", stream=True, timeout=WAIT_S) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        data = (line[6:] for line in answer.iter_lines(chunk_size=1) if line.startswith(b"data: "))
        first = int(next(data))
        queue(studio)
        assert int(next(data)) > first


def test_state_shows_machines_workers_and_jobs(studio: LocalStudio) -> None:
    """One call tells who asks, who works, on what, and what waits or failed."""
    waiting = Machine(studio, name="newcomer", approve=False)
    machine = Machine(studio, name="attic").connect()
    job_id = queue(studio)
    queue(studio)
    machine.take()
    machine.beat(job_id=job_id)
    state = ask(studio, "GET", "/api/state").json()
    (asking,) = state["registrations"]
    assert (asking["requestId"], asking["machineName"]) == (waiting.request_id, "newcomer")
    (worker,) = state["workers"]
    assert (worker["name"], worker["state"], worker["online"]) == ("attic", "working", True)
    assert worker["currentJob"]["jobId"] == worker["currentJobId"] == job_id
    assert worker["capabilities"]["vramTotalGb"] == 24.0
    assert worker["lastHeartbeatAt"].endswith("Z")
    assert state["queue"] == {"queued": 1, "offered": 0, "running": 1, "done": 0, "failed": 0}
    assert [job["status"] for job in state["active"]] == ["running", "queued"]
    machine.hang_up()
    assert ask(studio, "GET", "/api/state").json()["workers"][0]["state"] == "offline"


def test_state_tells_idle_from_paused(studio: LocalStudio) -> None:
    """A worker that takes no jobs is shown as paused."""
    machine = Machine(studio).connect()
    for auto_enabled, state in ((True, "idle"), (False, "paused")):
        machine.beat(autoEnabled=auto_enabled)
        assert ask(studio, "GET", "/api/state").json()["workers"][0]["state"] == state
    machine.hang_up()


def test_page_asks_the_database_as_often_for_many_as_for_one(
    studio: LocalStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hundreds of workers and pictures the page costs the database no more questions than with one."""
    questions, here = [0], threading.get_ident()
    reading = studio.database.reading

    def counted() -> Any:
        questions[0] += threading.get_ident() == here  # others ask in the background
        return reading()

    def shown() -> tuple[set[str], set[str], int]:
        connected, questions[0] = studio.presence.connected(), 0
        workers = studio.views.workers(studio.workers(), connected)
        jobs = studio.views.jobs(studio.queue.listed(), {}, connected)
        urls = {job["result"]["url"] for job in jobs if job["result"]}
        return {each["currentJob"]["jobId"] for each in workers if each["currentJob"]}, urls, questions[0]

    monkeypatch.setattr(studio.database, "reading", counted)
    made, held, asked = set(), set(), set()
    for _ in range(3):
        worker_id = Machine(studio).worker_id
        done, in_hand = queue(studio), queue(studio)
        studio.queue.take_next(worker_id)
        studio.queue.accept(done, worker_id)
        studio.queue.deliver(done, worker_id, io.BytesIO(PICTURE), ext="webp", prompt=None)
        studio.queue.take_next(worker_id)
        made.add(f"/api/jobs/{done}/result")
        held.add(in_hand)
        *found, often = shown()
        assert found == [held, made]
        asked.add(often)
    assert len(asked) == 1


# --- workers ----------------------------------------------------------------------------------------


def test_registrations_are_decided_by_people(anywhere: LocalStudio) -> None:
    """Approve and reject work once; what is unknown or decided is told apart."""
    first, second = Machine(anywhere, approve=False), Machine(anywhere, approve=False)
    path = f"/api/registrations/{first.request_id}/approve"
    assert ask(anywhere, "POST", path).json()["workerId"]
    assert ask(anywhere, "POST", path).status_code == 409
    path = f"/api/registrations/{second.request_id}/reject"
    assert ask(anywhere, "POST", path, json={"reason": "no"}).status_code == 200
    assert ask(anywhere, "POST", path).status_code == 409
    assert second.poll().json() == {"status": "rejected", "reason": "no"}
    for decision in ("approve", "reject"):
        assert ask(anywhere, "POST", f"/api/registrations/unknown/{decision}").status_code == 404


def test_workers_can_be_deleted(anywhere: LocalStudio) -> None:
    """Deleting a worker ends its session with 4004; deleting it again finds nothing."""
    machine = Machine(anywhere).connect()
    path = f"/api/workers/{machine.worker_id}"
    assert ask(anywhere, "DELETE", path).status_code == 204
    assert machine.closing()[1] == 4004
    assert ask(anywhere, "DELETE", path).status_code == 404


def test_logs_are_shown(studio: LocalStudio) -> None:
    """Shipped lines can be read, with the name of their worker."""
    machine = Machine(studio, name="attic").connect()
    line = {"ts": "2026-01-01T00:00:00Z", "level": "warn", "category": "engine", "message": "<b>slow</b>"}
    machine.say("logBatch", entries=[line | {"jobId": "j"}])
    machine.beat()
    (shown,) = ask(studio, "GET", f"/api/logs?worker={machine.worker_id}&limit=5").json()["lines"]
    assert shown == line | {"jobId": "j", "worker": "attic", "workerId": machine.worker_id}
    machine.hang_up()


# --- jobs -------------------------------------------------------------------------------------------


def test_jobs_go_from_the_form_to_the_gallery(studio: LocalStudio) -> None:
    """A job queued by the API is made by a worker and can be looked at and downloaded."""
    machine = Machine(studio, name="attic").connect()
    body = {"model": "m", "task": {"prompt": "a fox", "seed": 3}, "modelSource": SOURCE, "maxAttempts": 5}
    queued = ask(studio, "POST", "/api/jobs", json=body)
    assert queued.status_code == 201
    job_id = queued.json()["jobId"]
    path = f"/api/jobs/{job_id}"
    assert ask(studio, "GET", f"{path}/result").status_code == 404
    assert machine.take()["jobId"] == job_id
    assert machine.upload(job_id, generationMeta='{"seed": 3}').status_code == 200
    job = ask(studio, "GET", path).json()
    assert (job["status"], job["attempts"], job["maxAttempts"]) == ("done", 1, 5)
    assert (job["worker"], job["generationMeta"], job["completions"]) == ("attic", {"seed": 3}, 1)
    assert (job["result"]["prompt"], job["result"]["ext"]) == ("a red fox", "webp")
    assert job["createdAt"] <= job["startedAt"] <= job["finishedAt"]
    assert ask(studio, "GET", "/api/jobs?status=done").json()["jobs"] == [job]
    answer = ask(studio, "GET", job["result"]["url"])
    assert answer.content == PICTURE
    assert answer.headers["Content-Type"] == "image/webp"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert f'filename="{job_id}.webp"' in answer.headers["Content-Disposition"]
    machine.hang_up()


def test_jobs_say_for_whom_and_how_urgent(studio: LocalStudio) -> None:
    """Who queued a job, and its priority, are taken by the API and shown; the queue is shown in its order."""
    body = {"model": "m", "task": {"prompt": "a fox"}, "modelSource": SOURCE}
    for more in ({}, {"submitter": "pia"}, {"submitter": "quin", "priority": 7}):
        assert ask(studio, "POST", "/api/jobs", json=body | more).status_code == 201
    jobs = ask(studio, "GET", "/api/state").json()["active"]
    assert [(job["submitter"], job["priority"]) for job in jobs] == [("quin", 7), ("", 0), ("pia", 0)]


def test_jobs_strange_extensions_are_only_bytes(studio: LocalStudio) -> None:
    """A result that a browser could run as a page is served as bytes."""
    machine = Machine(studio).connect()
    for ext in ("html", "svg", "js"):
        job_id = queue(studio)
        machine.take()
        machine.upload(job_id, b"<script>alert(1)</script>", ext=ext)
        answer = ask(studio, "GET", f"/api/jobs/{job_id}/result")
        assert answer.headers["Content-Type"] == "application/octet-stream"
    machine.hang_up()


def test_jobs_can_be_deleted_unless_a_worker_holds_them(studio: LocalStudio) -> None:
    """A queued job can be taken out, a finished or failed one with its result; one that is begun cannot."""
    machine = Machine(studio).connect()
    job_id, other = queue(studio), queue(studio)
    machine.take()
    machine.beat(job_id=job_id)
    assert ask(studio, "DELETE", f"/api/jobs/{job_id}").status_code == 409
    assert ask(studio, "DELETE", f"/api/jobs/{other}").status_code == 204
    assert ask(studio, "DELETE", f"/api/jobs/{other}").status_code == 404
    machine.upload(job_id)
    assert ask(studio, "GET", f"/api/jobs/{job_id}/result").status_code == 200
    assert ask(studio, "DELETE", f"/api/jobs/{job_id}").status_code == 204
    assert ask(studio, "GET", f"/api/jobs/{job_id}/result").status_code == 404
    failing = queue(studio)
    machine.take()
    machine.say("fail", jobId=failing, error="no such engine", retryable=False)
    machine.hear()
    assert ask(studio, "DELETE", f"/api/jobs/{failing}").status_code == 204
    state = ask(studio, "GET", "/api/state").json()
    assert (state["failed"], state["queue"]["done"], state["queue"]["failed"]) == ([], 0, 0)
    machine.hang_up()


def test_jobs_can_be_retried_when_failed(studio: LocalStudio) -> None:
    """A failed job shows its reason and can be queued again; others cannot."""
    machine = Machine(studio).connect()
    job_id = queue(studio)
    path = f"/api/jobs/{job_id}/retry"
    assert ask(studio, "POST", path).status_code == 409
    machine.take()
    machine.say("fail", jobId=job_id, error="no such engine", retryable=False)
    machine.hear()
    (failed,) = ask(studio, "GET", "/api/state").json()["failed"]
    assert (failed["jobId"], failed["reason"]) == (job_id, "no such engine")
    assert ask(studio, "POST", path).json()["status"] == "queued"
    assert ask(studio, "POST", "/api/jobs/unknown/retry").status_code == 404
    machine.hang_up()


def test_jobs_say_that_nobody_is_there(anywhere: LocalStudio) -> None:
    """A job that waits because no worker is connected says so."""
    job_id = queue(anywhere)
    assert ask(anywhere, "GET", f"/api/jobs/{job_id}").json()["waitingFor"] == "no worker is connected"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": "unregistered", "modelSource": None}, "not registered"),
        ({"task": "fox"}, "task"),
        ({"task": {}}, "prompt"),
        ({"task": {"prompt": "x", "denoise": 2}}, "denoise"),
        ({"task": {"prompt": "x", "width": "wide"}}, "width"),
        ({"task": {"prompt": "x", "ext": "../x"}}, "ext"),
        ({"task": {"kind": "sculpture"}}, "kind"),
        ({"modelSource": {}}, "engine"),
        (
            {"modelSource": {"engine": "x", "files": [{"role": "vae", "url": "u", "filename": "../x"}]}},
            "filename",
        ),
        ({"maxAttempts": 0}, "maxAttempts"),
        ({"vramGbEstimate": -1}, "vramGbEstimate"),
        ({"priority": 101}, "priority"),
        ({"submitter": "x" * 101}, "submitter"),
        ({"task": {"prompt": "x" * (MAX_PROMPT_BYTES + 1)}}, "prompt"),
        ({"task": {"prompt": "x", "negativePrompt": "é" * (MAX_PROMPT_BYTES // 2) + "x"}}, "negativePrompt"),
    ],
)
def test_jobs_bad_field_is_named(anywhere: LocalStudio, change: dict[str, Any], named: str) -> None:
    """A job that could not be done is refused when it is queued, with the field that is wrong."""
    body = {"model": "m", "task": {"prompt": "x"}, "modelSource": SOURCE} | change
    answer = ask(anywhere, "POST", "/api/jobs", json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]


@pytest.mark.parametrize("prompt", ["", "x" * MAX_PROMPT_BYTES], ids=["empty", "longest"])
def test_jobs_take_every_prompt_that_workers_take(anywhere: LocalStudio, prompt: str) -> None:
    """No prompt is refused that a worker reads: a background is taken away without any word."""
    body = {"model": "m", "task": {"prompt": prompt}, "modelSource": SOURCE}
    assert ask(anywhere, "POST", "/api/jobs", json=body).status_code == 201


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/jobs", b"{", 400),
        ("POST", "/api/jobs", b"", 400),
        ("POST", "/api/jobs", b'{"model": "m", "task": {"prompt": "\\ud800"}}', 400),
        ("POST", "/api/jobs", b'{"model": "m", "task": {"prompt": "x", "seed": 1e999}}', 400),
        ("POST", "/api/jobs", b'{"a": ' + b"1" * 5000 + b"}", 400),
        ("POST", "/api/jobs", b'"' + b"x" * (1 << 20) + b'"', 413),
        ("PUT", "/api/models/x", b"[]", 400),
        ("PUT", "/api/models/" + "x" * 201, b'{"modelSource": {"engine": "x"}}', 400),
        ("GET", "/api/jobs?status=lost", b"", 400),
        ("GET", "/api/jobs?limit=0", b"", 400),
        ("GET", "/api/jobs?limit=many", b"", 400),
        ("GET", "/api/jobs?limit=" + "9" * 5000, b"", 400),
        ("GET", "/api/logs?limit=-1", b"", 400),
        ("GET", "/api/jobs/unknown", b"", 404),
        ("GET", "/api/jobs/%00%ff", b"", 404),
        ("GET", "/files/unknown", b"", 404),
        ("POST", "/api/files", b"not a picture", 400),
        ("POST", "/api/files", b"", 400),
        ("POST", "/api/state", b"", 405),
        ("DELETE", "/api/models/unknown", b"", 404),
    ],
)
def test_api_answers_bad_input_clearly(
    anywhere: LocalStudio, method: str, path: str, body: bytes, status: int
) -> None:
    """Bad input of every kind gets a 4xx with a sentence."""
    answer = ask(anywhere, method, path, data=body)
    assert answer.status_code == status
    assert answer.json()["error"]


# --- models and pictures ----------------------------------------------------------------------------


def test_models_of_a_new_studio_work_at_once(anywhere: LocalStudio) -> None:
    """A new studio offers placeholder pictures, so that the way can be tried without any model."""
    job_id = anywhere.queue_job(model="placeholder", task={"prompt": "x"})
    assert anywhere.job(job_id).model_source["engine"] == "synthetic"


def test_models_are_registered_replaced_and_forgotten(anywhere: LocalStudio) -> None:
    """The registry keeps label, source and estimate, and jobs take them by the model's id."""
    source = {"engine": "sd-cpp", "files": [{"role": "vae", "url": "/models/a.bin", "filename": "a.bin"}]}
    path = "/api/models/sd-cpp:tiny/v1"
    for label in ("first", "second"):
        body = {"label": label, "modelSource": source, "vramGbEstimate": 3.5}
        assert ask(anywhere, "PUT", path, json=body).status_code == 200
    listed = {entry["id"]: entry for entry in ask(anywhere, "GET", "/api/models").json()["models"]}
    assert listed["sd-cpp:tiny/v1"]["label"] == "second"
    job = anywhere.job(anywhere.queue_job(model="sd-cpp:tiny/v1", task={"prompt": "x"}))
    assert (job.model_source, job.vram_gb_estimate) == (source, 3.5)
    assert ask(anywhere, "DELETE", path).status_code == 204
    with pytest.raises(ValueError, match="not registered"):
        anywhere.queue_job(model="sd-cpp:tiny/v1", task={"prompt": "x"})


def test_addresses_in_an_offer_are_complete(studio: LocalStudio) -> None:
    """Pictures and model files of this studio reach the worker as addresses that it can fetch as they are."""
    stored = ask(studio, "POST", "/api/files", data=picture()).json()
    source = SOURCE | {"files": [{"role": "model", "url": "/models/tiny.safetensors", "filename": "t"}]}
    task = {"prompt": "x", "initImageUrl": stored["path"], "maskUrl": "https://elsewhere/mask.png"}
    studio.queue_job(model="m", task=task, model_source=source)
    machine = Machine(studio).connect()
    claim = machine.take()
    assert claim["task"]["maskUrl"] == "https://elsewhere/mask.png"
    assert requests.get(claim["task"]["initImageUrl"], timeout=WAIT_S).content == picture()
    assert requests.get(claim["modelSource"]["files"][0]["url"], timeout=WAIT_S).content == MODEL_BYTES
    machine.hang_up()


def test_input_of_this_studio_is_known_by_any_of_its_names(studio: LocalStudio) -> None:
    """A script may name an input by path or address, whichever process, name or proxy the address is of: a
    worker gets it under the name by which it knows the studio. What only looks like one stays as it is.
    """
    stored = ask(studio, "POST", "/api/files", data=picture()).json()
    machine = Machine(studio).connect()
    own = ("{path}", "{url}", "http://10.0.0.7:8751{path}", "HTTPS://Studio.Example/below{path}")
    foreign = (
        "https://example.org/files/unknown",
        "https://example.org{path}?x",
        "https://example.org{path}.png",
    )
    for said in (address.format(**stored) for address in own + foreign):
        task = {"prompt": "x", "initImageUrl": said}
        queued = ask(studio, "POST", "/api/jobs", json={"model": "m", "task": task, "modelSource": SOURCE})
        claim = machine.take()
        is_own = said.endswith(stored["path"])
        assert claim["task"]["initImageUrl"] == (stored["url"] if is_own else said)
        assert machine.upload(queued.json()["jobId"]).status_code == 200
    machine.hang_up()


@pytest.mark.parametrize("media", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_are_kept_as_what_they_are(anywhere: LocalStudio, media: str) -> None:
    """An input picture may come bare or in a form; its type is judged by its content."""
    content = picture(media)
    bare = ask(anywhere, "POST", "/api/files", data=content, headers={"Content-Type": "text/html"})
    form = ask(anywhere, "POST", "/api/files", files={"file": ("x.html", content, "text/html")})
    for stored in (bare, form):
        assert stored.status_code == 201
        answer = requests.get(stored.json()["url"], timeout=WAIT_S)
        assert (answer.content, answer.headers["Content-Type"]) == (content, f"image/{media.lower()}")
    assert ask(anywhere, "POST", "/api/files", files={"other": b"x"}).status_code == 400


def test_pictures_larger_than_the_limit_are_413(
    anywhere: LocalStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input picture beyond the limit is refused, bare or in a form."""
    monkeypatch.setattr("studio_worker.local_studio.web.bodies.MAX_PICTURE_BYTES", 1000)
    assert ask(anywhere, "POST", "/api/files", data=b"x" * 1001).status_code == 413
    assert ask(anywhere, "POST", "/api/files", files={"file": b"x" * 1001}).status_code == 413


# --- model files ------------------------------------------------------------------------------------

TINY = "/models/tiny.safetensors"


def test_model_files_are_served_whole(anywhere: LocalStudio) -> None:
    """A model file comes with its size, an ETag and a date; HEAD tells the same without the bytes."""
    whole, head = ask(anywhere, "GET", TINY), ask(anywhere, "HEAD", TINY)
    assert whole.content == MODEL_BYTES
    for answer in (whole, head):
        assert answer.headers["Content-Length"] == str(len(MODEL_BYTES))
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["ETag"]
        assert answer.headers["Last-Modified"]
    assert head.content == b""


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-9", 0, 9),
        ("bytes=100-", 100, 10239),
        ("bytes=-5", 10235, 10239),
        ("bytes=10000-99999", 10000, 10239),
    ],
)
def test_model_files_are_served_by_range(anywhere: LocalStudio, asked: str, first: int, last: int) -> None:
    """A download that broke off goes on where it stopped."""
    answer = ask(anywhere, "GET", TINY, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(MODEL_BYTES)}"
    assert answer.content == MODEL_BYTES[first : last + 1]


def test_model_files_range_beyond_the_end_is_416(anywhere: LocalStudio) -> None:
    """A range that begins past the end is refused with the real size."""
    answer = ask(anywhere, "GET", TINY, headers={"Range": f"bytes={len(MODEL_BYTES)}-"})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"].endswith(f"*/{len(MODEL_BYTES)}")


def test_model_files_if_range_decides(anywhere: LocalStudio) -> None:
    """A range of a file that changed since brings the whole file, not a mixture."""
    known = ask(anywhere, "HEAD", TINY).headers
    part = {"Range": "bytes=5-9"}
    for same in (known["ETag"], known["Last-Modified"]):
        assert ask(anywhere, "GET", TINY, headers=part | {"If-Range": same}).status_code == 206
    for other in ('"another"', formatdate(0, usegmt=True)):
        assert ask(anywhere, "GET", TINY, headers=part | {"If-Range": other}).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["..%2Fsecret.txt", "%2e%2e%2fsecret.txt", "..", "%2e%2e", "folder", "x%00", "..%5Csecret.txt", "none"],
)
def test_model_files_stay_in_their_folder(anywhere: LocalStudio, name: str) -> None:
    """No name leads out of the models folder, or to anything but a file."""
    with socket.create_connection(("127.0.0.1", anywhere.port), timeout=WAIT_S) as raw:
        raw.sendall(f"GET /models/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"not to be served" not in answer


# --- who may ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:80", "[::1", "10.0.0.1"]
)
def test_host_must_be_loopback(anywhere: LocalStudio, host: str) -> None:
    """Without a token, a name that is not loopback's is refused: a web page may have rebound it."""
    for path in ("/", "/api/state", "/models/tiny.safetensors"):
        assert ask(anywhere, "GET", path, headers={"Host": host}).status_code in (400, 421)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "[::1]:80", "LOCALHOST"])
def test_host_names_of_loopback_are_fine(anywhere: LocalStudio, host: str) -> None:
    """Every name of loopback is taken."""
    assert ask(anywhere, "GET", "/api/state", headers={"Host": host}).status_code == 200


def test_origin_must_be_our_own(anywhere: LocalStudio) -> None:
    """A change asked for by a foreign web page is refused; our own page and plain programs may."""
    body = {"model": "placeholder", "task": {"prompt": "x"}}
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://[bad"):
        answer = ask(anywhere, "POST", "/api/jobs", json=body, headers={"Origin": origin})
        assert answer.status_code == 403
    own = {"Origin": anywhere.base_url}
    assert ask(anywhere, "POST", "/api/jobs", json=body, headers=own).status_code == 201
    assert ask(anywhere, "POST", "/api/jobs", json=body).status_code == 201


def test_token_is_wanted_everywhere_people_go(guarded: LocalStudio) -> None:
    """With a token, the page and the API show nothing without it; the page asks for it."""
    page = ask(guarded, "GET", "/")
    assert (page.status_code, 'name="token"' in page.text) == (401, True)
    # With "no-referrer" browsers send "Origin: null" with the login form, which is refused.
    assert page.headers["Referrer-Policy"] == "same-origin"
    for method, path in (("GET", "/api/state"), ("POST", "/api/jobs"), ("GET", "/api/events"), ("GET", "/x")):
        answer = ask(guarded, method, path)
        assert (answer.status_code, answer.json()) == (401, {"error": "a token is required"})
    for wrong in ("Bearer wrong", "Basic " + TOKEN, "Bearer", "Bearer é".encode()):
        assert ask(guarded, "GET", "/api/state", headers={"Authorization": wrong}).status_code == 401
    right = {"Authorization": f"Bearer {TOKEN}", "Host": "studio.example"}
    assert ask(guarded, "GET", "/api/state", headers=right).status_code == 200


@pytest.mark.parametrize("way", ["link", "form"])
def test_token_once_given_is_remembered(guarded: LocalStudio, way: str) -> None:
    """Logging in by link or form leaves a cookie that only this site gets and that is not the token."""
    if way == "link":
        answer = ask(guarded, "GET", "/", params={"token": TOKEN})
    else:
        answer = ask(guarded, "POST", "/login", data={"token": TOKEN})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert ask(guarded, "GET", "/", cookies=answer.cookies).status_code == 200
    assert ask(guarded, "GET", "/api/state", cookies={"studio_session": "0" * 64}).status_code == 401


def test_token_wrong_gets_the_login_page_again(guarded: LocalStudio) -> None:
    """A wrong token lets nobody in."""
    assert ask(guarded, "GET", "/", params={"token": "wrong"}).status_code == 401
    assert ask(guarded, "POST", "/login", data={"token": "wrong"}).status_code == 401
    assert ask(guarded, "POST", "/login", files={"token": (None, TOKEN)}).status_code == 400


def test_token_is_not_asked_of_workers(guarded: LocalStudio) -> None:
    """Workers register, connect, fetch files and deliver without the people's token."""
    path = guarded.add_picture(picture())
    job_id = queue(guarded, task={"initImageUrl": path})
    machine = Machine(guarded).connect()
    claim = machine.take()
    assert requests.get(claim["task"]["initImageUrl"], timeout=WAIT_S).status_code == 200
    assert ask(guarded, "GET", TINY).status_code == 200
    assert machine.upload(job_id).status_code == 200
    machine.hang_up()


def test_log_names_no_token_secret_or_prompt(guarded: LocalStudio, caplog: pytest.LogCaptureFixture) -> None:
    """What the studio logs tells ids and durations, never what must stay private."""
    caplog.set_level("DEBUG")
    prompt = "the prompt nobody else shall read"
    job_id = queue(guarded, task={"prompt": prompt})
    machine = Machine(guarded).connect()
    machine.take()
    machine.socket.send('{"type": "accept", "jobId": 5, "prompt": "' + prompt + '"}')  # type: ignore[union-attr]
    assert machine.upload(job_id, prompt=prompt).status_code == 200
    assert ask(guarded, "GET", "/", params={"token": TOKEN}).status_code == 303
    machine.hang_up()
    ours = [record for record in caplog.records if record.name.startswith(("studio_worker", "uvicorn"))]
    assert {"worker approved", "job offered", "job done"} <= {record.getMessage() for record in ours}
    everything = "".join(str(record.__dict__) for record in ours)
    for private in (prompt, machine.token, machine.secret, TOKEN):
        assert private not in everything


def test_health_is_told_to_everybody(guarded: LocalStudio, tmp_path: Path) -> None:
    """A load balancer asks without a token; a studio that is being stopped takes no more work."""
    for path in ("/health/live", "/health/ready"):
        assert ask(guarded, "GET", path).status_code == 200
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        studio.attendance.is_leaving = True
        assert ask(studio, "GET", "/health/live").status_code == 200
        answer = ask(studio, "GET", "/health/ready")
        assert (answer.status_code, answer.json()) == (503, {"error": "the studio is being stopped"})


# --- starting and stopping --------------------------------------------------------------------------


def test_network_with_a_token_is_served(tmp_path: Path) -> None:
    """With a token, and the word that nobody reads along, the studio may listen on every address."""
    with LocalStudio(tmp_path / "studio.sqlite3", door=Door("0.0.0.0", token=TOKEN, is_plain=True)) as studio:
        assert studio.base_url == f"http://127.0.0.1:{studio.port}"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(studio, "GET", "/api/state", headers=headers).status_code == 200


def test_port_in_use_is_a_clear_mistake(tmp_path: Path, anywhere: LocalStudio) -> None:
    """A port that something else holds is named, and the data is free again afterwards."""
    database = tmp_path / "studio.sqlite3"
    with pytest.raises(ConfigError, match=f"port {anywhere.port} is in use"):
        LocalStudio(database, door=Door(port=anywhere.port)).start()
    LocalStudio(database).stop()


def test_address_of_another_machine_is_a_clear_mistake(tmp_path: Path) -> None:
    """An address that is not this machine's cannot be listened on."""
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        LocalStudio(tmp_path / "studio.sqlite3", door=Door("192.0.2.1", token=TOKEN, is_plain=True)).start()


@pytest.mark.sqlite
def test_database_in_use_is_a_clear_mistake(tmp_path: Path, studio: LocalStudio) -> None:
    """Two studios never share one database."""
    with pytest.raises(ConfigError, match="another local studio"):
        LocalStudio(tmp_path / "studio.sqlite3")


@pytest.mark.sqlite
def test_database_of_something_else_is_a_clear_mistake(tmp_path: Path) -> None:
    """A file that is no database, or of another version, is left alone and named."""
    path = tmp_path / "studio.sqlite3"
    path.write_bytes(b"this is not a database, and long enough to look like none" * 20)
    with pytest.raises(ConfigError, match="cannot be opened as a database"):
        LocalStudio(path)


@pytest.mark.sqlite
def test_data_folder_that_cannot_be_made_is_a_clear_mistake(tmp_path: Path) -> None:
    """A data folder that cannot be written is named with its cure."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_local_studio(Places(tmp_path / "file" / "data" / "studio.sqlite3"), Door(), models_dir=tmp_path)


def test_short_token_is_a_clear_mistake(tmp_path: Path) -> None:
    """A token that could be guessed is refused before anything is opened."""
    with pytest.raises(ConfigError, match="fewer than 16"):
        run_local_studio(Places(tmp_path / "studio.sqlite3"), Door(token="short"), models_dir=tmp_path)


def test_stop_does_not_wait_for_open_pages(tmp_path: Path) -> None:
    """Open pages and connected workers do not hold the studio up when it stops."""
    studio = LocalStudio(tmp_path / "studio.sqlite3").start()
    machine = Machine(studio).connect()
    with requests.get(f"{studio.base_url}/api/events", stream=True, timeout=WAIT_S) as page:
        stopper = threading.Thread(target=studio.stop)
        stopper.start()
        stopper.join(timeout=3)
        assert not stopper.is_alive()
        assert page.raw is not None
    assert machine.closing()[1] == 1012


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_runs_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """The command says where it listens, and ends in order at SIGINT and SIGTERM."""
    script = (
        "import sys; from pathlib import Path\n"
        "from studio_worker.local_studio import Door, Places, run_local_studio\n"
        "folder = Path(sys.argv[1])\n"
        "run_local_studio(Places(folder / 'studio.sqlite3'), Door(), models_dir=folder,"
        " on_ready=lambda studio: print(studio.base_url, flush=True))\n"
        "print('ended in order')"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert requests.get(f"{url}/api/state", timeout=WAIT_S).status_code == 200
        os.kill(process.pid, number)
        said, complained = process.communicate(timeout=10)
    assert (said, complained, process.returncode) == ("ended in order\n", "", 0)


def test_wait_for_wakes_at_changes_and_gives_up(studio: LocalStudio) -> None:
    """Waiting callers are woken by the change they wait for, and told when it does not come."""
    job_id = queue(studio)
    timer = threading.Timer(0.05, lambda: studio.queue.take_next("somebody"))
    timer.start()
    studio.wait_for(lambda: studio.job(job_id).status == "offered", WAIT_S)
    with pytest.raises(TimeoutError):
        studio.wait_for(lambda: False, 0.05)


def test_mistake_of_the_studio_is_told_once(studio: LocalStudio, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody has foreseen, here a row that somebody changed by hand, is 500 without its details, and one
    line of the log with what was asked for and a traceback.
    """
    job_id = queue(studio)
    with studio.database.writing() as connection:
        connection.execute(text("UPDATE jobs SET status = 'odd'"))
    answer = requests.get(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S)
    assert (answer.status_code, answer.json()["error"]) == (
        500,
        "the studio made a mistake; its log says more",
    )
    assert answer.headers["Cache-Control"] == "no-store"
    (line,) = [record for record in caplog.records if record.exc_info]
    assert (line.message, line.__dict__["path"]) == ("request failed", f"/api/jobs/{job_id}")
