"""Log lines: what journald, a terminal and the studio get to read, and what nobody gets to read."""

from __future__ import annotations

import fcntl
import gc
import io
import json
import logging
import os
import pty
import socket
import string
import subprocess
import sys
import weakref
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio_worker.errors import ConfigError
from studio_worker.network.urls import safe_url
from studio_worker.report import logs

ROOT = Path(__file__).parents[2]
SECRET = "tok-0123456789abcdef"

SPEAK = """
import logging, os, sys
from pathlib import Path
from studio_worker.network.urls import safe_url
from studio_worker.report import logs
form = sys.argv[1] if len(sys.argv) > 1 else "auto"
logs.configure("debug", form, journal_socket=Path(os.environ["TEST_JOURNAL_SOCKET"]))
log = logging.getLogger("studio_worker.demo")
for level in ("debug", "info", "warning", "error", "critical"):
    getattr(log, level)("job finished", extra={"job_id": "j1", "duration_s": 1.25})
"""


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What configure() changes is put back: handlers, levels, warnings, environment and secrets."""
    monkeypatch.setattr(logs, "_secrets", ())
    monkeypatch.setenv("JOURNAL_STREAM", "")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def speak(
    *args: str,
    stderr: int,
    script: str = SPEAK,
    journal: str | None = None,
    journal_socket: Path = Path("/nonexistent"),
) -> subprocess.CompletedProcess[bytes]:
    env = {k: v for k, v in os.environ.items() if k != "JOURNAL_STREAM"}
    env["TEST_JOURNAL_SOCKET"] = str(journal_socket)
    if journal is not None:
        env["JOURNAL_STREAM"] = journal
    return subprocess.run(
        [sys.executable, "-c", script, *args], cwd=ROOT, env=env, stderr=stderr, check=True, timeout=60
    )


# --- the shape of a line ---


def test_json_line_holds_message_and_facts() -> None:
    """A line is one JSON object with UTC timestamp, level, logger, constant message and the facts."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logging.getLogger("studio_worker.x").info("job finished", extra={"job_id": "j1", "duration_s": 1.5})
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "studio_worker.x",
        "message": "job finished",
        "job_id": "j1",
        "duration_s": 1.5,
    }


def test_json_timestamp_is_the_moment_of_the_call() -> None:
    """The timestamp is a time that other programs can read, with time zone."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    record = logging.makeLogRecord({"msg": "x", "levelno": 20, "levelname": "INFO", "created": 1_700_000_000})
    logging.getLogger().handle(record)
    assert datetime.fromisoformat(lines(stream)[0]["timestamp"]).timestamp() == 1_700_000_000


def test_json_line_stays_one_line() -> None:
    """Line ends in messages and facts never begin a second line."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logging.getLogger("x").info("a\nb", extra={"path": "c\nd"})
    (line,) = lines(stream)
    assert (line["message"], line["path"]) == ("a\nb", "c\nd")


@pytest.mark.parametrize("fmt", ["json", "text"])
def test_traceback_is_kept(fmt: logs.LogFormat) -> None:
    """An exception's traceback is in the line, in both formats."""
    stream = io.StringIO()
    logs.configure("info", fmt, stream)
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        logging.getLogger("x").exception("job failed", extra={"job_id": "j1"})
    text = lines(stream)[0]["exc_info"] if fmt == "json" else stream.getvalue()
    assert "Traceback (most recent call last)" in text
    assert "test_logs.py" in text
    assert "ZeroDivisionError: by zero" in text


def test_level_leaves_out_what_is_below() -> None:
    """Lines below the configured level do not appear."""
    stream = io.StringIO()
    logs.configure("warning", "json", stream)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert [line["message"] for line in lines(stream)] == ["loud"]


def test_unknown_level_is_a_configuration_error() -> None:
    """A level that does not exist is refused with the ones that do."""
    with pytest.raises(ConfigError, match=r"log\.level: .*use debug, info, warning or error"):
        logs.configure("loud")


def test_configuring_again_says_each_line_once() -> None:
    """Configuring a second time replaces the first stream, so no line appears twice."""
    first, second = io.StringIO(), io.StringIO()
    logs.configure("info", "json", first)
    logs.configure("info", "json", second)
    logging.getLogger("x").info("once")
    assert (len(lines(first)), len(lines(second))) == (0, 1)


def test_text_line_can_be_read_by_people() -> None:
    """In text, facts follow the message as key=value, quoted where they hold white space."""
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logging.getLogger("x").info("done", extra={"job_id": "j1", "took_s": 1.23456, "why": "a b", "n": "a\nb"})
    assert stream.getvalue().endswith('INFO    done  job_id=j1 took_s=1.235 why="a b" n="a\\nb"\n')


