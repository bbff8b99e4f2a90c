"""Why a certificate was refused, in words for an operator: it is the clock as often as the certificate. And
what is wrong with a file of those that are trusted.
"""

from __future__ import annotations

import ssl
import time
from pathlib import Path

_CURES = {
    9: "the clock of this machine says {now}: set it where it is wrong, else the certificate begins later",
    10: "the clock of this machine says {now}: set it where it is wrong, else renew the certificate",
}
"""By OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""

_DER = b"\x30"
"""How ASN.1 begins a sequence, which a certificate is (X.690, 8.9)."""


def cure(error: ssl.SSLCertVerificationError, otherwise: str) -> str:
    """What to do about it; ``otherwise`` where time is not the matter."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return _CURES.get(error.verify_code, otherwise).format(now=now)


def bundle_problem(path: Path) -> str:
    """What is wrong with ``path`` as a file, or folder, of trusted certificates; empty where nothing is."""
    begin = b""
    try:
        if path.is_dir():
            return "" if any(path.iterdir()) else "is an empty folder"
        with path.open("rb") as file:
            begin = file.read(1)
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        if begin == _DER:
            return f"is in DER format (openssl x509 -inform der -in {path} makes it PEM)"
        return "holds no certificate in PEM format" if begin else "is empty"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""
