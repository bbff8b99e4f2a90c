"""The studio's frames and bodies, as spoken by studio-worker 0.4.7 and later. No I/O.

JSON field names are camelCase; an absent optional field is left out, never ``null``; readers ignore
fields they do not know. An offer's claim stays raw JSON here: an offer must be answered even where its
claim is malformed, so reading the claim is a later step (:class:`Claim`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from studio_worker.errors import FrameError
from studio_worker.models import CAMEL, Label, Name
from studio_worker.plain import plain

_T = TypeVar("_T")

SUBPROTOCOL = "studio-worker-v1"

RejectCode = Literal["busy", "paused"]
"""Both mean: put the job back in the queue, no attempt counted."""

ErrorCode = Literal[
    "auth_failed", "protocol_violation", "duplicate_worker", "worker_deleted", "internal_error"
]

CLOSE_CODES: dict[str, int] = {
    "auth_failed": 4001,
    "protocol_violation": 4002,
    "duplicate_worker": 4003,
    "worker_deleted": 4004,
    "internal_error": 1000,
}
"""The WebSocket close code that follows each ``error`` frame."""

HEARTBEAT_INTERVAL_S = 5.0
DEAD_PEER_S = 20.0
LOG_BATCH_INTERVAL_S = 1.0
STUDIO_HEARTBEAT_TIMEOUT_S = 30.0
"""The studio closes a session whose last heartbeat is older than this."""


Text = Annotated[str, AfterValidator(plain)]
"""Words for people."""
_REASON_CHARS = 2000
Reason = Annotated[str, AfterValidator(lambda text: plain(text[:_REASON_CHARS]))]
"""Why something was refused or has failed."""


class Body(BaseModel):
    """Base of every frame and body: camelCase on the wire, unknown fields ignored."""

    model_config = CAMEL

    def to_json(self) -> str:
        """The wire's text of this body; absent optional fields are left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class Capabilities(Body):
    """What this worker says of itself. Memory in GiB, whatever the names say; 0 without a GPU."""

    machine_name: Text
    username: Text
    agent_version: Text
    engine: Text = "multi"
    vram_total_gb: float
    vram_threshold_gb: float
    auto_enabled: bool = True
    auto_start: bool = True
    auto_update: bool | None = None
    start_minimised: bool | None = None
    only_when_idle: bool | None = None
    user_presence: Literal["active", "idle"] | None = None
    supported_models: tuple[str, ...] = ()
    task_kinds: tuple[str, ...] = ("image",)
    supported_models_per_kind: dict[str, tuple[str, ...]] = Field(default_factory=dict)


# --- registration -----------------------------------------------------------------------------------


class RegisterRequest(Body):
    """Body of ``POST /workers/register-request``. Only the secret's SHA-256 (hex) travels."""

    install_id: str
    registration_secret_hash: str
    capabilities: Capabilities
    user_agent: Text


class RegisterAnswer(Body):
    """Answer to :class:`RegisterRequest`."""

    request_id: Name = Field(min_length=1)
    status: str = "pending"
    """Not looked at: the poll brings the decision."""


class Pending(Body):
    status: Literal["pending"] = "pending"


class Approved(Body):
    status: Literal["approved"] = "approved"
    worker_id: Name = Field(min_length=1)
    auth_token: str = Field(pattern=r"^[!-~]+$", max_length=8192)
    """Visible ASCII, as a header can carry it (RFC 9110, 5.5)."""


class Rejected(Body):
    status: Literal["rejected"] = "rejected"
    reason: Reason | None = None


Decision = Annotated[Pending | Approved | Rejected, Field(discriminator="status")]
"""Answer to ``GET /workers/register-requests/{requestId}``."""

DECISION: TypeAdapter[Pending | Approved | Rejected] = TypeAdapter(Decision)


# --- worker → studio --------------------------------------------------------------------------------


class Hello(Body):
    type: Literal["hello"] = "hello"
    auth_token: str
    capabilities: Capabilities


class Heartbeat(Body):
    type: Literal["heartbeat"] = "heartbeat"
    capabilities: Capabilities
    current_job_id: str | None = None


