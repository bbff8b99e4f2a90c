"""A server for measurements: one file, one thread a connection, with a cap, a delay, breaks, or TLS.

``python -m tests.bench.server FILE --cap-mb-s 20 --delay-ms 80`` prints its port. ``GET /sent`` tells
how many bytes of the file it has sent since the last time.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import re
import socket
import ssl
import threading
import time
from pathlib import Path

_PIECE = 64 * 1024
_LARGE_PIECE = 1024 * 1024


def main() -> None:
    """Serve one file until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--cap-mb-s", type=float, default=0.0, help="for each connection; 0 = none")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="to the first byte of each answer")
    parser.add_argument("--drop-mib", type=int, default=0, help="close each connection after so much")
    parser.add_argument("--tls", type=Path, help="a PEM file with certificate and key")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    _Server(listener, options).run()


class _Server:
    def __init__(self, listener: socket.socket, options: argparse.Namespace) -> None:
        self._listener = listener
        self._file = options.file.open("rb")
        self._total = os.fstat(self._file.fileno()).st_size
        self._cap = options.cap_mb_s * 1e6
        self._delay_s = options.delay_ms / 1000
        self._drop_after = options.drop_mib * 2**20
        self._tls: ssl.SSLContext | None = None
        if options.tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(options.tls)
        self._map = memoryview(mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ))
        self._lock = threading.Lock()
        self._sent = 0

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # whoever has enough hangs up
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                rest = b""
                while True:
                    while b"\r\n\r\n" not in rest:
                        more = connection.recv(65536)
                        if not more:
                            return
                        rest += more
                    head, _, rest = rest.partition(b"\r\n\r\n")
                    if not self._answer(connection, head):
                        return

    def _answer(self, connection: socket.socket, head: bytes) -> bool:
        """Whether the connection may be used again."""
        if head.startswith(b"GET /sent"):
            with self._lock:
                text, self._sent = str(self._sent).encode(), 0
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
            return True
        first, last = 0, self._total - 1
        found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d*)", head)
        lines = ["HTTP/1.1 200 OK"]
        if found:
            first = int(found[1])
            last = min(int(found[2] or last), last)
            lines = ["HTTP/1.1 206 Partial Content", f"Content-Range: bytes {first}-{last}/{self._total}"]
        lines += [f"Content-Length: {last - first + 1}", 'ETag: "bench"', "Accept-Ranges: bytes"]
        lines += ["Content-Type: application/octet-stream", "X-Repo-Commit: 0", "", ""]
        time.sleep(self._delay_s)
        connection.sendall("\r\n".join(lines).encode())
        if head.startswith(b"HEAD"):
            return True
        end = min(last + 1, first + self._drop_after) if self._drop_after else last + 1
        self._send(connection, first, end)
        return end > last

    def _send(self, connection: socket.socket, at: int, end: int) -> None:
        started, begin = time.monotonic(), at
        try:
            while at < end:
                size = min(end - at, _PIECE if self._cap else _LARGE_PIECE)
                if self._tls is None:
                    at += os.sendfile(connection.fileno(), self._file.fileno(), at, size)
                else:
                    at += connection.send(self._map[at : at + size])
                if self._cap and (ahead_s := (at - begin) / self._cap - (time.monotonic() - started)) > 0:
                    time.sleep(ahead_s)
        finally:
            with self._lock:
                self._sent += at - begin


if __name__ == "__main__":
    main()
