"""What the configuration says of downloads, as one policy; and the tokens, from files that only we can read.

The one place where settings become a :class:`Policy`. No token stands in the configuration, a log line or
an error.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from studio_worker.config.settings import Settings
from studio_worker.errors import ConfigError
from studio_worker.network.addresses import Networks, server_of
from studio_worker.network.certificates import bundle_problem
from studio_worker.network.urls import is_loopback
from studio_worker.report.logs import add_secret
from studio_worker.transfer.policy import Connections, Limit, Policy

TOKEN_PREFIX = "download-token."
"""A token's file is called so, with the host's name behind it."""


def policy_from(settings: Settings) -> Policy:
    """How downloads behave on this box.

    Raises:
        ConfigError: a token or the CA bundle cannot be read, or others can read a token.
    """
    models = settings.models
    if models.ca_bundle is not None and (problem := bundle_problem(models.ca_bundle)):
        raise ConfigError(
            f"{models.ca_bundle} {problem}",
            key="models.ca_bundle",
            cure="name a file of certificates in PEM format, or leave the key out",
        )
    tokens: dict[str, str] = {}
    if models.token_dir is not None:
        tokens |= _tokens(models.token_dir, is_ours=True)
    if credentials := os.environ.get("CREDENTIALS_DIRECTORY"):
        tokens |= _tokens(Path(credentials), is_ours=False)
    return Policy(
        allow_insecure=models.allow_insecure_urls,
        connections=Connections(models.max_connections),
        connect_s=models.connect_timeout_s,
        first_byte_s=models.first_byte_timeout_s,
        stall_s=models.stall_timeout_s,
        limit=Limit(models.download_limit_mb_s * 1e6) if models.download_limit_mb_s else None,
        mirrors=tuple(models.mirrors.items()),
        tokens=tokens,
        ca_bundle=models.ca_bundle,
        proxy=models.proxy,
        offered=_offered(settings),
    )


def succeeding(before: Policy, wanted: Policy) -> Policy:
    """``wanted`` in the place of ``before``: told of to the same, and with the same limits where they stay.

    Else downloads under way and new ones would each take all that is allowed.
    """
    limit, connections = wanted.limit, wanted.connections
    if limit and before.limit and limit.bytes_per_s == before.limit.bytes_per_s:
        limit = before.limit
    if connections.most == before.connections.most:
        connections = before.connections
    return dataclasses.replace(
        wanted,
        limit=limit,
        connections=connections,
        on_end=before.on_end,
        on_wait=before.on_wait,
        uplink=before.uplink,
    )


def _offered(settings: Settings) -> Networks:
    """Where model files of offers may come from: as input pictures, from mirrors that are configured, and
    from this machine where the studio is one of its own programs.
    """
    studio = settings.studio.api_base_url
    named = (studio, *settings.models.mirrors.values())
    return Networks(
        private=settings.models.allow_insecure_urls,
        this_machine=is_loopback(server_of(studio)[0]),
        trusted=frozenset(map(server_of, named)),
    )


def _tokens(folder: Path, *, is_ours: bool) -> dict[str, str]:
    """Tokens by host; systemd guards its own folder, in ours the files must be private."""
    found = {}
    try:
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(TOKEN_PREFIX):
                continue
            if is_ours and path.stat().st_mode & 0o077:
                raise ConfigError(
                    f"others can read the token {path}", key="models.token_dir", cure=f"chmod 600 {path}"
                )
            token = path.read_text("ascii").strip()
            if not token.isprintable() or " " in token:
                raise ValueError
            if token:
                add_secret(token)
                found[path.name.removeprefix(TOKEN_PREFIX).lower()] = token
    except OSError as error:
        is_missing = is_ours and isinstance(error, FileNotFoundError) and not folder.exists()
        raise ConfigError(
            f"{error.filename}: {error.strerror}",
            key="models.token_dir" if is_ours else "",
            cure="make that folder, or leave the key out" if is_missing else "let this user read it",
        ) from error
    except ValueError:
        raise ConfigError(
            f"{path} holds no token",
            key="models.token_dir" if is_ours else "",
            cure="write the token alone into it, on one line",
        ) from None
    return found
