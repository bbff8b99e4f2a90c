"""What the service has its link do first: a picture that is uploaded, then models that come."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from pathlib import Path
from typing import Self

import pytest

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from tests.fakes.servers import FileServer
from tests.lab.service import (
    READY_S,
    await_log,
    await_online,
    await_status,
    hurried,
    override,
    queue_synthetic,
    reload,
    require,
    status,
)

LARGE = random.Random(1).randbytes(20_000_000)

PATIENT = """
import dataclasses
import studio_worker.network.uplink as uplink
from studio_worker.spool.outbox import Outbox

uplink.LONGEST_S, uplink.REST_S = 600.0, uplink.ROUND_S
add = Outbox.add

def padded(self, job, picture, *args, **kwargs):
    return add(self, job, dataclasses.replace(picture, data=picture.data + bytes(4_000_000)), *args, **kwargs)

Outbox.add = padded
"""
"""Downloads rest for as long as an upload is under way, and pictures are longer than what buffers take."""


class HoldingProxy:
    """Before a studio: takes little of an upload until :meth:`release`; lets all else through. A context
    manager.
    """

    def __init__(self, studio: LocalStudio) -> None:
        self._studio_port = studio.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        self._released = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.held = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def release(self) -> None:
        self._released.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._studio_port))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(16 * 1024):
                if b"/complete HTTP/1.1\r\n" in piece and not self._released.is_set():
                    self.held.set()
                    self._released.wait()
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.welcoming_studio
def test_model_that_a_reload_requires_comes_beside_the_work_and_after_a_picture(
    tmp_path: Path, studio: LocalStudio, site: Path
) -> None:
    """A picture that is being uploaded has the link for itself; the model comes whole behind it, in one
    go.
    """
    environment = hurried(tmp_path, 30.0)
    with (tmp_path / "sitecustomize.py").open("a") as file:
        file.write(PATIENT)
    with FileServer() as server, HoldingProxy(studio) as proxy:
        model = server.serve("/large.safetensors", LARGE)
        override(site, f'[studio]\napi_base_url = "{proxy.url}"\n')
        with ServiceProcess(site, tmp_path / "log", environment) as running:
            await_online(studio)
            job_id = queue_synthetic(studio)
            assert proxy.held.wait(READY_S)
            require(site, "large", model)
            reload(running)
            while not model.bytes_sent:
                threading.Event().wait(0.01)
            # To ask takes longer than 20 MB do.
            assert status(site)["downloads"]["done"] == 0
            proxy.release()
            await_status(studio, job_id, "done")
            await_log(running, "download done")
            assert running.stop() == 0
    assert model.bytes_sent < 1.5 * len(LARGE)
    assert not any(line["message"].startswith("download failed") for line in running.log_lines())
