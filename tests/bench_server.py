"""A server for measurements: sendfile, one thread a connection, with an optional cap and first-byte delay.

``python -m tests.bench_server FILE [cap MB/s] [first byte ms] [drop after MiB]`` prints its port.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

_PIECE = 64 * 1024


def main() -> None:
    """Serve one file until killed."""
    path = Path(sys.argv[1])
    cap, delay_ms, drop_mib = (*(float(word) for word in sys.argv[2:]), 0.0, 0.0, 0.0)[:3]
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    with path.open("rb") as file:
        while True:
            connection, _ = listener.accept()
            arguments = (connection, file.fileno(), cap * 1e6, delay_ms / 1000, int(drop_mib * 2**20))
            threading.Thread(target=_serve, args=arguments, daemon=True).start()


def _serve(connection: socket.socket, file: int, cap: float, delay_s: float, drop_after: int) -> None:
    total = os.fstat(file).st_size
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        rest = b""
        while True:
            while b"\r\n\r\n" not in rest:
                more = b""
                with contextlib.suppress(ConnectionError):
                    more = connection.recv(65536)
                if not more:
                    return
                rest += more
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, last = 0, total - 1
            found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d*)", head)
            lines = ["HTTP/1.1 200 OK"]
            if found:
                first = int(found[1])
                last = min(int(found[2] or last), last)
                lines = ["HTTP/1.1 206 Partial Content", f"Content-Range: bytes {first}-{last}/{total}"]
            lines += [f"Content-Length: {last - first + 1}", 'ETag: "bench"', "Accept-Ranges: bytes"]
            lines += ["Content-Type: application/octet-stream", "X-Repo-Commit: 0", "", ""]
            time.sleep(delay_s)
            try:
                connection.sendall("\r\n".join(lines).encode())
                if head.startswith(b"HEAD"):
                    continue
                end = min(last + 1, first + drop_after) if drop_after else last + 1
                _send(connection, file, first, end, cap)
                if end <= last:
                    return
            except OSError:
                return


def _send(connection: socket.socket, file: int, at: int, end: int, cap: float) -> None:
    started, begin = time.monotonic(), at
    while at < end:
        at += os.sendfile(connection.fileno(), file, at, min(end - at, _PIECE if cap else 2**20))
        if cap and (ahead_s := (at - begin) / cap - (time.monotonic() - started)) > 0:
            time.sleep(ahead_s)


if __name__ == "__main__":
    main()
