"""What the fuzzer tries an input with, by target. Whatever leaves an attempt is a fault.

Each imports what it tries itself: another target's process does without.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Attempt = Callable[[Any], None]


@contextlib.contextmanager
def frames(folder: Path) -> Iterator[Attempt]:
    """A session over a real socket goes on after any frame, or ends for a documented reason."""
    import queue

    from websockets.exceptions import ConnectionClosed

    from studio_worker.errors import FrameError, ProtocolError
    from studio_worker.studio.wire import read_studio_frame
    from tests.fakes.scripted import Conversation, ScriptedStudio
    from tests.lab.session import Running

    with ScriptedStudio() as studio, _no_tracebacks():
        running, conversation, number = Running(studio), None, 0
        nothing_is_taken = {"on_demand": False, "is_on_box": lambda files: False}
        running.odd.update(nothing_is_taken)

        def connected() -> Conversation:
            nonlocal running
            while True:
                with contextlib.suppress(queue.Empty):
                    found = studio._waiting.get(timeout=0.1)
                    found.welcome()
                    return found
                if not running._thread.is_alive():
                    assert isinstance(running.end(), ProtocolError), running.ended_with
                    running = Running(studio)
                    running.odd.update(nothing_is_taken)

        def attempt(frame: str | bytes) -> None:
            nonlocal conversation, number
            number += 1
            with contextlib.suppress(FrameError):
                read_studio_frame(frame)
            for _ in range(3):  # where it was closed for this frame, by the next connection
                conversation = conversation or connected()
                try:
                    conversation.send_raw(frame)
                    frame = '{"type": "heartbeatAck"}'
                    conversation.send(type="offer", claim={"jobId": f"asked-{number}"})
                    while conversation.receive_type("reject")["jobId"] != f"asked-{number}":
                        pass
                    return
                except ConnectionClosed:
                    conversation.over.set()
                    conversation = None
            raise AssertionError("the session does not answer")

        yield attempt
        running.stop()
        running.end()


@contextlib.contextmanager
def offers(folder: Path) -> Iterator[Attempt]:
    """An offer is judged with the real store, outbox and spool, models of every kind on the box."""
    from studio_worker.box.device import Device
    from studio_worker.errors import StudioWorkerError
    from studio_worker.models import ModelSource
    from studio_worker.store import Store
    from studio_worker.studio.session.offers import judge
    from tests.fuzz.inputs import SOURCES, adopted
    from tests.lab.abilities import abilities_of

    store = Store(folder / "models")
    for source in SOURCES:
        for file in ModelSource.model_validate(source).files:
            adopted(store, file, folder / "new")
    _, situation = abilities_of(folder, Device("cpu", "cpu", 24.0))

    def attempt(claim: str) -> None:
        told = json.loads(claim)
        if isinstance(told, dict):
            with contextlib.suppress(StudioWorkerError, OSError):
                judge(told, situation)

    yield attempt


@contextlib.contextmanager
def headers(folder: Path) -> Iterator[Attempt]:
    """Headers of safetensors and GGUF files are read, and what their model is and needs is told from them."""
    from studio_worker.box.device import Device
    from studio_worker.engine.files.checkpoint import read_checkpoint
    from studio_worker.engine.loras.files import read_lora
    from studio_worker.engine.rendering.estimate import Estimates
    from studio_worker.errors import JobError
    from studio_worker.formats import header_bytes, header_problem
    from studio_worker.jobs import ImageTask
    from studio_worker.models import CliDefaults, LocalFile

    estimates, number = Estimates(Device("cpu", "cpu", 24.0)), 0

    def attempt(made: tuple[bytes, int, str]) -> None:
        nonlocal number
        number += 1
        data, size, ending = made
        path = folder / f"model.{ending}"
        with path.open("wb") as file:
            file.write(data)
            file.truncate(max(size, len(data)))  # weights are zeros that take no room
        header_problem(path, path.name)
        for length in (len(data) // 2, len(data)):
            header_bytes(data[:length])
        with contextlib.suppress(JobError):
            read_checkpoint(path)
        with contextlib.suppress(JobError):
            read_lora(LocalFile("lora", path, str(number)))
        for role in ("model", "diffusion-model"):
            with contextlib.suppress(JobError):
                told = LocalFile(role, path, f"{number}-{role}")  # type: ignore[arg-type]
                estimates.needed_bytes([told], ImageTask(prompt="x"), CliDefaults(), "sd-cpp")

    yield attempt


@contextlib.contextmanager
def tars(folder: Path) -> Iterator[Attempt]:
    """A bundle brings files whose hash is right to their places, or is refused."""
    import hashlib
    import shutil

    from studio_worker.errors import StoreError
    from studio_worker.store import Store
    from studio_worker.store.bundles import import_bundle

    def attempt(bundle: bytes) -> None:
        path, root = folder / "bundle.tar", folder / "models"
        path.write_bytes(bundle)
        shutil.rmtree(root, ignore_errors=True)
        with contextlib.suppress(StoreError):
            import_bundle(Store(root), path)
        for name, entry in Store(root).entries().items():
            assert hashlib.sha256((root / name).read_bytes()).hexdigest() == entry.sha256
        assert {each.name for each in folder.iterdir()} <= {"bundle.tar", "models"}

    yield attempt


@contextlib.contextmanager
def http(folder: Path) -> Iterator[Attempt]:
    """Registration, its poll, an upload and a download over a real socket, whatever is answered."""
    import threading

    from studio_worker.download import download_file
    from studio_worker.errors import DownloadCancelled, DownloadError, ProtocolError
    from studio_worker.spool.delivery import Delivery
    from studio_worker.studio.http.api import StudioApi
    from studio_worker.studio.wire import RegisterRequest
    from studio_worker.transfer.policy import Policy
    from tests.fuzz.inputs import CONTENT, SHA256, Answering
    from tests.lab.frames import CAPABILITIES

    picture = folder / "picture"
    picture.write_bytes(b"a picture")
    delivery = Delivery("j", "m", "png", "a castle", {"seed": 7}, picture, finished_at=0.0)
    asked = RegisterRequest(
        install_id="i", registration_secret_hash="0" * 64, capabilities=CAPABILITIES, user_agent="tests"
    )
    policy = Policy(connect_s=5, stall_s=5, delays_s=(0.0,))
    with Answering() as server, _loopback_only():

        def download(sha256: str | None) -> None:
            dest, cancel = folder / "model.bin", threading.Event()
            dest.unlink(missing_ok=True)
            patience = threading.Timer(0.3, cancel.set)  # it may have been asked to come again in an hour
            patience.start()
            try:
                download_file(f"{server.url}/m", dest, sha256=sha256, cancel=cancel, policy=policy)
                assert sha256 is None or dest.read_bytes() == CONTENT
            except (DownloadError, DownloadCancelled):
                assert not dest.exists()
            finally:
                patience.cancel()

        def attempt(made: tuple[str, bytes]) -> None:
            call, server.answer = made
            api = StudioApi(server.url)
            with contextlib.suppress(ProtocolError):
                if call == "register":
                    api.register(asked)
                elif call == "poll":
                    api.poll("r", "secret")
                elif call == "upload":
                    api.upload("w", "token", delivery)
                else:
                    download(SHA256 if call == "download" else None)

        yield attempt


@contextlib.contextmanager
def pictures(folder: Path) -> Iterator[Attempt]:
    """A picture is decoded by the child, or refused; the child lives as long as it keeps its limits."""
    from studio_worker.engine.images import close, decode_mask, decode_picture, decode_reference
    from studio_worker.errors import JobError

    def attempt(data: bytes) -> None:
        for decode in (
            lambda: decode_picture(data, "picture", 64, 64),
            lambda: decode_mask(data, 64, 64),
            lambda: decode_reference(data),
        ):
            refused = ""
            try:
                decode()
            except JobError as error:
                refused = str(error)
            assert "the process for it ended" not in refused

    yield attempt
    close()


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """What is logged with a traceback is a fault that was caught at the last moment."""

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info or hasattr(record, "traceback"):
                found.append(f"{logging.Formatter().format(record)}\n{record.__dict__.get('traceback')}")

    found: list[str] = []
    watch = Watch()
    logging.getLogger("studio_worker").addHandler(watch)
    yield
    logging.getLogger("studio_worker").removeHandler(watch)
    assert not found, found[0]


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A redirect may name any host; nothing but loopback is asked."""
    real = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **named: Any) -> Any:
        if host not in {"127.0.0.1", b"127.0.0.1"}:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **named)

    socket.getaddrinfo = resolved
    yield
    socket.getaddrinfo = real
