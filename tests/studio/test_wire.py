"""The studio's frames, against literal JSON."""

from __future__ import annotations

import contextlib
import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio_worker.errors import FrameError, ProtocolError
from studio_worker.studio import wire
from studio_worker.studio.session.protocol import SessionProtocol
from tests.lab.frames import CAPABILITIES, CAPABILITIES_JSON

SENT = [
    (
        wire.Hello(auth_token="t", capabilities=CAPABILITIES),
        {"type": "hello", "authToken": "t", "capabilities": CAPABILITIES_JSON},
    ),
    (wire.Heartbeat(capabilities=CAPABILITIES), {"type": "heartbeat", "capabilities": CAPABILITIES_JSON}),
    (
        wire.Heartbeat(capabilities=CAPABILITIES, current_job_id="j"),
        {"type": "heartbeat", "capabilities": CAPABILITIES_JSON, "currentJobId": "j"},
    ),
    (
        wire.Heartbeat(
            capabilities=CAPABILITIES.model_copy(
                update={
                    "auto_enabled": False,
                    "auto_update": True,
                    "start_minimised": False,
                    "only_when_idle": True,
                    "user_presence": "idle",
                }
            )
        ),
        {
            "type": "heartbeat",
            "capabilities": {
                **CAPABILITIES_JSON,
                "autoEnabled": False,
                "autoUpdate": True,
                "startMinimised": False,
                "onlyWhenIdle": True,
                "userPresence": "idle",
            },
        },
    ),
    (wire.Accept(job_id="j"), {"type": "accept", "jobId": "j"}),
    (wire.Reject(job_id="j", reason="no"), {"type": "reject", "jobId": "j", "reason": "no"}),
    (
        wire.Reject(job_id="j", reason="no", code="busy"),
        {"type": "reject", "jobId": "j", "reason": "no", "code": "busy"},
    ),
    (
        wire.Reject(job_id="j", reason="no", code="paused"),
        {"type": "reject", "jobId": "j", "reason": "no", "code": "paused"},
    ),
    (
        wire.CompleteJson(job_id="j", result=[1, None], prompt="p"),
        {"type": "completeJson", "jobId": "j", "result": [1, None], "prompt": "p"},
    ),
    (
        wire.Fail(job_id="j", error="bad", retryable=True),
        {"type": "fail", "jobId": "j", "error": "bad", "retryable": True},
    ),
    (
        wire.Fail(job_id="j", error="bad", retryable=False),
        {"type": "fail", "jobId": "j", "error": "bad", "retryable": False},
    ),
    (
        wire.CompleteJson(job_id="j", result={"text": "hi"}),
        {"type": "completeJson", "jobId": "j", "result": {"text": "hi"}},
    ),
    (
        wire.LogBatch(
            entries=(wire.LogEntry(ts="2026-01-02T03:04:05.678Z", level="warn", category="job", message="m"),)
        ),
        {
            "type": "logBatch",
            "entries": [
                {"ts": "2026-01-02T03:04:05.678Z", "level": "warn", "category": "job", "message": "m"}
            ],
        },
    ),
]

HEARD = [
    (
        {"type": "welcome", "workerId": "w", "serverTime": "2026-01-02T03:04:05Z"},
        wire.Welcome(worker_id="w", server_time="2026-01-02T03:04:05Z"),
    ),
    ({"type": "offer", "claim": {"jobId": "j", "x": [1]}}, wire.Offer(claim={"jobId": "j", "x": [1]})),
    ({"type": "heartbeatAck"}, wire.HeartbeatAck()),
    ({"type": "completeAck", "jobId": "j"}, wire.CompleteAck(job_id="j")),
    ({"type": "failAck", "jobId": "j"}, wire.FailAck(job_id="j")),
    (
        {"type": "error", "code": "auth_failed", "message": "no"},
        wire.ErrorFrame(code="auth_failed", message="no"),
    ),
]


def test_every_frame_stands_here_as_json() -> None:
    """Each frame of the protocol, in both directions, is held to the very text that the other side writes."""
    assert {type(frame) for frame, _ in SENT} == set(get_args(wire.WorkerFrame))
    assert {type(frame) for _, frame in HEARD} == set(get_args(wire.StudioFrame))


@pytest.mark.parametrize(("frame", "expected"), SENT, ids=lambda value: str(value)[:20])
def test_worker_frame_is_written_as_the_studio_reads_it(frame: wire.WorkerFrame, expected: object) -> None:
    """Every frame the worker sends has exactly the protocol's names, and no null for what is absent."""
    assert json.loads(frame.to_json()) == expected


@pytest.mark.parametrize(("frame", "sent"), SENT, ids=lambda value: str(value)[:20])
def test_worker_frame_is_read_back_by_the_local_studio(frame: wire.WorkerFrame, sent: object) -> None:
    """The local studio understands every frame the worker sends."""
    assert wire.read_worker_frame(json.dumps(sent)) == frame


def test_log_entry_names_its_job_where_it_has_one() -> None:
    """A shipped line carries jobId, or leaves it out."""
    entry = {"ts": "t", "level": "info", "category": "c", "message": "m", "jobId": "j"}
    frame = wire.LogBatch(
        entries=(wire.LogEntry(ts="t", level="info", category="c", message="m", job_id="j"),)
    )
    assert json.loads(frame.to_json())["entries"] == [entry]


