"""The control socket: how a command asks the running service, one JSON line in, one JSON line out.

Server and client. Only root and the service's user may talk (the socket's mode says so). The server knows no
command; the service hands in what answers each. Whatever is sent, the server goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from studio_worker.errors import ConfigError, ControlDenied, ControlError, ServiceNotRunning
from studio_worker.wording import in_container, user, volume_cure

log = logging.getLogger(__name__)

_NAME = "control.sock"
_MAX_REQUEST_BYTES = 4096
_MAX_ANSWER_BYTES = 1 << 20
_PEER_LIMIT_S = 2.0
"""A command sends its line at once; whoever takes longer only keeps others waiting."""
_CLIENT_LIMIT_S = 10.0
_BACKLOG = 16

Handler = Callable[[], Mapping[str, Any]]


def runtime_dir(configured: Path) -> Path:
    """Where the socket lives: ``$RUNTIME_DIRECTORY``, which systemd gives the service, else as configured."""
    # With several RuntimeDirectory= entries systemd joins them by colons (systemd.exec(5)).
    given = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else configured


class ControlServer:
    """Listens from its making until :meth:`close`, on a thread of its own.

    Args:
        folder: where the socket is made; the folder too, where it is missing.
        handlers: what answers each command; may be set anew at any time.

    Raises:
        ConfigError: the socket cannot be made, or another service listens on it.
    """

    def __init__(self, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._folder = folder
        self.handlers = handlers
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _opened(folder) as directory:
                # Two services that start at once must not take each other's fresh socket for a stale one.
                fcntl.flock(directory, fcntl.LOCK_EX)
                self._clear_stale(directory)
                self._socket = _listen(directory)
                self._inode = os.stat(_NAME, dir_fd=directory).st_ino
        except OSError as error:
            raise ConfigError(
                f"no control socket can be made in {folder}: {error.strerror}",
                key="state.runtime_dir",
                cure=volume_cure(folder)
                if in_container()
                else f"give user {user()} access to the folder or name another one",
            ) from error
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        with contextlib.suppress(OSError):  # wakes accept(); not connected, so it always complains
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(_PEER_LIMIT_S * 2)
        self._socket.close()
        with contextlib.suppress(OSError), _opened(self._folder) as directory:
            if os.stat(_NAME, dir_fd=directory).st_ino == self._inode:
                os.unlink(_NAME, dir_fd=directory)

    def _clear_stale(self, directory: int) -> None:
        """Remove what a killed process left; raises ConfigError where it is alive or no socket."""
        path = self._folder / _NAME
        try:
            mode = os.stat(_NAME, dir_fd=directory, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConfigError("is in the way of the control socket", source=str(path), cure="remove it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(_address(directory))
            except BlockingIOError:
                pass  # somebody listens and is busy
            except ConnectionRefusedError:
                os.unlink(_NAME, dir_fd=directory)
                return
        raise ConfigError(
            f"another service listens on {path}",
            key="state.runtime_dir",
            cure="stop it, or give each service a folder of its own",
        )

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ECONNABORTED}:
                    time.sleep(0.1)  # out of descriptors for now: the service has more important troubles
                    continue
                return  # closed
            with connection:
                try:
                    self._answer(connection)
                except OSError as error:  # the other side went away
                    log.debug("control connection broke", extra={"op": "control", "error": str(error)})

    def _answer(self, connection: socket.socket) -> None:
        line = _read_line(connection, _MAX_REQUEST_BYTES, time.monotonic() + _PEER_LIMIT_S)
        answer = json.dumps(self._handled(line), default=str).encode() + b"\n"
        connection.settimeout(_PEER_LIMIT_S)
        connection.sendall(answer)

    def _handled(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = request["command"]
            handler = self.handlers[command]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join(sorted(self.handlers))
            return {"ok": False, "error": f"not a command of this service; it knows {known}"}
        if command != "status":
            log.info("command received", extra={"op": "control", "command": command})
        try:
            return {"ok": True, "result": dict(handler())}
        except Exception as error:  # a question must never end the service
            log.exception("command failed", extra={"op": "control", "command": command})
            return {"ok": False, "error": f"internal error: {type(error).__name__}; see the service's log"}


def ask(folder: Path, command: str, limit_s: float = _CLIENT_LIMIT_S) -> dict[str, Any]:
    """What the service that listens in ``folder`` answers to ``command``.

    Raises:
        ServiceNotRunning: nobody listens there.
        ControlDenied: this user may not talk to it.
        ControlError: it does not answer in time, or not in a readable way, or says no.
    """
    path = folder / _NAME
    deadline = time.monotonic() + limit_s
    try:
        with _opened(folder) as directory, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(limit_s)
            connection.connect(_address(directory))
            connection.sendall(json.dumps({"command": command}).encode() + b"\n")
            line = _read_line(connection, _MAX_ANSWER_BYTES, deadline)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise ServiceNotRunning(path, _instances(folder)) from None
    except PermissionError:
        raise ControlDenied(path) from None
    except TimeoutError:
        raise ControlError(f"the service does not answer on {path} within {limit_s:g} s") from None
    except OSError as error:
        raise ControlError(f"the service cannot be asked on {path}: {error.strerror}") from error
    try:
        answer = json.loads(line)
        if answer["ok"]:
            result: dict[str, Any] = answer["result"]
            return result
        problem = str(answer["error"])
    except (ValueError, TypeError, KeyError):
        raise ControlError(f"the answer on {path} is not readable") from None
    raise ControlError(f"the service says: {problem}")


def _instances(folder: Path) -> list[str]:
    """The instances beside ``folder``, by the folders that studio-worker@.service gives them."""
    found = folder.parent.glob(f"{folder.name}-*/{_NAME}")
    return sorted(path.parent.name.removeprefix(f"{folder.name}-") for path in found)


def _read_line(connection: socket.socket, limit_bytes: int, deadline: float) -> bytes:
    """Up to the first line end, the limit or the end; raises TimeoutError past ``deadline`` (monotonic)."""
    received = bytearray()
    while len(received) < limit_bytes:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connection.recv(min(65536, limit_bytes - len(received)))
        received += piece
        if not piece or b"\n" in piece:
            break
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(received)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _address(directory: int) -> str:
    # A unix address holds 107 bytes (unix(7)); by way of the open folder a path of any length fits.
    return f"/proc/self/fd/{directory}/{_NAME}"


def _listen(directory: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: on Linux the file gets the socket's mode, so it is open to others at no moment.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(_address(directory))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
