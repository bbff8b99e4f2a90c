"""The demo, whole: what a newcomer sees, and what must never be seen."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from studio_worker import sample_model
from studio_worker.demo.jobs import shown_jobs
from studio_worker.local_studio import LocalStudio
from studio_worker.local_studio.shelf import LogLine


class Ran(NamedTuple):
    """One run of ``studio-worker demo``."""

    output: Path
    shown: str
    log: list[dict[str, Any]]
    raw_log: str
    shipped: list[LogLine]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The demo by its command, once for all tests here."""
    output = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "studio_worker", "demo", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    raw = (output / "work" / "service.log").read_text()
    studio = LocalStudio(output / "work" / "studio.sqlite3")
    shipped = studio.logs(limit=1000)
    studio.stop()
    return Ran(output, done.stdout, [json.loads(line) for line in raw.splitlines()], raw, shipped)


def test_demo_leaves_a_picture_for_every_job_and_a_contact_sheet(demo: Ran) -> None:
    """Every job but the one that must fail is a picture of its size and kind in the folder."""
    files = {path.name for path in demo.output.glob("*.*")}
    jobs = [(n, shown) for n, shown in enumerate(shown_jobs("", ""), 1) if not shown.must_fail]
    assert len(jobs) >= 10
    for number, shown in jobs:
        (name,) = [name for name in files if name.startswith(f"{number:02}-")]
        with Image.open(demo.output / name) as picture:
            assert picture.size == (shown.task.get("width", 64), shown.task.get("height", 64))
            assert picture.format == {"png": "PNG", "jpg": "JPEG"}.get(shown.task.get("ext", ""), "WEBP")
    with Image.open(demo.output / "contact-sheet.png") as sheet:
        assert sheet.width >= 640


def test_demo_seeded_pair_is_identical(demo: Ran) -> None:
    """The same prompt and seed give the same bytes."""
    first, second = sorted(demo.output.glob("0[12]-*.png"))
    assert first.read_bytes() == second.read_bytes()


def test_demo_shows_a_table_and_the_failure_it_promises(demo: Ran) -> None:
    """The table names each job with its seconds and file; the impossible one failed with its reason."""
    assert "contact sheet" in demo.shown
    assert "unknown samplingMethod" in demo.shown
    assert "stopped cleanly" in demo.shown


def test_demo_logs_are_json_with_constant_messages(demo: Ran) -> None:
    """Every line is one JSON object with timestamp, level, logger and message, and facts as fields."""
    for line in demo.log:
        assert {"timestamp", "level", "logger", "message"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
        assert not re.search(r"\d", line["message"]), line["message"]
    summaries = [line for line in demo.log if line["message"] == "job done"]
    assert len(summaries) == sum(not shown.must_fail for shown in shown_jobs("", ""))
    for line in summaries:
        stages = {"wait_ms", "files_ms", "prepare_ms", "load_ms", "generate_ms", "encode_ms", "upload_ms"}
        assert stages <= set(line)


def test_demo_no_line_holds_a_token_a_secret_or_a_prompt(demo: Ran) -> None:
    """Neither the service's log nor what it ships to the studio holds anything that is nobody's business."""
    identity = json.loads((demo.output / "work" / "state" / "identity.json").read_text())
    forbidden = {identity["auth_token"], "Bearer"}
    for shown in shown_jobs("", ""):
        forbidden |= {shown.prompt, shown.task.get("negativePrompt", shown.prompt)}
    texts = demo.raw_log + "".join(line.message for line in demo.shipped)
    assert demo.shipped
    for text in forbidden:
        assert text not in texts
    # Nor a piece of one.
    for colour, thing in itertools.product(sample_model.COLOURS, sample_model.OBJECTS):
        assert f"{colour} {thing}" not in texts


def test_demo_service_goes_through_its_stages_in_order(demo: Ran) -> None:
    """Device, verified models, READY, registration, session, jobs, stop: in this order."""
    messages = [line["message"] for line in demo.log]
    stages = [
        "service starting",
        "device found",
        "download starting",
        "download done",
        "required models verified",
        "service ready",
        "registration approved",
        "session open",
        "job accepted",
        "job done",
        "stop requested",
        "service stopped",
    ]
    positions = [messages.index(stage) for stage in stages]
    assert positions == sorted(positions)