# --- where it goes ---


def test_journald_gets_priority_prefixes(tmp_path: Path) -> None:
    """Where journald reads stderr, each JSON line begins with its syslog priority."""
    with (tmp_path / "stderr").open("w+b") as stderr:
        stat = os.fstat(stderr.fileno())
        speak(stderr=stderr.fileno(), journal=f"{stat.st_dev}:{stat.st_ino}")
    said = (tmp_path / "stderr").read_text().splitlines()
    assert [line[:4] for line in said] == ["<7>{", "<6>{", "<4>{", "<3>{", "<2>{"]
    assert all(json.loads(line[3:])["job_id"] == "j1" for line in said)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    """journald's end of its native socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "journal"))
        listener.settimeout(10)
        yield listener


def entry(journald: socket.socket) -> dict[str, str]:
    """The next entry, by the protocol: a datagram, or a sealed file in memory."""
    data, files, _, _ = socket.recv_fds(journald, 1 << 20, 1)
    if files:
        assert not data
        with os.fdopen(files[0], "rb") as file:
            assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == 15
            file.seek(0)  # journald maps it
            data = file.read()
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, is_short, value = line.partition(b"=")
        if not is_short:
            length = int.from_bytes(data[:8], "little")
            value, end, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
            assert end == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IO[str]]:
    """A stream that journald reads."""
    with (tmp_path / "stderr").open("w+") as file:
        stat = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        yield file


def test_journal_entry_has_every_fact_as_a_field(tmp_path: Path, journald: socket.socket) -> None:
    """journalctl JOB_ID=… finds the line; its message is the JSON line, priority and identifier are right."""
    with (tmp_path / "stderr").open("w+b") as stderr:
        stat = os.fstat(stderr.fileno())
        where = f"{stat.st_dev}:{stat.st_ino}"
        speak(stderr=stderr.fileno(), journal=where, journal_socket=tmp_path / "journal")
        assert stderr.read() == b"", "the line came twice"
    entries = [entry(journald) for _ in range(5)]
    assert [found["PRIORITY"] for found in entries] == ["7", "6", "4", "3", "2"]
    message = json.loads(entries[0].pop("MESSAGE"))
    assert (message["message"], message["job_id"], message["duration_s"]) == ("job finished", "j1", 1.25)
    assert entries[0] == {
        "PRIORITY": "7",
        "SYSLOG_IDENTIFIER": "studio-worker",
        "LOGGER": "studio_worker.demo",
        "JOB_ID": "j1",
        "DURATION_S": "1.25",
    }


def test_journal_entry_of_any_size_arrives_whole(
    tmp_path: Path, journald: socket.socket, stream: IO[str]
) -> None:
    """A line larger than a datagram, which the stream would break in pieces, is one entry all the same."""
    logs.configure("info", "json", stream, tmp_path / "journal")
    logging.getLogger("x").error("job crashed", extra={"job_id": "j1", "traceback": "x" * 5_000_000})
    found = entry(journald)
    assert len(json.loads(found["MESSAGE"])["traceback"]) == 5_000_000
    assert found["JOB_ID"] == "j1"
    assert "TRACEBACK" not in found


def test_journal_entry_may_hold_lines(tmp_path: Path, journald: socket.socket, stream: IO[str]) -> None:
    """A fact or a readable text of several lines cannot smuggle in a field."""
    logs.configure("info", "text", stream, tmp_path / "journal")
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("x").exception("crashed", extra={"model": "a\nPRIORITY=7", "unit": "ssh.service"})
    found = entry(journald)
    assert found["PRIORITY"] == "3"
    assert found["MODEL"] == "a\nPRIORITY=7"
    assert found["MESSAGE"].endswith("ValueError: wrong")
    assert "UNIT" not in found


def test_journal_fields_hold_no_secret(tmp_path: Path, journald: socket.socket, stream: IO[str]) -> None:
    """What is redacted in the message is redacted in the fields too."""
    logs.add_secret(SECRET)
    logs.configure("info", "json", stream, tmp_path / "journal")
    logging.getLogger("x").info("asked", extra={"error": f"refused {SECRET}"})
    found = entry(journald)
    assert found["ERROR"] == "refused [redacted]"
    assert not any(SECRET in value for value in found.values())


def test_line_comes_by_the_stream_where_the_journal_takes_nothing(
    tmp_path: Path, journald: socket.socket, stream: IO[str]
) -> None:
    """journald restarted or gone: no line is lost, none comes twice, and the fields come back with it."""
    logs.configure("info", "text", stream, tmp_path / "journal")
    log = logging.getLogger("x")
    (tmp_path / "journal").rename(tmp_path / "away")
    log.warning("first\nline")
    (tmp_path / "away").rename(tmp_path / "journal")
    log.warning("second")
    assert entry(journald)["MESSAGE"].endswith("second")
    assert [line[:3] for line in (tmp_path / "stderr").read_text().splitlines()] == ["<4>", "<4>"]


@pytest.mark.parametrize("journal", [None, "", "1:1"])
def test_others_get_plain_json(tmp_path: Path, journal: str | None) -> None:
    """Where stderr goes anywhere else, JOURNAL_STREAM inherited from a parent adds no prefix."""
    with (tmp_path / "stderr").open("w+b") as stderr:
        speak(stderr=stderr.fileno(), journal=journal)
    said = (tmp_path / "stderr").read_text().splitlines()
    assert [json.loads(line)["level"] for line in said] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def on_terminal(*args: str) -> str:
    ours, theirs = pty.openpty()
    try:
        speak(*args, stderr=theirs)
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_terminal_gets_text() -> None:
    """On a terminal the lines are text for people."""
    said = on_terminal()
    assert "WARNING job finished  job_id=j1 duration_s=1.250" in said
    assert "{" not in said


def test_terminal_gets_json_where_asked() -> None:
    """format = "json" gives JSON on a terminal too."""
    said = on_terminal("json").splitlines()
    assert [json.loads(line)["duration_s"] for line in said] == [1.25] * 5


# --- secrets ---


@pytest.mark.parametrize("fmt", ["json", "text"])
def test_secret_is_redacted_everywhere(fmt: logs.LogFormat) -> None:
    """A registered secret appears neither in message, nor in facts, nor in a traceback."""
    stream = io.StringIO()
    logs.configure("info", fmt, stream)
    logs.add_secret(SECRET)
    try:
        raise ValueError(f"bad token {SECRET}")
    except ValueError:
        logging.getLogger("x").exception("token %s", SECRET, extra={"header": f"Bearer {SECRET}"})
    assert SECRET not in stream.getvalue()
    assert stream.getvalue().count("[redacted]") == 3


@given(secret=st.text(min_size=8, max_size=40).filter(lambda text: not text.isspace()))
def test_secret_of_any_characters_is_redacted(secret: str) -> None:
    """No character in a secret, however JSON or a URL writes it, lets it through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_secrets", ())
        logs.add_secret(secret)
        for text in (
            f"token {secret} end",
            f"https://host/?token={quote(secret, safe='')}",
            json.dumps({"token": f"a {secret} b"}),
            json.dumps({"token": f"a {secret} b"}, ensure_ascii=False),
        ):
            assert "[redacted]" in logs.redact(text)
            assert secret not in logs.redact(text)


