"""The shipped examples of load balancers, run before studios of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fakes.certificates import Certificate
from tests.lab.programs import program

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples" / "load-balancer"
WAIT_S = 20.0

Recipe = Callable[[Path, Certificate, int, list[str]], list[str]]


def example(name: str, studios: list[str]) -> str:
    """Its text, with addresses of this machine."""
    text = (EXAMPLES / name).read_text()
    for theirs, ours in zip(("10.0.0.11:8765", "10.0.0.12:8765"), studios, strict=True):
        assert theirs in text
        text = text.replace(theirs, ours)
    return text


def nginx(folder: Path, shown: Certificate, port: int, studios: list[str]) -> list[str]:
    text = example("nginx.conf", studios).replace("listen 443", f"listen 127.0.0.1:{port}")
    text = text.replace("/etc/ssl/studio/fullchain.pem", str(shown.shown))
    text = text.replace("/etc/ssl/studio/privkey.pem", str(shown.key))
    scratch = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "conf").write_text(
        f"{user}daemon off;\nerror_log stderr;\npid {folder}/pid;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{scratch}{text}\n}}\n"
    )
    return ["nginx", "-e", "stderr", "-c", str(folder / "conf")]


def haproxy(folder: Path, shown: Certificate, port: int, studios: list[str]) -> list[str]:
    (folder / "both.pem").write_text(shown.shown.read_text() + shown.key.read_text())
    text = example("haproxy.cfg", studios).replace("bind :443", f"bind 127.0.0.1:{port}")
    (folder / "conf").write_text(text.replace("/etc/haproxy/studio.pem", str(folder / "both.pem")))
    return ["haproxy", "-db", "-f", str(folder / "conf")]


def caddy(folder: Path, shown: Certificate, port: int, studios: list[str]) -> list[str]:
    site = f":{port} {{\n\tbind 127.0.0.1\n\ttls {shown.shown} {shown.key}"
    text = example("Caddyfile", studios).replace("studio.example {", site)
    (folder / "conf").write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "conf")]


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A program that listens on ``port``."""
    command = [program(command[0]), *command[1:]]
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            deadline = time.monotonic() + WAIT_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
            yield
        finally:
            process.terminate()


RECIPES: list[Recipe] = [nginx, haproxy, caddy]
