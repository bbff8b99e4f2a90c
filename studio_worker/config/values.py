"""What a setting's value may be: addresses, folders and devices, each checked and said in one sentence.

Knows no setting by its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

from studio_worker.network.urls import is_loopback, url_problem


def listen_address(value: str) -> tuple[str, int]:
    """Host and port of ``host:port``; port 0 where there is none. Raises ValueError."""
    parts = urlsplit(f"//{value}")
    return parts.hostname or "", parts.port or 0


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cuda, cuda:N or cpu")
    return value


def _studio_url(value: str) -> str:
    # Plain http is allowed here: a studio of one's own on the local network often has nothing else.
    if problem := url_problem(value, allow_insecure=True):
        raise ValueError(problem)
    if "@" in urlsplit(value).netloc:
        # It would replace the worker's own token in every request, and show up wherever the address does.
        raise ValueError("holds a user name or password; a worker signs in with its own token")
    return value


def _mirrors(value: dict[str, str]) -> dict[str, str]:
    for url in (*value, *value.values()):
        if problem := url_problem(url, allow_insecure=True):
            raise ValueError(f"an address of a mirror {problem}")
    return value


def _proxy(value: str) -> str:
    if problem := url_problem(value, allow_insecure=True):
        raise ValueError(problem)
    return value


def _listen(value: str) -> str:
    host, port = listen_address(value)
    if not is_loopback(host) or not 0 < port < 65_536:
        raise ValueError("must be an address of this machine alone and a port, e.g. 127.0.0.1:9464")
    return value


def _absolute(value: Path) -> Path:
    # Of a service: it has no folder that it is in, and its home is no person's.
    if not value.is_absolute():
        raise ValueError("must be an absolute path, one that begins with /")
    return value


Absolute = Annotated[Path, AfterValidator(_absolute)]
DeviceName = Annotated[str, AfterValidator(_device)]
StudioUrl = Annotated[str, AfterValidator(_studio_url)]
Mirrors = Annotated[dict[str, str], AfterValidator(_mirrors)]
Proxy = Annotated[str, AfterValidator(_proxy)]
Listen = Annotated[str, AfterValidator(_listen)]
Level = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]
Format = Annotated[Literal["auto", "json", "text"], BeforeValidator(_lower)]
