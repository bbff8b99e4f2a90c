"""The beginning of a file, for who has to know what it is before it is fetched."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest

from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.network.addresses import Networks
from studio_worker.transfer.beginning import Beginning, fetch_beginning
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer
from tests.lab.headers import Hollow, hollow_gguf, hollow_safetensors

Q4_K = 12
MOST = 2**22
SHAPES = {f"layers.{number}.weight": (4096, 4096) for number in range(300)}
PLAIN = hollow_safetensors(SHAPES)


def begun(url: str, policy: Policy | None = None, most_bytes: int = MOST) -> Beginning:
    return fetch_beginning(url, policy or Policy(), threading.Event(), most_bytes=most_bytes)


@pytest.mark.parametrize(
    ("content", "requests"),
    [
        (PLAIN, 1),
        (hollow_safetensors(SHAPES, spaces=2**20), 2),
        (hollow_gguf(SHAPES, Q4_K), 1),
        (hollow_gguf(SHAPES, Q4_K, words=200_000), 3),
        (b"PK\x03\x04 and so on" * 100, 1),
    ],
    ids=["safetensors", "long safetensors", "gguf", "gguf with a vocabulary", "zip"],
)
@pytest.mark.parametrize("range_cap", [None, 700_000], ids=["", "ranges cut short"])
def test_beginning_is_as_much_as_the_header_has(
    content: bytes, requests: int, range_cap: int | None, server: FileServer
) -> None:
    """Of 10 GB come as many bytes as the header has, in few requests, and how long the file is."""
    file = server.serve("/m", content, range_cap=range_cap)
    found = begun(file.url)
    header = content.header if isinstance(content, Hollow) else b"PK\x03\x04"
    assert found.size_bytes == len(content)
    assert found.content.startswith(header)
    assert file.bytes_sent <= MOST
    if range_cap is None:
        assert len(file.requests) == requests
    assert all(each.range and "authorization" not in each.headers for each in file.requests)


LYING = struct.pack("<Q", 2**63 - 1) + b'{"a":' + bytes(2**20)
LONG = struct.pack("<Q", 30 * 2**20) + b'{"a":' + bytes(2**20)
WORDY = Hollow.of(
    b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\1\0\0\0\0\0\0\0k" + struct.pack("<IIQ", 9, 8, 10**6), 10**10
)


@pytest.mark.parametrize(
    "faults",
    [
        {"ranges": False},
        {"no_length": True, "ranges": False},
        {"range_shift": 8},
        {"range_status": 200},
        {"answers": [(404, {})]},
        {"answers": [(206, {})]},
        {"answers": [(206, {"Content-Range": "bytes 0-99/*"})]},
        {"answers": [(206, {"Content-Range": f"bytes 0-99/{10**18}"})]},
        {"extra_headers": {"Content-Encoding": "gzip"}},
        {"drop_after": 1000},
        {"content": Hollow.of(LONG, 10**10)},
        {"content": WORDY},
        {"redirect": "http://192.0.2.1/m"},
    ],
    ids=[
        *("no ranges", "no length", "another range", "a range as the whole", "not found", "an unsaid range"),
        *(
            "an unsaid length",
            "an absurd length",
            "gzip",
            "a broken body",
            "a long header",
            "a long vocabulary",
        ),
        "a forbidden address",
    ],
)
def test_server_that_gives_no_header_costs_few_bytes(faults: dict[str, Any], server: FileServer) -> None:
    """What gives no beginning that can be read is an error, after no more than was to be fetched."""
    file = server.serve("/m", faults.pop("content", PLAIN), **faults)
    with pytest.raises(DownloadError):
        begun(file.url)
    assert file.bytes_sent <= MOST + 2**20  # a whole answer is hung up on: what was under way then is lost


def test_length_that_lies_is_no_header(server: FileServer) -> None:
    """A header that says it has 2^63 bytes is not waited for; the file is for its reader to judge."""
    file = server.serve("/m", Hollow.of(LYING, 10**10))
    assert begun(file.url).size_bytes == 10**10
    assert len(file.requests) == 1


@pytest.mark.parametrize(
    "fault", [{"hold_head": True}, {"hold_after": 0}, {"hold_after": 1000}, {"rate": 100.0}]
)
def test_server_that_hangs_or_drips_is_left_when_time_is_up(
    fault: dict[str, Any], server: FileServer
) -> None:
    """Whoever waits can leave at any moment."""
    file = server.serve("/m", PLAIN, **fault)
    cancel = threading.Event()
    file.on_request = lambda earlier: threading.Timer(0.2, cancel.set).start()
    with pytest.raises(DownloadCancelled):
        fetch_beginning(file.url, Policy(), cancel, most_bytes=MOST)


def test_file_that_changes_between_two_ranges_is_not_put_together(server: FileServer) -> None:
    """Two ranges of files of different lengths are no header."""
    file = server.serve("/m", hollow_safetensors(SHAPES, spaces=2**20))

    def change(earlier: int) -> None:
        if earlier:
            file.content = PLAIN

    file.on_request = change
    with pytest.raises(DownloadError, match="has changed"):
        begun(file.url)


def test_mirrors_are_asked_first(server: FileServer) -> None:
    """A mirror that has the file spares its address the question; one that has not costs nothing else."""
    there = server.serve("/mirror/m", PLAIN)
    here = server.serve("/m", PLAIN)
    policy = Policy(mirrors=((here.url[:-1], there.url[:-1]),))
    assert begun(here.url, policy).size_bytes == len(PLAIN)
    assert (len(there.requests), len(here.requests)) == (1, 0)
    there.answers = [(404, {})]
    assert begun(here.url, policy).size_bytes == len(PLAIN)
    assert len(here.requests) == 1


def test_token_goes_to_its_host_alone(server: FileServer) -> None:
    """The rules for tokens are those of downloads: a redirect to another host does not take it along."""
    file = server.serve("/m", PLAIN)
    named = server.serve("/r", PLAIN, redirect=file.url.replace("127.0.0.1", "localhost"))
    begun(named.url, Policy(tokens={"127.0.0.1": "secret"}))
    assert named.requests[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in file.requests[0].headers
    assert file.requests[0].headers["user-agent"].startswith("studio-worker/")


def test_address_that_offers_may_not_name_is_not_asked(server: FileServer) -> None:
    """A private network is as closed for headers as for the files."""
    file = server.serve("/m", PLAIN)
    closed = Policy(networks=Networks(private=False, this_machine=False))
    with pytest.raises(DownloadError):
        begun(file.url, closed)
    assert file.requests == []
