"""Input pictures: where they may come from, and how long and how much a server may send."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import ipaddress
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from studio_worker.config.downloads import policy_from
from studio_worker.config.sections import ModelsSection, StudioSection
from studio_worker.config.settings import Settings
from studio_worker.errors import DownloadCancelled, DownloadError, DownloadRefused
from studio_worker.models import ModelFile
from studio_worker.network.addresses import Networks, network_kind
from studio_worker.store import Store
from studio_worker.store.terms import fixed
from studio_worker.transfer.policy import Policy
from studio_worker.work.inputs import input_fetcher
from tests.fakes.servers import FileServer, resolve_to

BODY = b"a tiny pretend picture\xfb\xef\xbe\xff"
STUDIO = "https://studio.example/graphics/api"
QUICK = Policy(connect_s=5, stall_s=5, wait=lambda event, seconds: event.is_set())


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def fetch(url: str, studio: str = STUDIO, **policy: Any) -> bytes:
    return input_fetcher(dataclasses.replace(QUICK, **policy), studio)(url, threading.Event())


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("192.168.1.10", "private"),
        ("100.64.0.1", "private"),  # carrier-grade NAT
        ("fd00::1", "private"),
        ("::ffff:192.168.1.10", "private"),
        ("64:ff9b::a01:203", "private"),  # 10.1.2.3 behind NAT64
        ("2002:a01:203::1", "private"),  # 10.1.2.3 behind 6to4
        ("64:ff9b:1::a01:203", "private"),  # behind a NAT64 of the network's own
        ("fec0::1", "private"),  # site-local, as it was once
        ("::10.1.2.3", "private"),  # the first way to write an IPv4 address as an IPv6 one
        ("127.0.0.1", "this machine"),
        ("0.0.0.0", "this machine"),
        ("::1", "this machine"),
        ("::ffff:127.0.0.1", "this machine"),
        ("169.254.169.254", "local link"),  # where clouds keep credentials
        ("fe80::1%eth0", "local link"),
        ("224.0.1.1", "multicast"),
        ("93.184.216.34", ""),
        ("2606:4700:4700::1111", ""),
    ],
)
def test_kind_of_network_is_told(address: str, kind: str) -> None:
    """Every spelling of an address that is not public is known for what it is."""
    found = network_kind(ipaddress.ip_address(address))
    assert kind in found
    assert bool(found) == bool(kind)


def test_private_networks_can_be_allowed_but_not_the_local_link() -> None:
    """allow_insecure_urls opens the local network, and never the metadata service of a cloud."""
    lan, link = ipaddress.ip_address("192.168.1.2"), ipaddress.ip_address("169.254.169.254")
    assert Networks(private=True).problem(("nas", 443), lan) is None
    assert Networks(private=True).problem(("metadata", 80), link) is not None
    assert "allow_insecure_urls" in str(Networks().problem(("nas", 443), lan))


def test_input_on_this_machine_is_refused(server: FileServer) -> None:
    """A job cannot make the worker read from services of its own machine; nothing is asked of them."""
    file = server.serve("/secret", BODY)
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(DownloadRefused, match="this machine itself"):
            fetch(file.url.replace("127.0.0.1", host))
    assert file.requests == []


def test_input_by_a_name_of_a_private_address_is_refused(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is judged by every address it resolves to; one that is private is enough."""
    file = server.serve("/secret", BODY)
    resolve_to(monkeypatch, "93.184.216.34", "127.0.0.1")
    url = file.url.replace("127.0.0.1", "pictures.example").replace("http:", "https:")
    with pytest.raises(DownloadRefused, match=r"pictures\.example is an address of this machine itself"):
        fetch(url)
    assert file.requests == []


def test_redirect_into_a_private_network_is_refused(server: FileServer) -> None:
    """Each address on the way is checked, not the first alone."""
    secret = server.serve("/secret", BODY)
    entry = server.serve("/entry", b"", redirect=secret.url.replace("127.0.0.1", "localhost"))
    with pytest.raises(DownloadRefused, match="localhost is an address of this machine"):
        fetch(entry.url, studio=f"http://127.0.0.1:{server.port}")
    assert (len(entry.requests), len(secret.requests)) == (1, 0)


def test_input_of_the_studios_own_host_is_fetched(server: FileServer) -> None:
    """A studio on the local network, or on this machine, serves its own inputs without further settings."""
    file = server.serve("/input.png", BODY)
    assert fetch(file.url, studio=f"http://127.0.0.1:{server.port}/custom/") == BODY


def test_input_of_another_port_of_the_studios_host_is_refused(server: FileServer) -> None:
    """That a studio is trusted opens none of its neighbours on the same machine."""
    file = server.serve("/input.png", BODY)
    with pytest.raises(DownloadRefused, match="this machine itself"):
        fetch(file.url, studio="http://127.0.0.1:1/")
    assert file.requests == []


def offered(
    server: FileServer, url: str, folder: Path, *, studio: str, is_required: bool, **models: Any
) -> int:
    """How many requests a model file at ``url`` brings, by the rules of that configuration."""
    settings = Settings(
        studio=StudioSection(api_base_url=studio), models=ModelsSection.model_validate(models)
    )
    policy = dataclasses.replace(policy_from(settings), delays_s=())
    file = ModelFile("model", url, "m.safetensors", None, hashlib.sha256(BODY).hexdigest())
    asked = server.serve("/m", BODY)
    with contextlib.suppress(DownloadRefused):
        Store(folder, fixed(policy, required=[file] if is_required else [])).ensure([file])
    return len(asked.requests)


