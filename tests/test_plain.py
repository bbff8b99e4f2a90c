"""Words from outside, wherever they are shown: terminal, log, journal, status line, the studio's page."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from studio_worker.cli import app
from studio_worker.jobs import ImageTask
from studio_worker.models import ModelSource
from studio_worker.plain import plain, plain_lines
from studio_worker.report import logs
from studio_worker.report.logs import ShippingBuffer
from studio_worker.report.snapshot import EndedJob, JobFacts, Snapshot
from studio_worker.studio import wire
from studio_worker.studio.http.identity import IdentityFile
from studio_worker.studio.session.protocol import error_for_code
from studio_worker.studio.session.shipping import Shipping
from tests.lab.frames import CAPABILITIES_JSON

EVIL = "a\x1b]0;title\x07\x1b[31m\x9b31m\x7f\u202eb\u2066c\u200f\u2028d\r\nREADY e\x00f"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def test_what_steers_a_terminal_is_replaced_and_all_else_is_left() -> None:
    """Letters of any script, emoji and joiners stay; controls of terminals, lines and direction do not."""
    kept = "Größe 画 مرحبا שלום 👩‍🎨 naïve é \u200c\u200d"
    assert plain(kept) == kept
    assert not STEERING.search(plain(EVIL))
    assert "\n" not in plain(EVIL)
    assert plain_lines("a\n\tb\x1b[0m") == "a\n\tb\ufffd[0m"


@pytest.mark.parametrize("level", ["text", "json"])
def test_log_lines_hold_no_words_that_steer_a_terminal(level: logs.LogFormat) -> None:
    """In either format an id, a name or a reason is one harmless part of one line."""
    stream = io.StringIO()
    before = logging.getLogger().handlers[:]
    try:
        logs.configure("info", level, stream)
        logging.getLogger("studio_worker.test").warning("job failed", extra={"job_id": EVIL, "model": EVIL})
    finally:
        logging.getLogger().handlers = before
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert not STEERING.search(line)
    if level == "json":
        assert not STEERING.search(json.loads(line)["job_id"])


def test_shipped_lines_hold_no_words_that_steer_a_terminal() -> None:
    """What goes to the studio's own log is as harmless."""
    buffer = ShippingBuffer()
    record = logging.LogRecord("studio_worker.x", logging.INFO, "", 0, "job failed", (), None)
    record.reason = EVIL
    buffer.emit(record)
    (entry,) = Shipping(buffer).next_batch()
    assert not STEERING.search(entry.message)


def rejection() -> object:
    return wire.DECISION.validate_python({"status": "rejected", "reason": EVIL})


def machine() -> object:
    return wire.Capabilities.model_validate(CAPABILITIES_JSON | {"machineName": EVIL})


READ: dict[str, Callable[[], object]] = {
    "rejection": rejection,
    "machine": machine,
    "error frame": lambda: wire.ErrorFrame(code="c", message=EVIL),
    "close reason": lambda: error_for_code(4001, EVIL),
    "prompt": lambda: ImageTask(prompt=EVIL),
    "negative prompt": lambda: ImageTask(prompt="a", negative_prompt=EVIL),
    "failure": lambda: wire.Fail(job_id="j", error=EVIL, retryable=True),
    "log line": lambda: wire.LogEntry(ts="", level="info", category="c", message=EVIL),
    "job of status": lambda: JobFacts(job_id=EVIL, model=EVIL),
    "status": lambda: Snapshot(version="1", status=EVIL),
    "ended job": lambda: EndedJob(job_id=EVIL, model="m", outcome="failed", ended_at=0.0, reason=EVIL),
}


@pytest.mark.parametrize("shown", READ.values(), ids=list(READ))
def test_words_from_the_wire_are_harmless_once_they_are_read(shown: Callable[[], object]) -> None:
    """Whatever the other side says of a thing can be shown anywhere."""
    read = shown()
    text = " ".join(map(str, vars(read).values())) if isinstance(read, BaseModel) else str(read)
    assert not STEERING.search(text)
    assert "title" in text


def test_lines_of_a_prompt_are_kept() -> None:
    """A prompt of several lines is what it was."""
    assert ImageTask(prompt="a fox\n\tin the snow").prompt == "a fox\n\tin the snow"


def test_name_of_a_file_from_outside_turns_no_text_around() -> None:
    """A file is never called by a name that reads otherwise than it is written."""
    file = {"role": "model", "url": "https://a.example/x", "filename": "x\u202egnp.exe"}
    with pytest.raises(ValueError, match="plain file name"):
        ModelSource.model_validate({"engine": "diffusion", "files": [file]})


def test_commands_print_no_words_that_steer_a_terminal(tmp_path: Path) -> None:
    """What register and models list print of a studio's words is harmless, markup of tables included."""
    for name in ("state", "models", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.toml").write_text(
        f'[models]\nroot = "{tmp_path}/models"\n[state]\ndir = "{tmp_path}/state"\n'
        f'runtime_dir = "{tmp_path}/run"\n[worker]\ndevice = "cpu"\n'
    )
    path = tmp_path / "state" / "identity.json"
    IdentityFile(path).load()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rejected": EVIL}))
    (tmp_path / "models.d").mkdir()
    file = {"role": "model", "url": "https://a.example/x", "filename": "x", "sha256": "0" * 64}
    model = {"id": f"[/] [bold]{EVIL}", "engine": "sd-cpp", "files": [file]}
    (tmp_path / "models.d" / "m.json").write_text(json.dumps(model))
    for command in (["register"], ["models", "list"]):
        done = CliRunner().invoke(app, [*command, "--config", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert "title" in done.output
        assert not STEERING.search(done.output)
    assert "[/] [bold]" in done.output
