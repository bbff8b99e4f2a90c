"""Which addresses are refused, and which mean this machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.network.urls import is_loopback, url_problem


@pytest.mark.parametrize(
    "url",
    [
        "https://m.example/a",
        "https://m.example:8443/a?b=c",
        "http://localhost:1/a",
        "http://127.0.0.9/a",
        "http://[::1]/a",
    ],
)
def test_url_over_https_or_on_loopback_may_be_fetched(url: str) -> None:
    """https is allowed everywhere, plain http on this machine itself."""
    assert url_problem(url, allow_insecure=False) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://m.example/a",
        "http://192.168.0.5/a",
        "http://localhost.example/a",
        "http://127.0.0.1.example/a",
    ],
)
def test_url_over_plain_http_needs_permission(url: str) -> None:
    """Plain http beyond this machine is refused, and allowed where the operator says so."""
    problem = url_problem(url, allow_insecure=False)
    assert problem is not None
    assert "allow_insecure_urls" in problem
    assert url_problem(url, allow_insecure=True) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.safetensors",
        "file:///etc/passwd",
        "ftp://m.example/a",
        "https://",
        "https://m:x/a",
        "http://[::1",
    ],
)
def test_url_that_is_none_is_refused(url: str) -> None:
    """What is no http(s) address is refused, also where plain http is allowed."""
    assert url_problem(url, allow_insecure=True) is not None


@given(st.text(max_size=30))
def test_url_problem_never_fails(url: str) -> None:
    """Any text is judged; none of it raises."""
    problem = url_problem(url, allow_insecure=False)
    assert problem is None or "\n" not in problem


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, expected: bool) -> None:
    """Only localhost and loopback addresses count as this machine."""
    assert is_loopback(host) is expected
