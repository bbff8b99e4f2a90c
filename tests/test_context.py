"""What the work at hand is called: said once, in every line about it, whoever logs in whichever thread."""

from __future__ import annotations

import ast
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.context import called, carried
from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.models import ModelFile
from studio_worker.report import logs
from studio_worker.sample_model import prompt
from studio_worker.store import Store
from studio_worker.store.terms import fixed
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer
from tests.house import read_modules
from tests.lab.service import await_log, await_status, override

ENGINES = "prompt names LoRAs that the source does not bring"
"""A line of the engine's own; no call of it knows the job."""
TASK = {
    "prompt": f"{prompt('red', 'gem', 'sky')} <lora:nobody-has-this:1>",
    "steps": 2,
    "width": 64,
    "height": 64,
}

log = logging.getLogger("studio_worker.test_context")


@pytest.fixture
def told() -> Iterator[io.StringIO]:
    """What the service's own handler writes, as JSON."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# --- the walk ---


def between(lines: list[dict[str, Any]], job_id: str, last: str) -> list[dict[str, Any]]:
    """The lines from the acceptance of a job to its ``last`` one, whatever they say they are about."""
    messages = [(line["message"], line.get("job_id")) for line in lines]
    return lines[messages.index(("job accepted", job_id)) : messages.index((last, job_id)) + 1]


@pytest.mark.welcoming_studio
def test_every_line_about_a_job_carries_its_name(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """``journalctl JOB_ID=…`` shows all that happens from a job's acceptance to its delivery or failure: what
    session, download, engine, worker and upload say. The studio gets the engine's lines as that job's, too.
    """
    override(site, '[log]\nlevel = "debug"\n')
    source = sample_source(studio)
    with ServiceProcess(site, tmp_path / "log") as running:
        good = studio.queue_job(model=MODEL_ID, task=TASK, model_source=source)
        await_log(running, "job done")  # which comes after the delivery
        bad = studio.queue_job(model=MODEL_ID, task=TASK | {"samplingMethod": "none"}, model_source=source)
        await_status(studio, bad, "failed")
        assert running.stop() == 0
    said = running.log_lines()
    makes = {"download starting", "download done", ENGINES, "model loaded", "picture made", "job done"}
    for job_id, last, expected in ((good, "job done", makes), (bad, "job failed", {ENGINES, "job failed"})):
        its = between(said, job_id, last)
        names = {(line.get("job_id"), line.get("model")) for line in its}
        assert names == {(job_id, MODEL_ID)}, its
        assert expected <= {line["message"] for line in said if line.get("job_id") == job_id}
        shipped = [line.message for line in studio.logs() if line.job_id == job_id]
        assert any(message.startswith(ENGINES) for message in shipped), shipped
    sessions = [line.get("worker_id") for line in said if line["message"] in {"session open", "job accepted"}]
    assert sessions == [studio.workers()[0].worker_id] * 3
    assert {line.get("job_id") for line in said if line["message"].startswith("service ")} == {None}
    assert "nobody-has-this" not in (tmp_path / "log").read_text()


def test_files_that_come_several_at_once_are_the_jobs(tmp_path: Path, told: io.StringIO) -> None:
    """A model's files are fetched in threads of their own: each line has the job, the model and its own file,
    and what is said of their sum has no file.
    """

    def moved(done: int, total: int | None) -> None:
        log.info("sum")

    with FileServer() as server:
        served = [server.serve(f"/{name}.safetensors", name.encode() * 1000) for name in ("a", "b", "c")]
        served[0].answers.append((503, {}))
        files = [
            ModelFile(role="model", url=each.url, filename=each.url.rpartition("/")[2], sha256=each.sha256)
            for each in served
        ]
        store = Store(tmp_path / "models", fixed(Policy(connect_s=5, stall_s=5, delays_s=(0.0,))))
        with called(job_id="j1", model="m"):
            store.ensure(files, progress=moved)
    said = lines(told)
    assert {(line.get("job_id"), line.get("model")) for line in said} == {("j1", "m")}
    by_message = {line["message"]: set[str]() for line in said}
    for line in said:
        by_message[line["message"]].add(line.get("dest", "").rpartition("/")[2])
    each = {file.filename for file in files}
    assert by_message == {
        "download starting": each,
        "download has to wait": {"a.safetensors"},
        "download done": each,
        "sum": {""},
    }


# --- the parts ---


def test_names_last_as_long_as_the_work(told: io.StringIO) -> None:
    """Names add up inside each other, end with their work, even where it fails, and are of one thread."""

    def elsewhere() -> None:
        log.info("elsewhere")

    def work() -> None:
        with called(job_id="j1", model="m"):
            with called(url="http://h/f", dest="/f", model="n"):
                log.info("inner")
            log.info("outer")
            for target in (elsewhere, carried(elsewhere)):
                thread = threading.Thread(target=target)
                thread.start()
                thread.join()
            raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        work()
    log.info("after")
    job = {"job_id": "j1", "model": "m"}
    common = {"timestamp", "level", "logger", "message"}
    assert [{name: line[name] for name in line.keys() - common} for line in lines(told)] == [
        {"job_id": "j1", "model": "n", "url": "http://h/f", "dest": "/f"},
        job,
        {},
        job,
        {},
    ]


def test_what_a_line_says_itself_counts(told: io.StringIO) -> None:
    """A line about another model, said in the work on one, keeps that model and gains the job."""
    with called(job_id="j1", model="m"):
        log.info("model removed", extra={"model": "another"})
    (line,) = lines(told)
    assert (line["job_id"], line["model"]) == ("j1", "another")


def test_names_stand_before_what_a_line_says(told: io.StringIO) -> None:
    """On a terminal a line says first what it is about, whoever said so."""
    logs.configure("info", "text", told)
    with called(job_id="j1", model="m"):
        log.info("job failed", extra={"op": "job", "error": "odd"})
    assert told.getvalue().endswith("job failed  op=job job_id=j1 model=m error=odd\n")


def test_names_are_redacted(told: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that has got into a name leaves with no line, like one in any other field."""
    monkeypatch.setattr(logs, "_secrets", ())
    logs.add_secret("tok-0123456789")
    buffer = logs.ShippingBuffer()
    logging.getLogger().addHandler(buffer)
    with called(job_id="j1", dest="/tok-0123456789"):
        log.info("x")
    assert lines(told)[0]["dest"] == "/[redacted]"
    ((record,), _) = buffer.take(10)
    assert logs.facts(record)["job_id"] == "j1"


def test_threads_that_work_for_a_job_carry_its_name() -> None:
    """Downloads, store and engine start no thread that would forget whose work it does."""
    wrong = [
        f"{module}:{node.lineno}"
        for module, _, tree in read_modules()
        if module.partition(".")[0] in {"transfer", "download", "store", "engine"}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "threading.Thread"
        for target in (next((word.value for word in node.keywords if word.arg == "target"), None),)
        if not (isinstance(target, ast.Call) and ast.unparse(target.func) == "carried")
    ]
    assert wrong == []
