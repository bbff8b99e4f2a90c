"""The address of S3 storage, as the operator writes it, and whether workers can go there themselves."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, Self, get_args
from urllib.parse import parse_qsl, urlsplit

from studio_worker.errors import ConfigError
from studio_worker.network.addresses import network_kind, server_of

OPTION = "--pictures"
"""What names it on the command line."""

Inputs = Literal["auto", "presigned", "studio"]


@dataclass(frozen=True)
class Place:
    """What an address like ``s3://bucket/prefix?inputs=studio`` says.

    Args:
        prefix: of all keys; empty, or it ends with ``/``.
        inputs: how workers get input pictures: from S3 by a presigned address, through the studio, or
            (``auto``) from S3 where it has a public https address.
    """

    bucket: str
    prefix: str
    inputs: Inputs = "auto"

    @classmethod
    def of(cls, address: str) -> Self:
        """Raises ConfigError where it is no such address."""
        parts = urlsplit(address)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        inputs = query.pop("inputs", "auto")
        is_plain = parts.scheme == "s3" and re.fullmatch(r"[A-Za-z0-9._-]{3,63}", parts.netloc)
        if not is_plain or query or parts.fragment or inputs not in get_args(Inputs):
            raise ConfigError(
                "is no address of S3 storage",
                cure="write s3://BUCKET/PREFIX, and ?inputs=presigned or ?inputs=studio where it is needed",
                key=OPTION,
            )
        prefix = parts.path.strip("/")
        return cls(parts.netloc, f"{prefix}/" if prefix else "", inputs)  # type: ignore[arg-type]


def is_public(url: str) -> bool:
    """Whether any worker may go there: see :mod:`studio_worker.network.addresses`, which they keep to."""
    host, port = server_of(url)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = {str(address[0]).partition("%")[0] for *_, address in found}
    return url.startswith("https:") and not any(map(network_kind, map(ip_address, addresses)))
