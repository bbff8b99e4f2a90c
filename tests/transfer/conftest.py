"""A server of files, and the log of what fetches them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.fakes.servers import FileServer


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="studio_worker")
    return caplog
