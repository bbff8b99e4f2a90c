"""Bodies of the HTTP calls: read within limits, checked, refused with a sentence a person can use."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qsl
from uuid import UUID

from pydantic import BaseModel, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Scope

from studio_worker.jobs import ImageTask
from studio_worker.models import ModelSource
from studio_worker.studio import wire

MAX_JSON_BYTES = 1 << 20
MAX_REGISTRATION_BYTES = 64 << 10
MAX_UPLOAD_BYTES = 100 << 20
MAX_PICTURE_BYTES = 32 << 20
MAX_FIELDS_BYTES = 16 << 10
MAX_FIELDS = 16

TASK_KINDS = ("image", "llm", "audio_stt", "audio_tts", "video")

_UTF8 = (b"utf-8", b"utf8", b"us-ascii")
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,70}")
"""RFC 2046, 5.1.1."""
_EXT = re.compile(r"[a-z0-9]{1,8}")
_BodyT = TypeVar("_BodyT", bound=BaseModel)


class NewJob(wire.Body):
    """Body of ``POST /api/jobs``. Without ``modelSource`` the registry's entry of that model is taken. With a
    ``jobId``, which the client makes up for this order alone, an order whose answer was lost can be repeated.
    """

    model: str = Field(min_length=1, max_length=200)
    task: dict[str, Any]
    model_source: dict[str, Any] | None = None
    game_id: str | None = Field(default=None, max_length=200)
    asset_name: str | None = Field(default=None, max_length=200)
    vram_gb_estimate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_attempts: int | None = Field(default=None, ge=1, le=100)
    priority: int | None = Field(default=None, ge=-100, le=100)
    submitter: str | None = Field(default=None, max_length=100)
    job_id: UUID | None = None


class NewModel(wire.Body):
    """Body of ``PUT /api/models/{id}``."""

    label: str = Field(default="", max_length=200)
    model_source: dict[str, Any]
    vram_gb_estimate: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Refusal(wire.Body):
    """Body of ``POST /api/registrations/{requestId}/reject``; may be left out."""

    reason: str | None = Field(default=None, max_length=500)


def checked_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """The task as it will be offered: what was given, and its kind. Raises ValueError with the fault."""
    given = {"kind": "image"} | {key: value for key, value in task.items() if value is not None}
    if given["kind"] not in TASK_KINDS:
        raise ValueError(f"task.kind: must be one of {', '.join(TASK_KINDS)}")
    if given["kind"] == "image":
        try:
            image = ImageTask.model_validate(given)
        except ValidationError as error:
            raise ValueError(f"task: {wire.describe(error)}") from None
        if not is_extension(image.ext):
            raise ValueError("task.ext: must be a file name extension like webp")
    return given


def checked_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """The model source as it will be offered. Raises ValueError with the fault."""
    try:
        ModelSource.model_validate(source)
    except ValidationError as error:
        raise ValueError(f"modelSource: {wire.describe(error)}") from None
    return dict(source)


def is_extension(text: str) -> bool:
    """Whether this can be a file name's extension: lower case letters and digits, no dot."""
    return _EXT.fullmatch(text) is not None


def parse_json(text: str | bytes) -> Any:
    """JSON that can be stored, shown and sent on: no NaN, no infinities, no half characters.

    Raises:
        ValueError: with the fault, without the content.
    """
    try:
        value = json.loads(text)
        # json.loads takes NaN, 1e999 and lone surrogates, which no strict reader could read again.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError):
        raise ValueError("JSON with numbers or nesting beyond what can be kept") from None
    return value


async def read_bytes(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises HTTPException 413 where it is larger."""
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > limit_bytes:
            raise HTTPException(413, f"the body is larger than {limit_bytes} bytes")
    return bytes(chunks)


async def read_body(request: Request, model: type[_BodyT], limit_bytes: int = MAX_JSON_BYTES) -> _BodyT:
    """The body as one of the shapes above; an empty body counts as ``{}``. Raises HTTPException 400, 413."""
    content = await read_bytes(request, limit_bytes)
    try:
        return model.model_validate(parse_json(content) if content.strip() else {})
    except ValidationError as error:
        raise HTTPException(400, wire.describe(error)) from None
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


async def drain(request: Request) -> None:
    """Read an unwanted upload to its end, so that its sender gets to read the answer.

    Answered early, the connection closes under a client that still sends; it sees a broken pipe instead of
    the status, and tries again for ever.
    """
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > MAX_UPLOAD_BYTES:
            return


@asynccontextmanager
async def read_form(request: Request, limit_bytes: int) -> AsyncIterator[FormData]:
    """The body as a multipart form with one file; its temporary file is gone afterwards.

    Raises:
        HTTPException: 400 where it is no such form, 413 where it is larger than ``limit_bytes``.
    """
    scope = _as_utf8(request)
    if scope is None:
        await drain(request)
        raise HTTPException(400, "the body must be a multipart form in UTF-8")
    left = limit_bytes
    is_whole = False

    async def receive() -> Message:
        nonlocal left, is_whole
        message = await request.receive()
        is_whole = not message.get("more_body", False)
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"the body is larger than {limit_bytes} bytes")
        return message

    try:
        form = await Request(scope, receive).form(
            max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_JSON_BYTES
        )
    except HTTPException as error:
        # For the reason that drain() gives; the parser stops at the first fault.
        while error.status_code == 400 and not is_whole:
            await receive()
        raise
    try:
        yield form
    finally:
        await form.close()


def _as_utf8(request: Request) -> Scope | None:
    """The request's scope with a content type that names the boundary alone; ``None`` where it is no form.

    The parser would decode by whatever codec the client names; some of Python's take minutes for a megabyte.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    charset = parameters.get(b"charset", b"utf-8").lower()
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or charset not in _UTF8 or not _BOUNDARY.fullmatch(boundary):
        return None
    headers = [pair for pair in request.scope["headers"] if pair[0].lower() != b"content-type"]
    headers.append((b"content-type", b'multipart/form-data; boundary="%s"' % boundary))
    return {**request.scope, "headers": headers}


async def read_fields(request: Request) -> dict[str, str]:
    """The body as what a plain HTML form sends, in UTF-8.

    Raises:
        HTTPException: 400 where it is none, 413 where it is larger than :data:`MAX_FIELDS_BYTES`.
    """
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    content = await read_bytes(request, MAX_FIELDS_BYTES)
    if kind.strip().lower() != "application/x-www-form-urlencoded":
        raise HTTPException(400, "the body must be a form, application/x-www-form-urlencoded")
    try:
        pairs = parse_qsl(
            content.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError:
        raise HTTPException(400, "the body is no form in UTF-8") from None
    return dict(pairs)


def number_in(request: Request, name: str, *, default: int, low: int, high: int) -> int:
    """A whole number of the query. Raises HTTPException 400 where it is none, or out of bounds."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high):
        raise HTTPException(400, f"{name}: must be a whole number from {low} to {high}")
    return int(text)
