"""``Retry-After``: how long whoever answered asks to be left alone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def retry_after_s(headers: Mapping[str, str], at_most_s: float = float("inf")) -> float | None:
    """The header's seconds, from either of its forms (RFC 9110, 10.2.3); ``None`` where it says nothing.

    A date is read against the answer's own ``Date``: this box's clock may be wrong.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), at_most_s)
    try:
        until = parsedate_to_datetime(text)
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return min(max(0.0, (until - now).total_seconds()), at_most_s)
    except (ValueError, TypeError, OverflowError):  # no date, or one without a zone
        return None