def test_json_redacts_a_secret_that_json_escapes() -> None:
    """A secret with quotes, back slashes or line ends is found inside a JSON line."""
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logs.add_secret('pass"word\\with\nall é')
    logging.getLogger("x").info("sign in", extra={"token": 'pass"word\\with\nall é'})
    assert lines(stream)[0]["token"] == "[redacted]"


@pytest.mark.parametrize("order", [1, -1])
def test_longer_secret_is_redacted_whole(order: int) -> None:
    """Where one secret begins with another, nothing of the longer one is left."""
    for secret in (SECRET, f"{SECRET}-and-more")[::order]:
        logs.add_secret(secret)
    assert logs.redact(f"x {SECRET}-and-more y") == "x [redacted] y"


def test_short_secret_does_not_blot_out_words() -> None:
    """Something too short to be a secret never replaces parts of ordinary words."""
    logs.add_secret("job")
    logs.add_secret("")
    assert logs.redact("job finished") == "job finished"


plain = st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,;=%", min_size=4, max_size=20)


@given(user=plain, password=plain, query=plain, fragment=plain)
def test_safe_url_drops_user_query_and_fragment(user: str, password: str, query: str, fragment: str) -> None:
    """A loggable address has neither user info nor query nor fragment."""
    url = f"https://{user}:{password}@host.example:8443/a/b?{query}#{fragment}"
    assert safe_url(url) == "https://host.example:8443/a/b"


nasty = st.text("/?#@:[]\\ %\n12ab", max_size=4)