def test_model_that_an_offer_brings_opens_no_private_network(server: FileServer, tmp_path: Path) -> None:
    """A job's model files make no worker ask its own machine or network; the operator's may be there."""
    url, elsewhere = f"http://127.0.0.1:{server.port}/m", "https://studio.example"
    lan = f"http://10.0.0.1:{server.port}/m"
    insecure = {"allow_insecure_urls": True}
    mirrors = {"mirrors": {"https://models.example/": f"http://127.0.0.1:{server.port}/"}}
    for number, (address, studio, is_required, models, requests) in enumerate(
        [
            (url, elsewhere, False, {}, 0),
            (url, elsewhere, True, {}, 1),
            (url, elsewhere, False, insecure, 1),
            (url, "http://127.0.0.1:1", False, {}, 1),
            (url, f"http://127.0.0.1:{server.port}", False, {}, 1),
            ("https://models.example/m", elsewhere, False, mirrors, 1),
            (lan, "http://127.0.0.1:1", False, {}, 0),
        ]
    ):
        folder = tmp_path / str(number)
        assert offered(server, address, folder, studio=studio, is_required=is_required, **models) == requests


def test_insecure_setting_allows_private_inputs(server: FileServer) -> None:
    """allow_insecure_urls lets inputs come from the local network."""
    file = server.serve("/input.png", BODY)
    assert fetch(file.url, allow_insecure=True) == BODY


def test_literal_private_address_is_refused_behind_a_proxy_too(server: FileServer) -> None:
    """A proxy is not asked for an address of the private network it stands in."""
    asked = server.serve("http://10.0.0.1/secret", BODY)
    with pytest.raises(DownloadRefused, match="a private network"):
        fetch("https://10.0.0.1/secret", proxy=f"http://127.0.0.1:{server.port}")
    assert asked.requests == []


def test_checked_address_is_the_one_connected_to(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to an address that was checked, each in turn, under the name of the URL."""
    file = server.serve("/input.png", BODY)
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")  # nothing listens on the first
    url = file.url.replace("127.0.0.1", "pictures.example")
    assert fetch(url, studio="http://pictures.example", allow_insecure=True) == BODY
    assert file.requests[0].headers["host"].startswith("pictures.example")


def test_passing_fault_is_tried_again(server: FileServer) -> None:
    """A server that is busy for a moment does not cost the job."""
    file = server.serve("/input.png", BODY, answers=[(503, {}), (429, {})])
    assert fetch(file.url, allow_insecure=True) == BODY


@pytest.mark.parametrize("answers", [[(404, {})], [(503, {})] * 3])
def test_lasting_fault_is_not(server: FileServer, answers: list[Any]) -> None:
    """A picture that is not there, or still not there at the third try, is an error."""
    file = server.serve("/input.png", BODY, answers=list(answers))
    with pytest.raises(DownloadError, match=str(answers[0][0])):
        fetch(file.url, allow_insecure=True)
    assert len(file.requests) == len(answers)


def test_server_that_drips_is_given_up(server: FileServer) -> None:
    """A server that sends a byte now and then holds the worker for a limited time."""
    file = server.serve("/input.png", bytes(64 * 1024), rate=64 * 1024)
    fetch_soon = input_fetcher(Policy(allow_insecure=True), STUDIO, max_s=0.1)
    began = time.monotonic()
    with pytest.raises(DownloadError, match="too slow"):
        fetch_soon(file.url, threading.Event())
    assert time.monotonic() - began < 10


def test_stop_ends_the_tries(server: FileServer) -> None:
    """A stop does not wait for the next try."""
    file = server.serve("/input.png", BODY, answers=[(503, {})] * 3)
    stop = threading.Event()
    file.on_request = lambda earlier: stop.set()
    with pytest.raises(DownloadCancelled):
        input_fetcher(Policy(allow_insecure=True), STUDIO)(file.url, stop)


DATA: dict[str, str] = {
    "base64": "data:image/png;base64," + base64.b64encode(BODY).decode(),
    "in capitals": "DATA:image/png;BASE64," + base64.b64encode(BODY).decode(),
    "without a type": "data:;base64," + base64.b64encode(BODY).decode(),
    "with parameters": "data:image/png;charset=utf-8;base64," + base64.b64encode(BODY).decode(),
    "without its padding": "data:image/png;base64," + base64.b64encode(BODY).decode().rstrip("="),
    "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(BODY).decode(),
    "in lines": "data:image/png;base64," + base64.encodebytes(BODY * 5).decode(),
    "escaped": "data:image/png;base64," + quote(base64.b64encode(BODY).decode(), safe=""),
    "no base64 at all": "data:image/png," + quote(BODY),
}


@pytest.mark.parametrize("form", DATA)
def test_input_may_stand_in_its_address(form: str) -> None:
    """A data: address brings its picture itself, in any of its spellings, and nothing is asked of anybody."""
    assert fetch(DATA[form]) == BODY * (5 if form == "in lines" else 1)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,c2VjcmV0*", "not base64"),
        ("data:image/png;base64,c2Vjc", "not base64"),
        ("data:," + "c2VjcmV0" * 10, "more than 64 bytes"),
    ],
)
def test_unreadable_data_address_is_the_jobs_fault(
    url: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data: address that is none, or holds too much, ends the job for good; its content is not told."""
    monkeypatch.setattr("studio_worker.work.inputs.MAX_BYTES", 64)
    with pytest.raises(DownloadRefused, match=says) as caught:
        fetch(url)
    assert caught.value.is_jobs_fault
    assert "c2Vjc" not in str(caught.value)
