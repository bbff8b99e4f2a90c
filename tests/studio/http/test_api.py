"""The studio's HTTP calls against a real server."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from studio_worker.errors import DeliveryRefused, RefusedByStudio, StudioUnavailable, UnknownRegistration
from studio_worker.network import uplink
from studio_worker.spool.delivery import Delivery
from studio_worker.studio.http.api import StudioApi, api_root
from tests.fakes.scripted import LIMIT_S, ScriptedHttp
from tests.fakes.servers import black_hole, resolve_to
from tests.lab.worker import delivery


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("https://studio.minis.gg", "https://studio.minis.gg/graphics/api"),
        ("https://studio.minis.gg/", "https://studio.minis.gg/graphics/api"),
        ("https://studio.minis.gg/graphics/api", "https://studio.minis.gg/graphics/api"),
        ("https://studio.minis.gg/graphics/api/", "https://studio.minis.gg/graphics/api"),
        ("https://host/custom", "https://host/custom/graphics/api"),
        ("https://host/custom/graphics/api?x=1#y", "https://host/custom/graphics/api"),
        ("http://127.0.0.1:8765?token=secret", "http://127.0.0.1:8765/graphics/api"),
    ],
)
def test_api_root_accepts_every_form_of_address(given: str, root: str) -> None:
    """Whatever form of the studio's address is configured, the routes come out right."""
    assert api_root(given) == root


def test_session_url_follows_the_scheme() -> None:
    """https becomes wss and http becomes ws, under the same root; ids cannot change the path."""
    assert (
        StudioApi("https://host/custom").session_url("w/1")
        == "wss://host/custom/graphics/api/workers/w%2F1/connect"
    )
    assert StudioApi("http://host").session_url("w") == "ws://host/graphics/api/workers/w/connect"


def test_calls_reach_a_studio_one_of_whose_addresses_swallows_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken IPv6 before a good IPv4 address holds up neither registration nor upload."""
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    with ScriptedHttp((401, {}, {})) as server:
        port = int(server.url.rpartition(":")[2])
        with black_hole("127.0.0.2", port), pytest.raises(UnknownRegistration):
            StudioApi(f"http://studio.example:{port}").poll("r", "secret")


def test_upload_sends_the_protocols_multipart_form(tmp_path: Path) -> None:
    """A picture is uploaded with prompt in full, ext, generationMeta, file name and MIME type."""
    prompt = "ä castle, " * 500
    with ScriptedHttp((200, {}, {})) as server:
        StudioApi(server.url).upload("w1", "token-1", delivery(tmp_path, prompt))
    heard = server.heard[0]
    assert (heard.method, heard.path) == ("POST", "/graphics/api/workers/w1/jobs/job-1/complete")
    assert heard.headers["authorization"] == "Bearer token-1"
    head = f"Content-Type: {heard.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + heard.body)
    parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
    assert set(parts) == {"prompt", "ext", "generationMeta", "image"}
    assert parts["prompt"].get_payload(decode=True).decode() == prompt  # type: ignore[union-attr]
    assert parts["ext"].get_payload(decode=True) == b"png"
    assert parts["generationMeta"].get_payload(decode=True) == b'{"seed": 7}'
    assert parts["image"].get_payload(decode=True) == b"\x89PNG bytes"
    assert parts["image"].get_filename() == "job-1.png"
    assert parts["image"].get_content_type() == "image/png"


@pytest.mark.parametrize("status", [400, 403, 404, 409, 410, 413, 422])
def test_upload_refused_for_good_is_told_apart(tmp_path: Path, status: int) -> None:
    """Answers that no retry will mend are final; 404, 409 and 410 mean that the job is gone."""
    with ScriptedHttp((status, {}, {})) as server, pytest.raises(DeliveryRefused) as caught:
        StudioApi(server.url).upload("w", "t", delivery(tmp_path))
    assert caught.value.status == status
    assert caught.value.job_is_gone == (status in {404, 409, 410})


@pytest.mark.parametrize("status", [301, 407, 408, 429, 500, 502, 503])
def test_upload_that_may_pass_is_to_be_tried_again(tmp_path: Path, status: int) -> None:
    """Passing errors keep the picture, and Retry-After is respected."""
    answer = (status, {"Retry-After": "7", "Location": "/elsewhere"}, {})
    with ScriptedHttp(answer) as server, pytest.raises(StudioUnavailable) as caught:
        StudioApi(server.url).upload("w", "t", delivery(tmp_path))
    assert caught.value.retry_after_s == 7.0


@pytest.mark.parametrize("kind", ["text/html", "text/html; charset=utf-8", "application/xhtml+xml", None])
def test_page_in_place_of_an_answer_is_no_receipt(tmp_path: Path, kind: str | None) -> None:
    """What a network's sign-in page answers for the studio, 200 and all, keeps the picture."""
    headers = {} if kind is None else {"Content-Type": kind}
    page = b"\n<!DOCTYPE html><html><title>Welcome to our network</title></html>"
    with ScriptedHttp((200, headers, page)) as server, pytest.raises(StudioUnavailable, match="web page"):
        StudioApi(server.url).upload("w", "t", delivery(tmp_path))


