"""The control socket: real unix sockets, both ends."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.errors import ConfigError, ControlDenied, ControlError, ServiceNotRunning
from studio_worker.report.control import ControlServer, ask, runtime_dir


def broken() -> dict[str, Any]:
    raise ValueError("a fault of ours")


HANDLERS = {"status": lambda: {"version": "1"}, "large": lambda: {"x": "y" * 500_000}, "broken": broken}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Deeper than the 107 bytes that a unix address holds."""
    return tmp_path / ("long" * 30) / "run"


@pytest.fixture
def server(folder: Path) -> Iterator[ControlServer]:
    running = ControlServer(folder, HANDLERS)
    yield running
    running.close()


def send(folder: Path, content: bytes) -> bytes:
    """What comes back for raw bytes, up to the end of the connection."""
    with socket.socket(socket.AF_UNIX) as connection:
        directory = os.open(folder, os.O_RDONLY)
        connection.settimeout(10)
        connection.connect(f"/proc/self/fd/{directory}/control.sock")
        os.close(directory)
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


@pytest.mark.usefixtures("server")
def test_control_answers_a_command(folder: Path) -> None:
    """A command gets its answer, also a large one, one JSON line each way."""
    assert ask(folder, "status") == {"version": "1"}
    assert len(ask(folder, "large")["x"]) == 500_000
    assert json.loads(send(folder, b'{"command": "status"}\n')) == {"ok": True, "result": {"version": "1"}}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"\n",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe\n",
        b'{"command": []}\n',
        b"x" * 4096,
        b"[" * 4000,
        b'{"a": 1}\n',
    ],
    ids=range(10),
)
def test_control_survives_rubbish(folder: Path, rubbish: bytes) -> None:
    """Whatever is sent gets an error that names the commands, and the next command its answer."""
    answer = json.loads(send(folder, rubbish))
    assert not answer["ok"]
    assert "broken, large, status" in answer["error"]
    assert ask(folder, "status") == {"version": "1"}


@pytest.mark.usefixtures("server")
def test_control_survives_a_fault_behind_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A command that fails says so to whoever asked, and to the log; the next one is answered."""
    with pytest.raises(ControlError, match="internal error: ValueError"):
        ask(folder, "broken")
    assert "command failed" in caplog.messages
    assert ask(folder, "status") == {"version": "1"}


@pytest.mark.usefixtures("server")
def test_control_does_not_wait_for_ever(folder: Path) -> None:
    """Somebody who connects and says nothing does not keep others from their answer."""
    directory = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(f"/proc/self/fd/{directory}/control.sock")
        os.close(directory)
        assert ask(folder, "status") == {"version": "1"}


def test_control_is_for_root_and_the_service_alone() -> None:
    """The socket is 0600; another user, who may well see it, is told to use sudo."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as somebody else")
    raised: list[BaseException] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = ControlServer(folder, HANDLERS)
        assert stat.S_IMODE((folder / "control.sock").stat().st_mode) == 0o600

        def ask_as_nobody() -> None:
            # setfsuid(2) changes one thread only, and takes root's right to pass over permissions from it.
            ctypes.CDLL(None).setfsuid(65534)
            try:
                ask(folder, "status")
            except ControlError as error:
                raised.append(error)

        thread = threading.Thread(target=ask_as_nobody)
        thread.start()
        thread.join()
        assert ask(folder, "status") == {"version": "1"}
        server.close()
    assert isinstance(raised[0], ControlDenied)
    assert "sudo" in str(raised[0])


def test_ask_says_that_no_service_runs(tmp_path: Path) -> None:
    """Without a folder, without a socket, and with a dead one, the cure is to start the service."""
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ServiceNotRunning, match="systemctl start") as caught:
            ask(folder, "status")
        assert caught.value.exit_status == 3
    leave_stale(tmp_path)
    with pytest.raises(ServiceNotRunning):
        ask(tmp_path, "status")
    with pytest.raises(ServiceNotRunning, match=r"systemctl start studio-worker@1$"):
        ask(tmp_path / "studio-worker-1", "status")
    assert ControlDenied.exit_status == 4


def test_cures_in_a_container_name_no_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no systemd runs, nobody is sent to systemctl or sudo."""
    monkeypatch.setenv("container", "oci")
    with pytest.raises(ServiceNotRunning, match=r"start the container, or see its log$"):
        ask(tmp_path / "none", "status")
    assert str(ControlDenied(tmp_path)).endswith("run the command as the container's own user")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"mount a volume at {tmp_path}/file that user \d+ may write to "):
        ControlServer(tmp_path / "file", HANDLERS)


def test_ask_names_the_instances_that_run(tmp_path: Path) -> None:
    """On a box with a service for each GPU, whoever forgets to say which is told what there is to say."""
    for number in (1, 0):
        (tmp_path / f"studio-worker-{number}").mkdir()
        leave_stale(tmp_path / f"studio-worker-{number}")
    with pytest.raises(ServiceNotRunning, match=r"give --instance N, of 0, 1$"):
        ask(tmp_path / "studio-worker", "status")


def leave_stale(folder: Path) -> None:
    """The socket of a process that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "control.sock"))
        dead.listen()


def test_ask_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A service that hangs is said to hang."""
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "control.sock"))
        hanging.listen()
        with pytest.raises(ControlError, match="does not answer"):
            ask(tmp_path, "status", limit_s=0.1)


def test_ask_refuses_an_answer_it_cannot_read(tmp_path: Path) -> None:
    """Something else that listens there is no traceback."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "control.sock"))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ControlError, match="not readable"):
            ask(tmp_path, "status")
        thread.join()


def test_control_replaces_the_socket_of_a_killed_process(tmp_path: Path) -> None:
    """What a kill -9 leaves does not bar the next start."""
    leave_stale(tmp_path)
    server = ControlServer(tmp_path, HANDLERS)
    assert ask(tmp_path, "status") == {"version": "1"}
    server.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("server")
def test_control_leaves_a_living_service_alone(folder: Path) -> None:
    """A second service for the same folder gets an error with the cure, and the first one goes on."""
    with pytest.raises(ConfigError, match="another service listens"):
        ControlServer(folder, HANDLERS)
    assert ask(folder, "status") == {"version": "1"}


def test_control_names_what_is_in_its_way(tmp_path: Path) -> None:
    """A file where the socket belongs, or the folder, is a configuration error with its cure."""
    (tmp_path / "control.sock").write_text("")
    with pytest.raises(ConfigError, match="remove it"):
        ControlServer(tmp_path, HANDLERS)
    with pytest.raises(ConfigError, match=r"state\.runtime_dir"):
        ControlServer(tmp_path / "control.sock", HANDLERS)


def test_runtime_dir_is_systemds_first_else_the_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under systemd the unit's RuntimeDirectory= is used, its first one where there are several."""
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    assert runtime_dir(Path("/run/x")) == Path("/run/x")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/a:/run/b")
    assert runtime_dir(Path("/run/x")) == Path("/run/a")
