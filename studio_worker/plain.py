"""Words from outside without what steers a terminal, breaks a line or turns a text around.

An id, a name, a reason or a prompt comes from whoever runs the studio, or made the file. Shown as it is, it
could move the cursor, set a window's title, forge a line of the log, or read otherwise than it is written.
"""

from __future__ import annotations

REPLACEMENT = "\ufffd"

_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
"""What ends a line somewhere: str.splitlines, browsers, journald."""
_C0_AND_C1 = [*range(0x20), *range(0x7F, 0xA0)]
_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Unicode's property Bidi_Control."""
_ALL = dict.fromkeys((*_C0_AND_C1, *_BIDI), REPLACEMENT) | {ord(char): " " for char in _SPACES}
_LINES = {code: char for code, char in _ALL.items() if chr(code) not in "\t\n"}


def plain(text: str) -> str:
    """``text`` on one line, each control character replaced."""
    return text.translate(_ALL)


def plain_lines(text: str) -> str:
    """``text`` with its lines and tabs left."""
    return text.translate(_LINES)