@pytest.mark.parametrize(
    ("kind", "body"), [("application/json", {}), ("text/html", b"ok"), ("text/plain", b"")]
)
def test_answer_that_is_no_page_is_a_receipt(tmp_path: Path, kind: str, body: Any) -> None:
    """Whatever else a studio says with its 2xx, the picture is delivered."""
    with ScriptedHttp((201, {"Content-Type": kind}, body)) as server:
        StudioApi(server.url).upload("w", "t", delivery(tmp_path))
    assert len(server.heard) == 1


def test_upload_with_a_refused_token_is_neither(tmp_path: Path) -> None:
    """A refused token keeps the picture until the worker is registered again."""
    with ScriptedHttp((401, {}, {})) as server, pytest.raises(RefusedByStudio):
        StudioApi(server.url).upload("w", "t", delivery(tmp_path))


def test_upload_to_a_studio_that_is_gone_is_to_be_tried_again(tmp_path: Path) -> None:
    """A studio that cannot be reached is a passing error without the address's secrets in its text."""
    with ScriptedHttp() as server:
        url = server.url
    with pytest.raises(StudioUnavailable) as caught:
        StudioApi(url + "?token=secret").upload("w", "t", delivery(tmp_path))
    assert "secret" not in str(caught.value)


class Keeping(BaseHTTPRequestHandler):
    """Keeps connections open, and notes which one each request came by."""

    protocol_version = "HTTP/1.1"
    ports: list[int]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.ports.append(self.client_address[1])
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
        self.close_connection = len(self.ports) == 3  # without saying so, as a restart does

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_uploads_in_a_row_share_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture after another goes by the connection that is there; one that was closed meanwhile, or that
    has been idle for too long to be trusted, is replaced without a failure.
    """
    handler = type("Handler", (Keeping,), {"ports": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        api = StudioApi(f"http://127.0.0.1:{server.server_port}")
        for _ in range(4):
            api.upload("w1", "token-1", delivery(tmp_path))
        first, second, third, fourth = handler.ports
        assert first == second == third != fourth
        monkeypatch.setattr("studio_worker.studio.http.transport._WARM_S", 0.0)
        api.upload("w1", "token-1", delivery(tmp_path))
        assert handler.ports[4] != fourth
        server.shutdown()


class Slow(BaseHTTPRequestHandler):
    """Takes nothing of the first upload before it is told to; of the others at once."""

    protocol_version = "HTTP/1.1"
    heard: queue.SimpleQueue[str]
    goes_on: threading.Event

    def do_POST(self) -> None:
        self.heard.put(f"{self.path.split('/')[-2]} begins")
        if "slow" in self.path:
            self.goes_on.wait(LIMIT_S)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.put(f"{self.path.split('/')[-2]} is there")
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


LARGE = b"\x89PNG" + bytes(16 * 1024 * 1024)
"""More than all buffers between two processes of one machine take."""


def large(job_id: str) -> Delivery:
    return Delivery(job_id, "m", "png", "a castle", {}, None, 0.0, in_memory=LARGE)


@contextlib.contextmanager
def slow_studio() -> Iterator[tuple[str, type[Slow]]]:
    handler = type("Handler", (Slow,), {"heard": queue.SimpleQueue(), "goes_on": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_uploads_of_one_box_go_one_after_the_other() -> None:
    """A second picture does not take half of the link from the first, which so is there first; calls without
    a picture wait for neither.
    """
    with slow_studio() as (url, studio), ThreadPoolExecutor() as lanes:
        api = StudioApi(url)
        first = lanes.submit(api.upload, "w1", "t", large("slow"))
        assert studio.heard.get(timeout=LIMIT_S) == "slow begins"
        second = lanes.submit(api.upload, "w2", "t", large("second"))
        with pytest.raises(StudioUnavailable):  # answered, and strangely
            api.poll("r", "secret")
        assert studio.heard.empty()
        studio.goes_on.set()
        assert first.result(LIMIT_S) < second.result(LIMIT_S)  # so long each waited for the other
        heard = [studio.heard.get(timeout=LIMIT_S) for _ in range(3)]
    assert heard.index("slow is there") < heard.index("second is there")


def test_upload_that_stalls_does_not_hold_the_others_back_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that takes nothing more is waited for as long as is said, then the next goes past it."""
    monkeypatch.setattr(uplink, "LONGEST_S", 0.05)
    with slow_studio() as (url, studio), ThreadPoolExecutor() as lanes:
        api = StudioApi(url)
        first = lanes.submit(api.upload, "w1", "t", large("slow"))
        assert studio.heard.get(timeout=LIMIT_S) == "slow begins"
        assert api.upload("w2", "t", large("second")) > 0.0
        assert not first.done()
        studio.goes_on.set()
        first.result(LIMIT_S)
