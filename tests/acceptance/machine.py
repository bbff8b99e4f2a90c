"""A throw-away machine with its own systemd as process 1, in systemd-nspawn; needs root, Debian and amd64.

The machine's disk is layers: the cached base system, what a test wants on top of it, and what changes while
it runs, which is dropped at the end or kept as a layer for others. It shares the network of its host, so that
servers of the tests on 127.0.0.1 are its own.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

DIES_WITH_PARENT = ("setpriv", "--pdeathsig=KILL")
BOOT_S = 90.0
STOP_S = 60.0
_numbers = itertools.count()


class MachineError(Exception):
    """The machine did not do what was asked; the text has what it printed."""


def _cgroup_root() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise MachineError("this host has no cgroup2 mount")


class Machine:
    """One machine, from boot to power-off; a context manager.

    Args:
        layers: folders that lie below what changes, the topmost first.
        work: a folder for what changes; made and, without ``keep``, removed.
        keep: leave the changes in ``work/changes``, to be another machine's layer; needs :meth:`power_off`.
    """

    def __init__(self, layers: Sequence[Path], work: Path, *, keep: bool = False) -> None:
        self.name = f"acceptance-{os.getpid()}-{next(_numbers)}"
        self.work = work
        self.changes = work / "changes"
        self._layers = layers
        self._keep = keep
        self._leader = 0
        self._cgroup = _cgroup_root() / self.name
        self._console = work / "console.log"
        self._notes: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._listener: socket.socket | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise MachineError("only root can boot a machine")
        for folder in (self.changes, self.work / "scratch", self.work / "root"):
            folder.mkdir(parents=True, exist_ok=True)
        self._cgroup.mkdir()
        address = self.work / "notes"
        address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener.bind(str(address))
        threading.Thread(target=self._listen, args=(self._listener,), daemon=True).start()
        command = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--notify-ready=yes",
        ]
        command += [f"--directory={self.work / 'root'}", f"--machine={self.name}", "--hostname=box"]
        command += ["--console=pipe", "--resolv-conf=replace-host", "--timezone=off", "--link-journal=no"]
        command += ["--system-call-filter=bpf @keyring"]  # bpf: for DeviceAllow= and IPAddressDeny= inside
        wanted: dict[str, Any] = {
            "root": str(self.work / "root"),
            "layers": [str(layer) for layer in self._layers],
            "changes": str(self.changes),
            "scratch": str(self.work / "scratch"),
            "cgroup": self.name,
            "command": command,
        }
        unshared = [*DIES_WITH_PARENT, "unshare", "--mount", "--propagation=private", sys.executable]
        with self._console.open("ab") as console:
            self._supervisor = subprocess.Popen(
                [*unshared, str(Path(__file__).with_name("supervisor.py")), json.dumps(wanted)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "NOTIFY_SOCKET": str(address)},
                start_new_session=True,
            )
        try:
            self._await_boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def console(self) -> str:
        """What the machine has printed since it was switched on."""
        return self._console.read_text()

    def __exit__(self, *_: object) -> None:
        """Whatever still runs is killed, as by a power cut."""
        if self._supervisor is not None and self._supervisor.poll() is None:
            (self._cgroup / "cgroup.kill").write_text("1")
            self._supervisor.wait(STOP_S)
        for folder in sorted(self._cgroup.rglob("*"), reverse=True):
            if folder.is_dir():
                self._remove_cgroup(folder)
        self._remove_cgroup(self._cgroup)
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        if not self._keep:
            shutil.rmtree(self.work)

    @staticmethod
    def _remove_cgroup(folder: Path) -> None:
        """The kernel lets a folder go only when the last killed process is gone."""
        deadline = time.monotonic() + STOP_S
        while True:
            try:
                folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _listen(self, listener: socket.socket) -> None:
        """Take in whatever comes, as long as the machine lives: process 1 would wait for a full socket."""
        while message := listener.recv(8192):
            self._notes.put(message.decode().splitlines())

    def _await_boot(self, since: int = 0) -> None:
        """nspawn tells process 1's id, then that it has booted (sd_notify(3), systemd-nspawn(1)).

        Args:
            since: process 1's id of the boot before, whose messages may still lie there.
        """
        assert self._supervisor is not None
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline:
            if self._supervisor.poll() is not None:
                break
            try:
                lines = self._notes.get(timeout=0.5)
            except queue.Empty:
                continue
            for line in lines:
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    self._leader = int(line.partition("=")[2])
            if "READY=1" in lines and self._leader != since:
                self.run("systemctl", "is-system-running", "--wait", check=False)
                return
        raise MachineError(f"the machine did not boot; its console:\n{self._console.read_text()[-3000:]}")

    def power_off(self) -> None:
        """An orderly end; everything is on disk after it."""
        assert self._supervisor is not None
        self.run("systemctl", "poweroff", "--no-block")
        self._supervisor.wait(STOP_S)

    def reboot(self) -> None:
        """Reboot, and wait until it is up again."""
        self.run("systemctl", "reboot", "--no-block")
        self._await_boot(since=self._leader)

    # --- what runs in it ---

    def run(
        self,
        *command: str,
        check: bool = True,
        limit_s: float = 300.0,
        user: str | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root (or ``user``) in the machine and wait for its end; output as text.

        Raises:
            MachineError: exit status other than 0 with ``check``, or longer than ``limit_s``.
        """
        inside = [
            "nsenter",
            f"--target={self._leader}",
            "--all",
            "--",
            "env",
            "-i",
            "HOME=/root",
            "LANG=C.UTF-8",
        ]
        inside += ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        inside += ["DEBIAN_FRONTEND=noninteractive", "SYSTEMD_PAGER=cat", "SYSTEMD_COLORS=0"]
        if user is not None:
            known = (line.split(":") for line in self.path("/etc/passwd").read_text().splitlines())
            group = next(fields[3] for fields in known if fields[0] == user)
            inside += ["setpriv", f"--reuid={user}", f"--regid={group}", "--init-groups", "--"]
        try:
            done = subprocess.run(
                [*inside, *command], capture_output=True, text=True, timeout=limit_s, input=input, cwd="/"
            )
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"{shlex.join(command)} took longer than {limit_s:g} s") from error
        if check and done.returncode != 0:
            raise MachineError(
                f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def shell(self, script: str, **options: Any) -> str:
        """Run a shell script; returns its stdout. Raises as :meth:`run`."""
        return self.run("sh", "-euc", script, **options).stdout

    def path(self, inside: str) -> Path:
        """A path of the machine as this process sees it."""
        return Path(f"/proc/{self._leader}/root") / inside.lstrip("/")

    def write(self, inside: str, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file of root's, and the folders above it."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)

    def copy_in(self, source: Path, inside: str) -> None:
        """A file or folder of the host's into a folder of the machine."""
        target = self.path(inside)
        target.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target / source.name)

    def host_pids(self, unit: str) -> list[int]:
        """The processes of a unit as this host counts them."""
        processes = self._cgroup / "payload" / "system.slice" / unit / "cgroup.procs"
        return [int(line) for line in processes.read_text().split()]

    # --- what systemd says ---

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def journal(self, unit: str, *more: str) -> list[dict[str, Any]]:
        """The unit's journal entries as journalctl exports them, oldest first."""
        done = self.run("journalctl", f"--unit={unit}", "--output=json", "--all", "--no-pager", *more)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def log_lines(self, unit: str, *more: str) -> list[dict[str, Any]]:
        """What the service itself logged: the parsed JSON of its messages."""
        found = []
        for entry in self.journal(unit, *more):
            message = entry.get("MESSAGE")
            if isinstance(message, str) and message.startswith("{"):
                found.append(json.loads(message))
        return found

    def await_that(self, what: str, condition: Any, limit_s: float = 60.0) -> None:
        """Until ``condition()`` holds; systemd has no event for most of what is waited for here.

        Raises:
            MachineError: it did not within ``limit_s``.
        """
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise MachineError(f"not within {limit_s:g} s: {what}")
            time.sleep(0.1)