def test_register_request_is_what_the_protocol_says() -> None:
    """Four fields, and no secret among them."""
    body = wire.RegisterRequest(
        install_id="i", registration_secret_hash="h", capabilities=CAPABILITIES, user_agent="studio-worker/1"
    )
    assert json.loads(body.to_json()) == {
        "installId": "i",
        "registrationSecretHash": "h",
        "capabilities": CAPABILITIES_JSON,
        "userAgent": "studio-worker/1",
    }


def test_codes_are_the_protocols() -> None:
    """Each error code has its close code."""
    assert wire.CLOSE_CODES == {
        "auth_failed": 4001,
        "protocol_violation": 4002,
        "duplicate_worker": 4003,
        "worker_deleted": 4004,
        "internal_error": 1000,
    }
    assert wire.SUBPROTOCOL == "studio-worker-v1"
    assert (wire.HEARTBEAT_INTERVAL_S, wire.DEAD_PEER_S, wire.LOG_BATCH_INTERVAL_S) == (5.0, 20.0, 1.0)


@pytest.mark.parametrize(("sent", "expected"), HEARD, ids=lambda value: str(value)[:20])
def test_studio_frame_is_read_with_unknown_fields_ignored(
    sent: dict[str, object], expected: wire.StudioFrame
) -> None:
    """A studio that adds a field to any frame does not break an older worker."""
    assert wire.read_studio_frame(json.dumps(sent)) == expected
    assert wire.read_studio_frame(json.dumps({**sent, "newField": {"deep": [1]}})) == expected


@pytest.mark.parametrize(
    "message",
    [
        b'{"type":"heartbeatAck"}',
        "",
        "not json",
        "[]",
        "3",
        '{"type":"fortune"}',
        '{"no":"type"}',
        '{"type":"offer"}',
        '{"type":"offer","claim":"text"}',
        '{"type":"welcome","workerId":7}',
        '{"type":"welcome"}',
        '{"type":"completeAck"}',
        '{"type":"failAck","jobId":null}',
        '{"type":"error"}',
        '{"type":"error","code":4001}',
        '{"type":["welcome"]}',
        '{"type":"readyForMore"}',
        '{"type":"hello","authToken":"t"}',
        '{"type":"offer","claim":{"jobId":"\\ud800"}}',
        '{"type":"heartbeatAck"} {"type":"heartbeatAck"}',
        "[" * 100_000,
    ],
    ids=lambda message: str(message)[:30],
)
def test_unreadable_studio_frame_is_a_frame_error(message: str | bytes) -> None:
    """Binary, broken, unknown and mistyped frames are one kind of error, which the session survives."""
    with pytest.raises(FrameError):
        wire.read_studio_frame(message)


@given(st.text() | st.binary())
def test_any_message_is_a_frame_or_a_frame_error(message: str | bytes) -> None:
    """No message whatever can raise anything but FrameError."""
    with contextlib.suppress(FrameError):
        assert wire.read_studio_frame(message).type


FIELDS = st.sampled_from(["type", "workerId", "serverTime", "claim", "jobId", "code", "message", "x"])
TYPES = st.sampled_from([*(sent["type"] for sent, _ in HEARD), "other", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TYPES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300)
@given(TYPES, st.dictionaries(FIELDS, JSON, max_size=6))
def test_any_frame_is_survived_by_a_session(kind: str, fields: dict[str, object]) -> None:
    """Whatever a frame of whatever type holds, it is an event, a dropped frame or the session's end."""
    protocol = SessionProtocol(0.0)
    protocol.hello("token", CAPABILITIES)
    protocol.receive('{"type":"welcome","workerId":"w"}', 0.0)
    with contextlib.suppress(ProtocolError):  # FrameError is one too
        protocol.receive(json.dumps({**fields, "type": kind}), 1.0)


@settings(max_examples=200)
@given(st.sampled_from([sent for _, sent in SENT]), st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_worker_frame_is_survived_by_the_local_studio(
    sent: dict[str, object], changes: dict[str, object]
) -> None:
    """The other direction: a frame with anything in it is read, or dropped."""
    with contextlib.suppress(FrameError):
        assert wire.read_worker_frame(json.dumps({**sent, **changes})).type


def test_frame_error_does_not_quote_the_frame() -> None:
    """What is wrong with a frame is said without its content, which may be a prompt or a token."""
    with pytest.raises(FrameError) as caught:
        wire.read_studio_frame('{"type":"offer","claim":"a secret castle"}')
    assert "secret castle" not in str(caught.value)


@pytest.mark.parametrize(
    ("ext", "mime"),
    [
        ("png", "image/png"),
        ("webp", "image/webp"),
        ("jpg", "image/jpeg"),
        ("gif", "image/gif"),
        ("wav", "audio/wav"),
        ("mp3", "audio/mpeg"),
        ("mp4", "video/mp4"),
        ("xyz", "application/octet-stream"),
    ],
)
def test_mime_type_follows_the_extension(ext: str, mime: str) -> None:
    """An upload carries the MIME type that the studio expects for its extension."""
    assert wire.mime_type(ext) == mime


def test_decision_is_tagged_by_status() -> None:
    """Pending, approved and rejected answers are told apart by their status."""
    read = wire.DECISION.validate_json
    assert read('{"status":"pending"}') == wire.Pending()
    assert read('{"status":"approved","workerId":"w","authToken":"t"}') == wire.Approved(
        worker_id="w", auth_token="t"
    )
    assert read('{"status":"rejected"}') == wire.Rejected()
