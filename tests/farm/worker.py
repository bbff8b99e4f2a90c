"""A worker of the farm, played in an event loop with hundreds of others. It speaks the protocol as a real one
does, and is one job at a time: session, heartbeats, offers, uploads, and an outbox that keeps a picture until
it is delivered or refused for good. What it makes is a small picture, after as long as it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from tests.fakes.machine import CAPABILITIES
from tests.farm.calls import NoAnswer, multipart, send, send_json
from tests.farm.judge import Account

API = "/graphics/api/workers"
HEARTBEAT_S = 5.0
SILENT_S = 20.0
_FINAL = {4001, 4003, 4004}
"""Close codes after which a worker does not come back."""
_REFUSED = {404, 409, 410}


@dataclass(frozen=True)
class Manner:
    """What this worker is like; chances are of each offer.

    ``lacks`` is a model that it rejects without a code. ``pauses_every_s`` is how long it works between two
    pauses on average; 0 for one that never pauses.
    """

    makes_s: float = 1.0
    loads_s: float = 2.0
    lacks: str = ""
    is_busy: float = 0.0
    fails: float = 0.0
    gives_up: float = 0.0
    pauses_every_s: float = 0.0


@dataclass
class Book:
    """What all workers of a farm note: the account that is judged, and what they saw that must not be."""

    account: Account = field(default_factory=Account)
    offline: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    sessions: int = 0
    offers: int = 0
    made: int = 0
    uploads_again: int = 0
    wrong: list[str] = field(default_factory=list)


class Worker:
    """One worker. :meth:`run` ends when it is cancelled, or when the studio turned it away for good.

    Args:
        port_of: the balancer: a port of some studio process, another one at each call.
        picture: the bytes it delivers for a job.
    """

    def __init__(
        self,
        name: str,
        manner: Manner,
        book: Book,
        port_of: Callable[[], int],
        picture: Callable[[str], bytes],
    ) -> None:
        self._manner = manner
        self._book = book
        self._port_of = port_of
        self._picture = picture
        self._chance = random.Random(name)
        self._capabilities = CAPABILITIES | {"machineName": name}
        self._socket: ClientConnection | None = None
        self._is_paused = False
        self._away_since: float | None = time.time()
        self._in_hand: str | None = None
        self._uploading: str | None = None
        self._loaded = ""
        self._offered_here: set[str] = set()
        self._hopeless: set[str] = set()
        self._outbox: dict[str, bytes] = {}
        self._is_filled = asyncio.Event()
        self.worker_id = ""
        self._token = ""

    async def register(self) -> None:
        """Ask to work here, and fetch the token; the studio lets everybody in."""
        secret = secrets.token_hex(32)
        body = {
            "installId": str(uuid.uuid4()),
            "registrationSecretHash": hashlib.sha256(secret.encode("ascii")).hexdigest(),
            "capabilities": self._capabilities,
            "userAgent": "studio-worker/0.5.0",
        }
        status, answer = await send_json(self._port_of(), "POST", f"{API}/register-request", body)
        assert status == 200, answer
        path = f"{API}/register-requests/{answer['requestId']}"
        status, _, content = await send(self._port_of(), "GET", path, {"Authorization": f"Bearer {secret}"})
        decision = json.loads(content)
        assert decision["status"] == "approved", decision
        self.worker_id, self._token = decision["workerId"], decision["authToken"]

    async def run(self) -> None:
        """Be a worker."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._deliver())
            tasks.create_task(self._pause_at_times())
            await self._keep_session(tasks)

    @property
    def has_pictures(self) -> bool:
        """Whether something waits to be delivered."""
        return bool(self._outbox)

    def drop(self) -> None:
        """Its connection breaks, without a word to either side."""
        if self._socket is not None:
            self._socket.transport.abort()

    def end(self) -> None:
        """All is over: note what is left undone."""
        self._book.account.kept.update(self._outbox)
        self._note_presence(is_here=True)

    # --- the session --------------------------------------------------------------------------------

    async def _keep_session(self, tasks: asyncio.TaskGroup) -> None:
        failures = 0
        while True:
            try:
                failures += 1
                async with asyncio.timeout(15):
                    socket = await self._dial()
                try:
                    await self._greet(socket)
                    failures = 0
                    await self._hold_session(socket, tasks)
                finally:
                    self._left(socket)
            except InvalidStatus as refused:
                if refused.response.status_code == 401:
                    self._book.wrong.append(f"worker {self.worker_id} was answered 401")
                    return
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else None
                if code in _FINAL:
                    self._book.wrong.append(f"worker {self.worker_id} was turned away for good with {code}")
                    return
            except (OSError, TimeoutError, WebSocketException):
                pass
            await asyncio.sleep(min(30.0, 2.0 ** max(0, failures - 1)) * self._chance.uniform(0.5, 1.0))

    async def _dial(self) -> ClientConnection:
        return await connect(
            f"ws://127.0.0.1:{self._port_of()}{API}/{self.worker_id}/connect",
            additional_headers={"Authorization": f"Bearer {self._token}"},
            subprotocols=["studio-worker-v1"],  # type: ignore[list-item]
            compression=None,
            ping_interval=None,
            open_timeout=None,
            close_timeout=1,
        )

    async def _greet(self, socket: ClientConnection) -> None:
        hello = {"type": "hello", "authToken": self._token, "capabilities": self._told()}
        await socket.send(json.dumps(hello))
        welcome = await _hear(socket)
        if welcome.get("code") == "internal_error":
            raise ConnectionError("what the studio keeps its data in does not answer")
        if welcome["type"] != "welcome":
            self._book.wrong.append(f"worker {self.worker_id} was greeted with {welcome}")
        self._book.sessions += 1
        self._socket = socket
        self._offered_here.clear()
        self._note_presence(is_here=True)

    async def _hold_session(self, socket: ClientConnection, tasks: asyncio.TaskGroup) -> None:
        beats = asyncio.create_task(self._beat())
        try:
            while True:
                frame = await _hear(socket)
                if frame["type"] == "offer":
                    await self._offered(frame["claim"], tasks)
                elif frame["type"] == "error" and frame["code"] != "internal_error":
                    self._book.wrong.append(f"worker {self.worker_id}: {frame['code']}: {frame['message']}")
        finally:
            beats.cancel()

    def _left(self, socket: ClientConnection) -> None:
        socket.transport.abort()
        self._socket = None
        self._note_presence(is_here=False)

    async def _beat(self) -> None:
        await asyncio.sleep(self._chance.random())  # the first comes within a second, as the protocol says
        while True:
            await self._beat_once()
            await asyncio.sleep(HEARTBEAT_S)

    async def _beat_once(self) -> None:
        current = self._in_hand or self._uploading
        extra = {} if current is None else {"currentJobId": current}
        await self._say("heartbeat", capabilities=self._told(), **extra)

    async def _say(self, kind: str, **fields: Any) -> None:
        """To a session that is over, or not welcome yet, nothing is said."""
        if self._socket is not None:
            with contextlib.suppress(ConnectionClosed):
                await self._socket.send(json.dumps({"type": kind, **fields}))

    def _told(self) -> dict[str, Any]:
        return self._capabilities | {"autoEnabled": not self._is_paused}

    # --- jobs ---------------------------------------------------------------------------------------

    async def _offered(self, claim: dict[str, Any], tasks: asyncio.TaskGroup) -> None:
        job_id, model = claim["jobId"], claim["model"]
        self._book.offers += 1
        self._offered_here.add(job_id)
        if job_id == self._in_hand or job_id in self._outbox:
            await self._say("accept", jobId=job_id)  # it is being made, or waits to be delivered
        elif job_id in self._hopeless:
            await self._say("accept", jobId=job_id)
            await self._fail(job_id, retryable=False)
        elif self._is_paused:
            await self._say("reject", jobId=job_id, reason="paused", code="paused")
        elif self._in_hand is not None or self._chance.random() < self._manner.is_busy:
            await self._say("reject", jobId=job_id, reason="busy", code="busy")
        elif model == self._manner.lacks or model == "impossible":
            await self._say("reject", jobId=job_id, reason=f"no engine for {model}")
        else:
            self._in_hand = job_id
            await self._say("accept", jobId=job_id)
            tasks.create_task(self._make(job_id, model))

    async def _make(self, job_id: str, model: str) -> None:
        load_s = 0.0 if model == self._loaded else self._manner.loads_s
        self._loaded = model
        await asyncio.sleep((self._manner.makes_s + load_s) * self._chance.uniform(0.5, 1.5))
        lot = self._chance.random()
        self._in_hand = None
        if lot < self._manner.gives_up:
            self._hopeless.add(job_id)
            await self._fail(job_id, retryable=False)
        elif lot < self._manner.gives_up + self._manner.fails:
            await self._fail(job_id, retryable=True)
        else:
            self._book.made += 1
            self._outbox[job_id] = self._picture(job_id)
            self._is_filled.set()

    async def _fail(self, job_id: str, *, retryable: bool) -> None:
        # Of an offer of an earlier session nothing is said, as the real worker does not either.
        if job_id in self._offered_here and self._socket is not None:
            if not retryable:
                self._book.account.hopeless.add(job_id)
            await self._say("fail", jobId=job_id, error="the GPU is on strike", retryable=retryable)

    async def _deliver(self) -> None:
        while True:
            await self._is_filled.wait()
            self._is_filled.clear()
            while self._outbox:
                job_id = self._uploading = next(iter(self._outbox))
                await self._deliver_one(job_id)
                self._uploading = None

    async def _deliver_one(self, job_id: str) -> None:
        fields = {"prompt": f"a red potion for {job_id}", "ext": "png"}
        kind, body = multipart(fields, f"{job_id}.png", self._outbox[job_id], "image/png")
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        path = f"{API}/{self.worker_id}/jobs/{job_id}/complete"
        tries = 0
        while True:
            retry_after_s = 0.0
            try:
                status, told, _ = await send(self._port_of(), "POST", path, headers, body)
                retry_after_s = float(told.get("retry-after", "0"))
            except NoAnswer:
                status = 0
            if 200 <= status < 300:
                self._book.account.delivered[job_id] += 1
                break
            if status in _REFUSED:
                self._book.account.refused[job_id] += 1
                break
            if 400 <= status < 500 and status not in {401, 408, 429}:
                self._book.wrong.append(f"the picture of job {job_id} was answered {status}")
            tries += 1
            self._book.uploads_again += 1
            backoff_s = min(30.0, 2.0 ** (tries - 1)) * self._chance.uniform(0.5, 1.0)
            await asyncio.sleep(max(retry_after_s, backoff_s))
        del self._outbox[job_id]

    # --- pauses, and who was here when --------------------------------------------------------------

    async def _pause_at_times(self) -> None:
        while self._manner.pauses_every_s:
            await asyncio.sleep(self._manner.pauses_every_s * self._chance.uniform(0.5, 1.5))
            for is_paused in (True, False):
                self._is_paused = is_paused
                self._note_presence(is_here=self._socket is not None)
                await self._beat_once()
                await asyncio.sleep(self._chance.uniform(2.0, 6.0) if is_paused else 0.0)

    def _note_presence(self, *, is_here: bool) -> None:
        is_ready, now = is_here and not self._is_paused, time.time()
        if is_ready and self._away_since is not None:
            self._book.offline.setdefault(self.worker_id, []).append((self._away_since, now))
            self._away_since = None
        elif not is_ready and self._away_since is None:
            self._away_since = now


async def _hear(socket: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(SILENT_S):
        frame: dict[str, Any] = json.loads(await socket.recv())
    return frame
