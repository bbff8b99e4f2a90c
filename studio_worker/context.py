"""What the work at hand is called in log lines: its job, its model, its file, its session.

It is said once, where that work begins, and stands in every line that is logged meanwhile, whoever logs.
Takes nothing but the names below, so no prompt and no token, and knows nothing of where lines go.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import ParamSpec, TypedDict, TypeVar, Unpack

Given = ParamSpec("Given")
Got = TypeVar("Got")


class Names(TypedDict, total=False):
    """All that work is called by. Strangers read them: a ``url`` is one that ``safe_url`` has seen."""

    job_id: str
    model: str
    url: str
    dest: str
    worker_id: str
    lane: int


NAMES = tuple(Names.__annotations__)

_names: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "names", default=MappingProxyType({})
)


@contextlib.contextmanager
def called(**names: Unpack[Names]) -> Iterator[None]:
    """While this lasts, the work of this thread, or asyncio task, is called so too. An empty name is none."""
    both = {**_names.get(), **names}
    before = _names.set({name: value for name, value in both.items() if value})
    try:
        yield
    finally:
        _names.reset(before)


def carried(work: Callable[Given, Got]) -> Callable[Given, Got]:
    """``work`` under the names of this moment and no others, whenever and in whichever thread it is done.

    A thread begins without names: who starts one for the work at hand hands them on by this.
    """
    names = _names.get()

    def under_them(*args: Given.args, **options: Given.kwargs) -> Got:
        before = _names.set(names)
        try:
            return work(*args, **options)
        finally:
            _names.reset(before)

    return under_them


def add_names(record: logging.LogRecord) -> bool:
    """A filter for handlers: every line passes, and with it go the names that it does not give itself."""
    for name, value in _names.get().items():
        record.__dict__.setdefault(name, value)
    return True
