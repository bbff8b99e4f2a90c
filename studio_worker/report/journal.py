"""The journal's native protocol: one entry with fields of its own, as one datagram.

Own code, because every library for it needs a C compiler and libsystemd, and the protocol is this page:
https://systemd.io/JOURNAL_NATIVE_PROTOCOL. Knows nothing of logging.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")

_SEND_LIMIT_S = 5.0
"""A journald that takes nothing for so long hangs."""
_BUFFER_BYTES = 8 * 1024 * 1024
"""What sd_journal_send(3) asks for, so that a burst does not wait for journald."""
_NAME_CHARS = 64
"""journald drops fields with longer names."""
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Journal:
    """Sends entries to journald. Safe from any thread.

    Args:
        path: journald's socket; looked up for each entry, so that journald may be restarted.
    """

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_SEND_LIMIT_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)

    def send(self, fields: Mapping[str, str]) -> None:
        """Hand one entry over, whole, or not at all.

        Raises:
            OSError: journald is not there or takes nothing; the entry is not in the journal.
        """
        data = b"".join(_encoded(name, value) for name, value in fields.items())
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            self._send_in_memory(data)

    def close(self) -> None:
        self._socket.close()

    def _send_in_memory(self, data: bytes) -> None:
        """An entry that is too large for a datagram goes as a sealed file in memory."""
        file = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(file, "wb", closefd=False) as writer:
                writer.write(data)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            # Not socket.send_fds: in Python 3.11 it drops the address.
            rights = array.array("i", [file])
            self._socket.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0, self._path)
        finally:
            os.close(file)


def field_name(name: str) -> str:
    """``job_id`` as journald has it, ``JOB_ID``: capitals, digits and underscores, a letter first."""
    return re.sub(r"[^A-Z0-9_]", "_", name.upper()).lstrip("_0123456789")[:_NAME_CHARS]


def _encoded(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return b"%b=%b\n" % (name.encode("ascii"), data)
    return b"%b\n%b%b\n" % (name.encode("ascii"), len(data).to_bytes(8, "little"), data)
