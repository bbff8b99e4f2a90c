"""A PostgreSQL server of the tests' own: one cluster in a temporary folder, one database for each test.

It is Debian's package (``postgresql``), of which only the programs are used: no cluster of the system is
touched. Nothing is kept on disk for a loss of power (``fsync=off``), but everything is for a crash of the
server, so :meth:`Cluster.kill` and :meth:`Cluster.start` lose no commit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql

from tests.fakes.servers import free_port

USER = "studio"
WAIT_S = 60.0
_PROGRAMS = "/usr/lib/postgresql"
_CONNECTIONS = 300
_AS_NOBODY = ("--reuid=nobody", "--regid=nogroup", "--clear-groups")


class NotInstalled(Exception):
    """This machine has no PostgreSQL server."""

    def __init__(self) -> None:
        super().__init__(f"no PostgreSQL server below {_PROGRAMS}: as root, apt-get install postgresql")


class NotStarted(Exception):
    """The server ended, or was not ready in time; the text ends with what it logged last."""


def programs() -> Path:
    """The folder with the newest server's programs. Raises NotInstalled."""
    found = [path.parent for path in Path(_PROGRAMS).glob("*/bin/postgres")]
    if not found:
        raise NotInstalled
    return max(found, key=lambda path: int(path.parent.name))


class Cluster:
    """One server with its files, started at once; ends, and is removed, with the ``with`` block.

    ``initdb`` and ``postgres`` refuse to run as root, so root has ``nobody`` run them. It listens on a socket
    in its folder and, for what a proxy of the tests' has to come between, on a port of loopback.
    """

    def __init__(self) -> None:
        self._programs = programs()
        # Short and of everybody's: a socket's path has 107 characters at most, and nobody must get there.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        if os.geteuid() == 0:
            shutil.chown(self._folder, "nobody", "nogroup")
        self.port = free_port()
        try:
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise

    def url(self, database: str = "postgres", *, tcp: bool = False) -> str:
        """The address of one of its databases, by its socket unless ``tcp``."""
        if tcp:
            return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"
        return f"postgresql://{USER}@/{database}?host={self._folder}&port={self.port}"

    def create(self, template: str | None = None) -> str:
        """A new database, empty or a copy of one that nobody is connected to; returns its name."""
        self._made += 1
        name = f"test_{self._made}"
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)
        return name

    def drop(self, database: str) -> None:
        """Remove a database; whoever is still connected to it is thrown out."""
        statement = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database))
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)

    def start(self) -> None:
        """Run the server; returns when it takes connections. Raises NotStarted."""
        settings = {
            "unix_socket_directories": str(self._folder),
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "max_connections": str(_CONNECTIONS),
            "fsync": "off",
            "full_page_writes": "off",
            "track_commit_timestamp": "on",  # for the simulation, whose judge asks what could be seen when
        }
        said = [f"--{name}={value}" for name, value in settings.items()]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_unprivileged(), str(self._programs / "postgres"), "-D", str(self._files), *said],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + WAIT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NotStarted(f"PostgreSQL did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it in good order; open transactions are rolled back, their clients told."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End it as a crash would: connections break, and the next start recovers from the log."""
        self._end(signal.SIGQUIT)  # not SIGKILL, which would leave its children behind for a while

    def stand_still(self) -> None:
        """From now on it does nothing, as on a machine that was paused: the kernel takes what is sent."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After it stood still."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its files."""
        self._end(signal.SIGQUIT)
        shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- within -------------------------------------------------------------------------------------

    @property
    def _files(self) -> Path:
        return self._folder / "data"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _initialise(self) -> None:
        options = ["--auth=trust", f"--username={USER}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(
            [*_unprivileged(), str(self._programs / "initdb"), "-D", str(self._files), *options],
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise NotStarted(f"initdb failed: {done.stdout}{done.stderr}")

    def _is_ready(self) -> bool:
        try:
            psycopg.connect(self.url()).close()
        except psycopg.OperationalError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        """To all its processes, first to the one that makes the others."""
        assert self._process is not None
        os.kill(self._process.pid, number)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(WAIT_S)


def _unprivileged() -> list[str]:
    """What makes a server of the tests end with them, and for root run as a user who owns nothing."""
    # The signal comes when the *thread* ends that started the server, so that must be one that stays.
    return ["setpriv", "--pdeathsig=QUIT", *(_AS_NOBODY if os.geteuid() == 0 else ())]
