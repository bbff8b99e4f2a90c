"""Downloads give way to uploads, against a real server."""

from __future__ import annotations

import queue
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from studio_worker.download import download_file
from studio_worker.network.uplink import Uplink
from studio_worker.transfer.parallel.ranges import PARALLEL_BYTES
from studio_worker.transfer.policy import Policy
from tests.fakes.scripted import LIMIT_S
from tests.fakes.servers import FileServer


@pytest.mark.parametrize("size", [PARALLEL_BYTES // 16, PARALLEL_BYTES * 2], ids=["stream", "ranges"])
def test_download_gives_way_to_an_upload_and_comes_whole(
    server: FileServer, tmp_path: Path, size: int
) -> None:
    """What a server sends is left where it is while a picture is being uploaded; then all of it comes, with
    no new start.
    """
    file = server.serve("/m", random.Random(1).randbytes(size))
    uplink = Uplink(clock=lambda: 0.0)  # time stands still, in a rest
    happened: queue.SimpleQueue[str] = queue.SimpleQueue()

    def moved(done: int, total: int | None) -> None:
        if done:
            happened.put("moved")

    with ThreadPoolExecutor() as pool, uplink.turn() as turn:
        downloading = pool.submit(
            download_file,
            file.url,
            tmp_path / "m",
            sha256=file.sha256,
            policy=Policy(uplink=uplink),
            progress=moved,
        )
        other = server.serve("/other", file.content)
        download_file(other.url, tmp_path / "other")  # gives way to nobody, and is through
        happened.put("sent")
        uplink.sent(turn)
        downloading.result(LIMIT_S)
    assert happened.get() == "sent"
    assert not happened.empty()
    assert file.bytes_sent < 1.5 * size
