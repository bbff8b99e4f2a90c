"""The studio's own certificate: read, rehearsed before it is shown to anybody, renewed while the studio runs.

Refuses a key that others can read, and a certificate that no client would believe: one whose time is over or
has not come, or whose key is another's. Whether its name is the studio's only clients can tell.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from pathlib import Path
from typing import Any

from studio_worker.errors import ConfigError
from studio_worker.files import others_can_read
from studio_worker.network import certificates

logger = logging.getLogger(__name__)

_HALVES = 6
"""A handshake of TLS 1.3 or 1.2 is over after three of each side."""


class Tls:
    """A certificate and its key, both in PEM format.

    Args:
        certificate: with the certificates of the authorities between, as clients want them.
        key: where it is missing, it stands in the certificate's file.

    Raises:
        ConfigError: they cannot be used, with file and cure.
    """

    def __init__(self, certificate: Path, key: Path | None = None) -> None:
        self._certificate = certificate
        self._key = key or certificate
        self.context, self._shown = _read(self._certificate, self._key)

    @property
    def name(self) -> str | None:
        """The first host name that the certificate is for."""
        names = [name for kind, name in self._shown.get("subjectAltName", ()) if kind == "DNS"]
        return next((name for name in names if "*" not in name), None)

    @property
    def expires_at(self) -> float:
        """When it ends, in seconds since 1970."""
        return float(ssl.cert_time_to_seconds(self._shown["notAfter"]))

    def renew(self) -> None:
        """Show from now on what the files hold now; what is under way goes on, and what is no good is not
        taken.
        """
        try:
            self.context, self._shown = _read(self._certificate, self._key)
        except ConfigError as error:
            logger.error("certificate not renewed; the one before stays", extra={"error": str(error)})
            return
        logger.info("certificate renewed", extra={"ends": self._shown["notAfter"]})


def _read(certificate: Path, key: Path) -> tuple[ssl.SSLContext, dict[str, Any]]:
    problem = certificates.bundle_problem(certificate) or ("is a folder" if certificate.is_dir() else "")
    if problem:
        raise ConfigError(
            problem, source=str(certificate), cure="name a file in PEM format", key="--certificate"
        )
    try:
        if others_can_read(key):
            raise ConfigError("others can read it", source=str(key), cure=f"chmod 600 {key}", key="--key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(certificate, key, password=lambda: _locked(key))
    except ssl.SSLError as error:
        raise ConfigError(
            f"is not the key of {certificate}"
            if error.reason == "KEY_VALUES_MISMATCH"
            else "holds no usable key",
            source=str(key),
            cure="name the key, in PEM format, that this certificate was made for",
            key="--key",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", source=str(key), cure="name another --key", key="--key"
        ) from error
    try:
        return context, _rehearse(context, certificate)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"no client would believe it: {error.verify_message}",
            source=str(certificate),
            cure=certificates.cure(error, "name a certificate that was made for servers"),
            key="--certificate",
        ) from error


def _locked(key: Path) -> str:
    raise ConfigError(
        "is locked with a password",
        source=str(key),
        cure=f"openssl pkey -in {key} -out NEW writes it without one",
        key="--key",
    )


def _rehearse(context: ssl.SSLContext, certificate: Path) -> dict[str, Any]:
    """A handshake in memory with a client that believes in this very certificate; returns what it was shown.

    Python reads no certificate's dates otherwise, and this says in OpenSSL's own words what is wrong.
    """
    believing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    believing.check_hostname = False
    believing.load_verify_locations(certificate)
    believing.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = believing.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for half in range(_HALVES):
        with contextlib.suppress(ssl.SSLWantReadError):
            (server if half % 2 else client).do_handshake()
    return dict(client.getpeercert() or {})
