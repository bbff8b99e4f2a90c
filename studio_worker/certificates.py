"""Why a certificate was refused, in words for an operator: it is the clock as often as the certificate."""

from __future__ import annotations

import ssl
import time

_CURES = {
    9: "the clock of this machine says {now}: set it where it is wrong, else the certificate begins later",
    10: "the clock of this machine says {now}: set it where it is wrong, else renew the certificate",
}
"""By OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


def cure(error: ssl.SSLCertVerificationError, otherwise: str) -> str:
    """What to do about it; ``otherwise`` where time is not the matter."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return _CURES.get(error.verify_code, otherwise).format(now=now)
