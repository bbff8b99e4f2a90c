"""How long whoever answered asks to be left alone."""

from __future__ import annotations

import pytest

from studio_worker.network.retry_after import retry_after_s

NOON = "Thu, 01 Jan 1970 12:00:00 GMT"
LATER = "Thu, 01 Jan 1970 12:01:30 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 7 "}, 7.0),
        ({"Retry-After": "9" * 400}, 3600.0),
        ({"Retry-After": LATER, "Date": NOON}, 90.0),
        ({"Retry-After": NOON, "Date": LATER}, 0.0),
        ({"Retry-After": "Thu, 01 Jan 1970 12:01:30 -0000", "Date": NOON}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "\u0667"}, None),
        ({"Retry-After": ""}, None),
    ],
)
def test_time_to_wait_is_read_in_both_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds or a date, never more than the caller allows; what cannot be understood asks for nothing."""
    assert retry_after_s(headers, at_most_s=3600.0) == seconds
