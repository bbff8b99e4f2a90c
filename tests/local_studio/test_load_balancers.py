"""The shipped examples of load balancers in front of a studio, each where its program is installed."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from studio_worker.local_studio import Door, LocalStudio
from tests.fakes.certificates import Certificate, certificate
from tests.fakes.machine import PICTURE, Machine, queue
from tests.fakes.servers import free_port
from tests.lab.programs import program

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples" / "load-balancer"
TOKEN = "a token of sufficient length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
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


@pytest.mark.parametrize("recipe", [nginx, haproxy, caddy])
def test_worker_is_served_through_a_load_balancer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """Session, offer with the balancer's addresses, a large upload and the login go through, while
    the second studio of the example is away.
    """
    shown = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(shown.authority))
    port, away = free_port(), free_port()
    door = Door(token=TOKEN, proxies=("127.0.0.1",))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door, auto_approve=True) as studio:
        command = recipe(tmp_path, shown, port, [f"127.0.0.1:{studio.port}", f"127.0.0.1:{away}"])
        with running(command, port, tmp_path / "log"):
            front = f"https://127.0.0.1:{port}"
            monkeypatch.setattr(LocalStudio, "base_url", front)
            for _ in range(3):  # also when it is the other one's turn
                state = requests.get(f"{front}/api/state", headers=BEARER, timeout=WAIT_S)
                assert state.json()["baseUrl"] == front
            login = requests.post(
                f"{front}/login",
                data={"token": TOKEN},
                headers={"Origin": front},
                timeout=WAIT_S,
                allow_redirects=False,
            )
            assert "Secure" in login.headers["Set-Cookie"]
            machine = Machine(studio, approve=False)
            machine.fetch_token()
            machine.connect(tls=ssl.create_default_context(cafile=shown.authority))
            job_id = queue(studio, task={"initImageUrl": "/files/x"})
            assert machine.take()["task"]["initImageUrl"] == f"{front}/files/x"
            content = PICTURE + bytes(5_000_000)
            assert machine.upload(job_id, content).status_code == 200
            assert studio.result(job_id) == content
            machine.hang_up()
