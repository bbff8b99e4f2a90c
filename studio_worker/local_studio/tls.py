"""The studio's own certificate: read, rehearsed before it is shown to anybody, renewed while the studio runs.

Refuses a key that others can read, and a certificate that no client would believe: one whose time is over or
has not come, or whose key is another's. Whether its name is the studio's only clients can tell.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import tempfile
from pathlib import Path
from typing import Any

from studio_worker.errors import ConfigError
from studio_worker.files import others_can_read
from studio_worker.network import certificates

logger = logging.getLogger(__name__)

_HALVES = 6
"""A handshake of TLS 1.3 or 1.2 is over after three of each side."""

_KEY = b"PRIVATE KEY-----"
_CERTIFICATE = re.compile(b"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
"""How PEM marks them (RFC 7468)."""

_ITS_KEY = "name the key, in PEM format, that this certificate was made for"
_NEW_KEY = "make a new key, RSA of 2048 bits or an elliptic curve's, and a certificate for it"


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
        raise _bad_certificate(problem, "name a file in PEM format", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        _require_key(key, certificate)
        context.load_cert_chain(certificate, key, password=lambda: _locked(key))
    except ssl.SSLError as error:
        raise _refused(error, certificate, key) from error
    except OSError as error:
        raise _bad_key(f"cannot be read: {error.strerror}", "name another --key", key) from error
    try:
        return context, _rehearse(context, certificate)
    except ssl.SSLCertVerificationError as error:
        cure = certificates.cure(error, "name a certificate that was made for servers")
        raise _bad_certificate(
            f"no client would believe it: {error.verify_message}", cure, certificate
        ) from error
    except ssl.SSLError as error:
        raise _bad_certificate(
            f"no client could speak with it ({_reason(error)})", _NEW_KEY, certificate
        ) from error


def _require_key(key: Path, certificate: Path) -> None:
    if key == certificate and _KEY not in key.read_bytes():
        raise _bad_certificate("holds no key", "name its file with --key", certificate)
    if key.is_dir():
        raise _bad_key("is a folder", "name a file in PEM format", key)
    if others_can_read(key):
        raise _bad_key("others can read it", f"chmod 600 {key}", key)


def _refused(error: ssl.SSLError, certificate: Path, key: Path) -> ConfigError:
    reason = error.reason or ""
    if reason.endswith(("_TOO_SMALL", "_TOO_WEAK")):
        return _bad_certificate(f"is too weak for any client ({_reason(error)})", _NEW_KEY, certificate)
    if reason != "KEY_VALUES_MISMATCH":
        return _bad_key("holds no usable key", _ITS_KEY, key)
    if any(_fits(text, key) for text in _CERTIFICATE.findall(certificate.read_bytes())[1:]):
        return _bad_certificate(
            f"does not begin with the certificate of {key}",
            "put that first, and then those between it and its authority",
            certificate,
        )
    return _bad_key(f"is not the key of {certificate}", _ITS_KEY, key)


def _fits(certificate: bytes, key: Path) -> bool:
    with tempfile.NamedTemporaryFile() as file:  # Python reads them from files alone
        file.write(certificate)
        file.flush()
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file.name, key)
        except ssl.SSLError:
            return False
    return True


def _bad_certificate(problem: str, cure: str, certificate: Path) -> ConfigError:
    return ConfigError(problem, cure=cure, key="--certificate", source=str(certificate))


def _bad_key(problem: str, cure: str, key: Path) -> ConfigError:
    return ConfigError(problem, cure=cure, key="--key", source=str(key))


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "").lower().replace("_", " ")


def _locked(key: Path) -> str:
    cure = f"openssl pkey -in {key} -out NEW writes it without one"
    raise _bad_key("is locked with a password", cure, key)


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
