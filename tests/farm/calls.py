"""As much of HTTP/1.1 as a crowd of workers in one event loop needs: one request on one connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

WAIT_S = 60.0
"""The protocol's time limit for a request."""


class NoAnswer(OSError):
    """The connection ended before the answer was whole: nobody knows what became of the request.

    ``was_sent`` says whether the request had been written when it ended.
    """

    def __init__(self, *, was_sent: bool) -> None:
        super().__init__("no answer came")
        self.was_sent = was_sent


async def send(
    port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body of the answer. Raises NoAnswer."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    was_sent = False
    try:
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write("\r\n".join(lines).encode() + body)
                was_sent = True
                head, _, content = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise NoAnswer(was_sent=was_sent) from error
    first, *rest = head.decode("latin-1").split("\r\n")
    told = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    if not first.startswith("HTTP/1.1 ") or len(content) < int(told.get("content-length", "0")):
        raise NoAnswer(was_sent=True)
    return int(first.split()[1]), told, content


async def send_json(port: int, method: str, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON of the answer. Raises NoAnswer."""
    headers = {"Content-Type": "application/json"}
    status, _, content = await send(port, method, path, headers, json.dumps(body).encode())
    return status, json.loads(content or b"null")


def multipart(fields: Mapping[str, str], filename: str, content: bytes, media_type: str) -> tuple[str, bytes]:
    """Content type and body of a form with these fields and the file ``image``."""
    mark = "one-of-the-farm"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    parts.append(
        f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{filename}"\r\n'
        f"Content-Type: {media_type}\r\n\r\n"
    )
    body = "".join(parts).encode() + content + f"\r\n--{mark}--\r\n".encode()
    return f"multipart/form-data; boundary={mark}", body