class Accept(Body):
    type: Literal["accept"] = "accept"
    job_id: str


class Reject(Body):
    type: Literal["reject"] = "reject"
    job_id: str
    reason: Reason
    code: RejectCode | None = None


class CompleteJson(Body):
    type: Literal["completeJson"] = "completeJson"
    job_id: str
    result: Any
    prompt: str | None = None


class Fail(Body):
    type: Literal["fail"] = "fail"
    job_id: str
    error: Reason
    retryable: bool


class LogEntry(Body):
    """One shipped log line. ``ts`` is ISO 8601, UTC."""

    ts: str
    level: Literal["info", "warn", "error"]
    category: Text
    message: Text
    job_id: Text | None = None


class LogBatch(Body):
    type: Literal["logBatch"] = "logBatch"
    entries: tuple[LogEntry, ...]


WorkerFrame = Hello | Heartbeat | Accept | Reject | CompleteJson | Fail | LogBatch


# --- studio → worker --------------------------------------------------------------------------------


class Welcome(Body):
    type: Literal["welcome"] = "welcome"
    worker_id: Name
    server_time: str | None = None


class Offer(Body):
    type: Literal["offer"] = "offer"
    claim: dict[str, Any]


class HeartbeatAck(Body):
    type: Literal["heartbeatAck"] = "heartbeatAck"


class CompleteAck(Body):
    type: Literal["completeAck"] = "completeAck"
    job_id: str


class FailAck(Body):
    type: Literal["failAck"] = "failAck"
    job_id: str


class ErrorFrame(Body):
    type: Literal["error"] = "error"
    code: Text
    message: Reason = ""


StudioFrame = Welcome | Offer | HeartbeatAck | CompleteAck | FailAck | ErrorFrame

_WORKER_FRAME: TypeAdapter[WorkerFrame] = TypeAdapter(Annotated[WorkerFrame, Field(discriminator="type")])
_STUDIO_FRAME: TypeAdapter[StudioFrame] = TypeAdapter(Annotated[StudioFrame, Field(discriminator="type")])


def read_studio_frame(text: str | bytes) -> StudioFrame:
    """The frame in one WebSocket message from the studio.

    Raises:
        FrameError: binary, not JSON, of an unknown type, or with wrong fields. The text says which,
            without the frame's content (it may hold prompts).
    """
    return _read(_STUDIO_FRAME, text)


def read_worker_frame(text: str | bytes) -> WorkerFrame:
    """The frame in one WebSocket message from a worker (the local studio's side). Raises FrameError."""
    return _read(_WORKER_FRAME, text)


def _read(adapter: TypeAdapter[_T], text: str | bytes) -> _T:
    if isinstance(text, bytes):
        raise FrameError("binary frame")
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise FrameError(f"unreadable frame: {describe(error)}") from None


_PART_CHARS, _PROBLEM_CHARS = 40, 200
"""Both may quote the other side: a field's name, or what stands in place of a frame's type."""


def describe(error: ValidationError) -> str:
    """What pydantic found wrong, field by field, without the values (they may hold prompts or tokens)."""
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        where = ".".join(str(part)[:_PART_CHARS] for part in item["loc"])
        problem = item["msg"].removeprefix("Value error, ")[:_PROBLEM_CHARS]
        problems.append(plain(f"{where}: {problem}" if where else problem))
    return "; ".join(problems[:5])


# --- the offer --------------------------------------------------------------------------------------


class Claim(Body):
    """An offer's claim, its task and model source still raw JSON (each is judged with its own answer)."""

    job_id: Name = Field(min_length=1)
    game_id: Label | None = None
    asset_name: Label | None = None
    model: Label
    vram_gb_estimate: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)
    task: dict[str, Any]
    model_source: dict[str, Any]


MIME_TYPES: dict[str, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpg": "image/jpeg",
    "gif": "image/gif",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
}
"""MIME type of an upload by its extension; anything else is ``application/octet-stream``."""


def mime_type(ext: str) -> str:
    """The MIME type the studio expects for ``ext``."""
    return MIME_TYPES.get(ext, "application/octet-stream")
