"""The local studio as one object: a studio and the web server in front of it."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn

from studio_worker.errors import ConfigError, StudioWorkerError
from studio_worker.local_studio.door import LOOPBACK, Door
from studio_worker.local_studio.ending import Ending
from studio_worker.local_studio.facts import Facts
from studio_worker.local_studio.housekeeping import FOR_EVER, Retention
from studio_worker.local_studio.limits import Limits
from studio_worker.local_studio.places import Places
from studio_worker.local_studio.studio import Studio
from studio_worker.local_studio.token_mark import compare_token
from studio_worker.local_studio.web import seldom
from studio_worker.local_studio.web.access import Access
from studio_worker.local_studio.web.app import build_app
from studio_worker.local_studio.web.handshake import secured
from studio_worker.local_studio.web.proxy import Proxied
from studio_worker.local_studio.web.upgrade import Upgrade
from studio_worker.local_studio.web.visit import visits_of
from studio_worker.network.crowd import most_connections

logger = logging.getLogger(__name__)

MODELS_FOLDER = "models"
MIN_TOKEN_CHARS = 16
MAX_FRAME_BYTES = 1 << 20
SHUTDOWN_S = 5
MAX_CONNECTIONS = 512
"""Hundreds of workers with a session each, and the people who watch."""
_BACKLOG = 128


class LocalStudio(Studio):
    """A studio that listens. One object is started and stopped once; the file and the port may be used again.

    Args:
        places: the SQLite file, with pictures in a folder beside it; or that and what keeps the pictures.
        door: after :meth:`start` the attribute ``port`` holds the real one.
        models_dir: folder whose files workers may fetch under ``/models``.
        auto_approve: let every machine in that asks. For demos.
        retention: how long, and how much, is kept.

    Raises:
        ConfigError: the door would let strangers in, or the database cannot be used.
    """

    def __init__(
        self,
        places: Path | Places,
        *,
        door: Door = LOOPBACK,
        models_dir: Path | None = None,
        auto_approve: bool = False,
        limits: Limits | None = None,
        retention: Retention = FOR_EVER,
    ) -> None:
        door.check()
        seldom.limit_lines()
        super().__init__(places, limits, retention)
        self.door = door
        self.port = door.port
        app = build_app(
            self, access=Access(door.token or None), models_dir=models_dir, auto_approve=auto_approve
        )
        visits = visits_of(most_connections(MAX_CONNECTIONS, each=2))  # a file is open for some
        self._server = _Server(
            uvicorn.Config(
                Proxied(app, door.proxies) if door.proxies else app,
                http=secured(visits, door.tls) if door.tls else visits,
                proxy_headers=False,  # nobody is believed who was not named
                # The loop takes as many at once, and where descriptors are short logs a traceback for each.
                backlog=_BACKLOG,
                access_log=False,  # it would hold ?token=
                lifespan="off",
                log_config=None,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_S,
                ws=Upgrade,
                ws_max_size=MAX_FRAME_BYTES,
                # Heartbeats are the protocol's signs of life; pings would be a second opinion.
                ws_ping_interval=None,
            )
        )
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """The studio's address for programs of this machine, without a path."""
        return self.door.address(self.port)

    def facts(self) -> Facts:
        """For the metrics, at the moment of asking."""
        tls = self.door.tls
        return replace(super().facts(), certificate_ends_at=None if tls is None else tls.expires_at)

    def start(self) -> Self:
        """Listen; returns when connections are taken.

        Raises:
            ConfigError: the address cannot be used.
        """
        try:
            listener = _listen(self.door.host, self.port)
        except ConfigError:
            self.stop()
            raise
        self.port = listener.getsockname()[1]
        self.wake.start(self.hear)
        self.pulse.start(self.base_url)
        compare_token(self.database, self.presence, self.door.token)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="local-studio", daemon=True
        )
        self._thread.start()
        self._server.settled.wait()
        if not self._server.started:
            self.stop()
            raise ConfigError("the web server did not start", cure="see the log above for its reason")
        self.housekeeping.start()
        logger.debug("local studio listens", extra={"host": self.door.host, "port": self.port})
        return self

    def stop(self) -> None:
        """Close all sessions, whose workers are to come back with their jobs, and the database."""
        self.attendance.is_leaving = self.attendance.is_stopping = True
        self.changes.bump()  # wakes the event streams, which then end
        if self._thread is not None:
            self._server.stop_soon()
            self._thread.join()
        self.housekeeping.stop()
        self.pulse.stop()
        self.wake.stop()
        self.changes.forget_listeners()
        self.database.close()
        logger.debug("local studio stopped")

    def serve_forever(self, on_ready: Callable[[Self], None] | None = None) -> None:
        """Listen until SIGINT or SIGTERM. Only from the main thread. SIGHUP renews a certificate of its own;
        without one it ends a studio whose terminal was closed.

        Args:
            on_ready: called once connections are taken.

        Raises:
            ConfigError: the address cannot be used.
            StudioWorkerError: the web server ended by itself.
        """
        ending, tls = self._server.ending, self.door.tls
        with ending.heeding_signals(None if tls is None else tls.renew), self:
            if on_ready is not None:
                on_ready(self)
            ending.asked.wait()
            self._leave(ending)
            if self._thread is None or not self._thread.is_alive():
                raise StudioWorkerError("the web server ended unasked; see the log above for its reason")

    def _leave(self, ending: Ending) -> None:
        """Serve on for a while, and say that it is over, so that nobody is sent to a closed door."""
        if self.door.leaves_after_s and not ending.now.is_set():
            self.attendance.is_leaving = True
            logger.info("not ready any more; the end follows", extra={"drain_s": self.door.leaves_after_s})
            ending.now.wait(self.door.leaves_after_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run_local_studio(
    places: Places,
    door: Door,
    *,
    models_dir: Path | None,
    auto_approve: bool = False,
    retention: Retention = FOR_EVER,
    on_ready: Callable[[LocalStudio], None] | None = None,
) -> None:
    """Run a local studio until SIGINT or SIGTERM: what ``studio-worker local-studio`` does.

    Args:
        models_dir: model files for workers; ``None`` serves none.
        retention: how long, and how much, is kept.
        on_ready: called once the studio listens, e.g. to print its address.

    Raises:
        ConfigError: a mistake of the operator, with its cure.
    """
    if door.token is not None and len(door.token) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"the token has fewer than {MIN_TOKEN_CHARS} characters",
            cure="make a longer one, e.g. with: openssl rand -hex 32",
            key="--token-file",
        )
    studio = LocalStudio(
        places,
        door=door,
        models_dir=models_dir,
        auto_approve=auto_approve,
        retention=retention,
    )
    studio.serve_forever(on_ready)


class _Server(uvicorn.Server):
    """A uvicorn server that says when it listens (``settled``) and when it should or did end (``ending``)."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()
        self.ending = Ending()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self.settled.set()
            self.ending.end()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()

    def stop_soon(self) -> None:
        """From any thread."""
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(
            f"{host!r} is no address of this machine", cure="use 127.0.0.1", key="--host"
        ) from error
    try:
        # A studio that was just stopped leaves connections in TIME_WAIT; they must not bar the next one.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use", cure="stop what listens there, or choose another port", key="--port"
            ) from error
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error.strerror})",
            cure="choose an address of this machine and a port above 1023",
            key="--host",
        ) from error
    return listener
