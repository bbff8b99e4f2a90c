"""What lies at the bottom of a failed request, in words that quote no address.

requests wraps urllib3's errors, which wrap the system's; the texts of both quote whole URLs, query strings,
proxies' passwords and all. The innermost one's ``strerror`` does not.
"""

from __future__ import annotations


def innermost(error: BaseException) -> BaseException:
    """The error that all others around it come from."""
    while isinstance(
        inner := getattr(error, "reason", None) or error.__cause__ or error.__context__, BaseException
    ):
        error = inner
    return error


def reason(error: BaseException) -> str:
    """What the innermost error says of itself."""
    return said(innermost(error))


def said(error: BaseException) -> str:
    """What one error says of itself: the system's words, or else its name."""
    return getattr(error, "strerror", None) or type(error).__name__
