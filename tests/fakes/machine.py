"""A worker played by hand, for tests of the local studio."""

from __future__ import annotations

import hashlib
import json
import secrets
import ssl
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any

import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from studio_worker.local_studio import LocalStudio
from studio_worker.studio import wire

CAPABILITIES: dict[str, Any] = {
    "machineName": "box",
    "username": "painter",
    "agentVersion": "0.5.0",
    "engine": "multi",
    "vramTotalGb": 24.0,
    "vramThresholdGb": 20.0,
    "autoEnabled": True,
    "autoStart": True,
    "supportedModels": ["sd-cpp:*"],
    "taskKinds": ["image"],
    "supportedModelsPerKind": {"image": ["sd-cpp:*"]},
}


SOURCE: dict[str, Any] = {"engine": "synthetic", "files": [], "cliDefaults": {"steps": 4}}
PICTURE = b"RIFF\x00\x00\x00\x00WEBPVP8 and so on"
WAIT_S = 5.0


class Machine:
    """A scripted worker: it says exactly what a test tells it to, and keeps what the studio answers."""

    def __init__(self, studio: LocalStudio, *, name: str = "box", approve: bool = True) -> None:
        self.turn_to(studio)
        self.install_id = str(uuid.uuid4())
        self.capabilities = CAPABILITIES | {"machineName": name}
        self.worker_id = ""
        self.token = ""
        self.request_id = ""
        self.secret = ""
        self.socket: ClientConnection | None = None
        self._early: deque[dict[str, Any]] = deque()
        self.register()
        if approve:
            studio.approve(self.request_id)
            self.fetch_token()

    def turn_to(self, studio: LocalStudio) -> Machine:
        """From now on this is the studio, or the process of it, that the worker talks to."""
        self.studio = studio
        self.api = f"{studio.base_url}/graphics/api"
        return self

    def register(self, *, new_secret: bool = True) -> None:
        if new_secret:
            self.secret = secrets.token_hex(32)
        body = {
            "installId": self.install_id,
            "registrationSecretHash": hashlib.sha256(self.secret.encode("ascii")).hexdigest(),
            "capabilities": self.capabilities,
            "userAgent": "studio-worker/0.5.0",
        }
        answer = requests.post(f"{self.api}/workers/register-request", json=body, timeout=WAIT_S)
        assert answer.status_code == 200
        assert answer.json()["status"] == "pending"
        self.request_id = answer.json()["requestId"]

    def poll(self, *, secret: str | None = None, request_id: str | None = None) -> requests.Response:
        return requests.get(
            f"{self.api}/workers/register-requests/{request_id or self.request_id}",
            headers={"Authorization": f"Bearer {secret or self.secret}"},
            timeout=WAIT_S,
        )

    def fetch_token(self) -> None:
        answer = self.poll().json()
        assert answer["status"] == "approved"
        self.worker_id, self.token = answer["workerId"], answer["authToken"]

    def dial(
        self,
        *,
        token: str | None = None,
        subprotocol: str | None = wire.SUBPROTOCOL,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> ClientConnection:
        bearer = f"Bearer {self.token if token is None else token}"
        dialing = connect(
            f"{self.api.replace('http', 'ws', 1)}/workers/{self.worker_id}/connect",
            additional_headers={"Authorization": bearer, **(headers or {})},
            ssl=tls,
            subprotocols=[subprotocol] if subprotocol else None,  # type: ignore[list-item]
            open_timeout=WAIT_S,
            close_timeout=0.2,
        )
        return dialing.__enter__()  # closed by hang_up(), closing() or the fixture

    def connect(self, **how: Any) -> Machine:
        """Dial (see :meth:`dial` for ``how``), say hello, be welcomed."""
        self.socket = self.dial(**how)
        self.say("hello", authToken=self.token, capabilities=self.capabilities)
        assert self.hear()["type"] == "welcome"
        return self

    def say(self, kind: str, **fields: Any) -> None:
        assert self.socket is not None
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self, within_s: float = WAIT_S) -> dict[str, Any]:
        return self._early.popleft() if self._early else self._received(within_s)

    def beat(self, job_id: str | None = None, **capabilities: Any) -> None:
        """One heartbeat and its acknowledgement."""
        extra = {} if job_id is None else {"currentJobId": job_id}
        self.say("heartbeat", capabilities=self.capabilities | capabilities, **extra)
        while (frame := self._received(WAIT_S))["type"] == "offer":  # a job that came is offered at once
            self._early.append(frame)
        assert frame == {"type": "heartbeatAck"}

    def _received(self, within_s: float) -> dict[str, Any]:
        assert self.socket is not None
        frame: dict[str, Any] = json.loads(self.socket.recv(timeout=within_s))
        return frame

    def hears_nothing(self) -> bool:
        """Whether the studio has nothing to say: the next thing heard is a busy heartbeat's answer."""
        self.beat(job_id="something else")
        return not self._early

    def take(self) -> dict[str, Any]:
        """The claim that follows an idle heartbeat, accepted."""
        claim = self.offered()
        self.say("accept", jobId=claim["jobId"])
        return claim

    def offered(self) -> dict[str, Any]:
        """The claim that follows an idle heartbeat, or comes by itself at the same moment."""
        self.say("heartbeat", capabilities=self.capabilities)
        frames = {frame["type"]: frame for frame in (self.hear(), self.hear())}
        assert set(frames) == {"heartbeatAck", "offer"}
        claim: dict[str, Any] = frames["offer"]["claim"]
        return claim

    def upload(
        self, job_id: str, content: bytes = PICTURE, *, token: str | None = None, **fields: str
    ) -> requests.Response:
        form = {"prompt": "a red fox", "ext": "webp"} | fields
        return requests.post(
            f"{self.api}/workers/{self.worker_id}/jobs/{job_id}/complete",
            headers={"Authorization": f"Bearer {token or self.token}"},
            data=form,
            files={"image": (f"{job_id}.webp", content, "image/webp")},
            timeout=WAIT_S,
        )

    def closing(self) -> tuple[list[dict[str, Any]], int]:
        """What the studio still says, and the code it closes with."""
        assert self.socket is not None
        frames: list[dict[str, Any]] = []
        while True:
            try:
                frames.append(self.hear())
            except ConnectionClosed as closed:
                return frames, closed.rcvd.code if closed.rcvd else 0

    def hang_up(self) -> None:
        """Close, and wait until the studio has noticed."""
        assert self.socket is not None
        self.socket.close()
        self.studio.wait_for(lambda: not self.studio.is_online(self.worker_id), WAIT_S)


def queue(studio: LocalStudio, **more: Any) -> str:
    task = {"prompt": "a red fox", "width": 64, "height": 64} | more.pop("task", {})
    return studio.queue_job(model="test", task=task, model_source=SOURCE, **more)
