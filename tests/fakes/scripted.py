"""A studio that does exactly what a test tells it to: HTTP answers in order, sessions played by hand."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.sync.server import ServerConnection, serve

from studio_worker.studio.wire import SUBPROTOCOL

LIMIT_S = 20.0
"""No wait in a test is longer; nothing waits this long unless something is broken."""


@dataclass(frozen=True)
class Heard:
    """One HTTP request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class ScriptedHttp:
    """Answers each request with the next of ``answers``: (status, headers, JSON body)."""

    def __init__(self, *answers: tuple[int, dict[str, str], Any]) -> None:
        self.heard: list[Heard] = []
        self.on_first: Callable[[], None] = lambda: None
        """Called while the first request waits for its answer."""
        self._answers: queue.SimpleQueue[tuple[int, dict[str, str], Any]] = queue.SimpleQueue()
        for answer in answers:
            self._answers.put(answer)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.heard.append(Heard(self.command, self.path, headers, body))
                if len(outer.heard) == 1:
                    outer.on_first()
                status, extra, answer = outer._answers.get(timeout=LIMIT_S)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response_only(status)
                for name, value in extra.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _serve

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Conversation:
    """One accepted WebSocket connection, held by the test."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        assert connection.request is not None
        self.path = connection.request.path
        self.authorization = connection.request.headers.get("Authorization")
        self.subprotocol = connection.subprotocol
        self.over = threading.Event()

    def receive(self) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(self._connection.recv(LIMIT_S))
        return frame

    def receive_type(self, wanted: str) -> dict[str, Any]:
        """The next frame of a type; others (heartbeats, logs) are passed over, heartbeats acknowledged."""
        while True:
            frame = self.receive()
            if frame["type"] == wanted:
                return frame
            if frame["type"] == "heartbeat":
                with contextlib.suppress(ConnectionClosed):  # it may be closing by now
                    self.send(type="heartbeatAck")

    def send(self, **frame: Any) -> None:
        self.send_raw(json.dumps(frame))

    def send_raw(self, message: str | bytes) -> None:
        self._connection.send(message)

    def welcome(self) -> dict[str, Any]:
        """Take the hello, answer welcome; returns the hello."""
        hello = self.receive()
        assert hello["type"] == "hello"
        self.send(type="welcome", workerId="w1", serverTime="2026-01-01T00:00:00Z")
        return hello

    def send_bad_text(self, content: bytes) -> None:
        """A text frame whose content is no UTF-8, as no library would send it."""
        with self._connection.protocol_mutex:
            self._connection.protocol.writes.append(
                Frame(Opcode.TEXT, content).serialize(mask=False, extensions=[])
            )
            self._connection.send_data()

    def closed_with(self) -> int | None:
        """The code with which the worker closes; what it says before is passed over."""
        try:
            while True:
                self._connection.recv(LIMIT_S)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else None

    def close(self, code: int = 1000, reason: str = "") -> None:
        self._connection.close(code, reason)
        self.over.set()

    def drop(self) -> None:
        """As a pulled cable looks from here: the socket is gone without a close frame."""
        self._connection.socket.shutdown(2)
        self.over.set()


class ScriptedStudio:
    """A WebSocket server whose connections the test takes with :meth:`accept` and plays by hand."""

    def __init__(
        self, *, refuse_with: int | None = None, location: str | None = None, refusals: int | None = None
    ) -> None:
        self.refused = 0
        self._waiting: queue.SimpleQueue[Conversation] = queue.SimpleQueue()
        self._conversations: list[Conversation] = []

        def handle(connection: ServerConnection) -> None:
            conversation = Conversation(connection)
            self._conversations.append(conversation)
            self._waiting.put(conversation)
            conversation.over.wait()  # the library closes the connection when this returns

        def refuse(connection: ServerConnection, _request: object) -> Any:
            if refuse_with is None or self.refused == refusals:
                return None
            self.refused += 1
            response = connection.respond(refuse_with, "no\n")  # type: ignore[arg-type]
            if location is not None:
                response.headers["Location"] = location
            return response

        self._server = serve(
            handle,
            "127.0.0.1",
            0,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            process_request=refuse,
            ping_interval=None,
        )
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def accept(self) -> Conversation:
        """The next connection."""
        return self._waiting.get(timeout=LIMIT_S)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for conversation in self._conversations:
            conversation.over.set()
        self._server.shutdown()
