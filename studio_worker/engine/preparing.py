"""Requests before their turn: understood, and their input pictures decoded, while others have the device.

Owns how many do so at a time. A foreign picture in its own size takes up to 192 MB, and as much again until
it is laid out: so one request's are decoded at a time, and all others of a box have theirs as fetched or as
their engine wants them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from studio_worker.engine.contract import Inputs, Preparer, Request
from studio_worker.engine.faults import translated
from studio_worker.engine.parameters import printable

_LOOK_S = 0.1
_CPU = torch.device("cpu")
_one_at_a_time = threading.Lock()


def preparer(understand: Callable[[Request, Callable[[], None]], object]) -> Preparer:
    """
    Args:
        understand: what makes of a request that which its engine works with. Called from one thread at a time
            where a request has inputs.
    """

    def prepare(request: Request, check: Callable[[], None]) -> Request:
        private = (printable(request.task.prompt), printable(request.task.negative_prompt or ""))
        with translated(_CPU, private), _alone(request.inputs, check):
            return replace(request, inputs=Inputs(), prepared=understand(request, check))

    return prepare


@contextmanager
def _alone(inputs: Inputs, check: Callable[[], None]) -> Iterator[None]:
    """Wait until no other request's pictures are decoded, where there are any here."""
    if inputs == Inputs():
        yield
        return
    while not _one_at_a_time.acquire(timeout=_LOOK_S):
        check()
    try:
        yield
    finally:
        _one_at_a_time.release()