@settings(max_examples=500)
@given(
    scheme=st.sampled_from(["https://", "http://", "https:/", "https:", "//", ""]),
    user=nasty,
    around=st.tuples(nasty, nasty),
    rest=nasty,
)
def test_safe_url_never_leaks_a_password(scheme: str, user: str, around: tuple[str, str], rest: str) -> None:
    """However mangled an address is, the password before its @ is not in the loggable form."""
    password = "S3cret".join(around)
    assert "S3cret" not in safe_url(f"{scheme}{user}:{password}@host.example/{rest}")


def test_safe_url_keeps_what_is_harmless() -> None:
    """An address without secrets is shown as it is."""
    assert safe_url("http://[::1]:8765/models/a%20b.gguf") == "http://[::1]:8765/models/a%20b.gguf"


# --- libraries ---


def test_library_that_quotes_prompts_is_silent_though_imported_later(tmp_path: Path) -> None:
    """Warnings of transformers, which may quote a prompt, do not appear, also when it is loaded after us."""
    script = """
from studio_worker.network.urls import safe_url
from studio_worker.report import logs
from studio_worker.box import process
process.prepare()
logs.configure("debug", "json")
from transformers.utils import logging
log = logging.get_logger("transformers.tokenization_utils_base")
log.warning("truncated: a secret prompt")
log.error("a real error")
"""
    with (tmp_path / "stderr").open("w+b") as stderr:
        speak(script=script, stderr=stderr.fileno())
    said = (tmp_path / "stderr").read_text()
    assert "a real error" in said
    assert "a secret prompt" not in said


def test_python_warnings_do_not_reach_the_log(tmp_path: Path) -> None:
    """Warnings of libraries (deprecations and the like) appear neither as a line nor raw on stderr."""
    script = """
import logging, warnings
from studio_worker.network.urls import safe_url
from studio_worker.report import logs
warnings.simplefilter("always")
logs.configure("debug", "json")
warnings.warn("quoted prompt words")
logging.getLogger("x").info("the log works")
"""
    with (tmp_path / "stderr").open("w+b") as stderr:
        speak(script=script, stderr=stderr.fileno())
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert json.loads(line)["message"] == "the log works"


# --- the studio's share ---


def say(buffer: logs.ShippingBuffer, *messages: str) -> None:
    for message in messages:
        buffer.handle(logging.makeLogRecord({"msg": message, "levelno": 20, "levelname": "INFO"}))


def test_shipping_buffer_gives_the_oldest_first() -> None:
    """Lines for the studio come in order, at most as many as asked for, each once."""
    buffer = logs.ShippingBuffer()
    say(buffer, "a", "b", "c")
    assert [record.getMessage() for record in buffer.take(2)[0]] == ["a", "b"]
    assert [record.getMessage() for record in buffer.take(2)[0]] == ["c"]
    assert buffer.take(2) == ([], 0)


def test_shipping_buffer_is_bounded_and_counts_what_it_loses() -> None:
    """With no studio to read them the oldest lines are dropped, and their number is told once."""
    buffer = logs.ShippingBuffer(capacity=3)
    say(buffer, *"abcde")
    kept, lost = buffer.take(10)
    assert ([record.getMessage() for record in kept], lost) == (["c", "d", "e"], 2)
    assert buffer.take(10) == ([], 0)


def test_shipping_buffer_survives_configuring_again() -> None:
    """Lines go on to the studio after the log's level or format was configured anew."""
    buffer = logs.ShippingBuffer()
    logging.getLogger().addHandler(buffer)
    logs.configure("info", "json", io.StringIO())
    logging.getLogger("x").info("still here")
    assert [record.getMessage() for record in buffer.take(10)[0]] == ["still here"]


def test_shipping_buffer_leaves_out_debug_lines() -> None:
    """Debug lines stay on the box."""
    buffer = logs.ShippingBuffer()
    logging.getLogger().addHandler(buffer)
    logs.configure("debug", "json", io.StringIO())
    logging.getLogger("x").debug("detail")
    assert buffer.take(10) == ([], 0)


def test_shipping_buffer_keeps_nothing_of_a_failed_job_alive() -> None:
    """A line that waits for the studio does not keep what the failed job held in memory."""

    class Picture:
        pass

    def job() -> None:
        picture = Picture()
        held.append(weakref.ref(picture))
        raise ValueError("job failed")

    held: list[weakref.ref[Picture]] = []
    buffer = logs.ShippingBuffer()
    stream = io.StringIO()
    logging.getLogger().addHandler(buffer)
    logs.configure("info", "json", stream)
    try:
        job()
    except ValueError:
        logging.getLogger("x").exception("job %s failed", "j1")
    gc.collect()
    assert held[0]() is None
    assert [record.getMessage() for record in buffer.take(10)[0]] == ["job j1 failed"]
    assert "ValueError" in lines(stream)[0]["exc_info"]
