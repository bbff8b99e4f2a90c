"""Fuzzing: what comes from outside, changed at random, leads to nothing but what its reader is to raise.

``make fuzz`` tries each target for ten minutes, ``make fuzz TARGET=bundles SECONDS=60`` one of them for one;
``test_fuzz.py`` a few hundred inputs of each. Inputs are good ones with some of their bytes or fields
changed; checksums are put right again, so that what lies behind them is reached. A fault is any other
exception, a process that ends, memory or time beyond the limits below, a wrong file that counts as right.
Hypothesis makes the inputs from ``--seed``, and the smallest one with the same fault.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.inputs import (
    CLAIMS,
    FRAMES,
    bundles,
    changed_bytes,
    changed_json,
    images,
    readable,
    responses,
    weights,
)
from tests.fuzz.targets import Attempt, frames, headers, http, offers, pictures, tars

CPU_S, WALL_S = 5.0, 60.0
"""For one input: the processor's time, since the machine may be busy; by the clock, for what waits."""

MEMORY_BYTES = 512 * 2**20
"""That a process may grow by, in all. A header of 32 MiB unpacks to some 300."""

_BATCH = 500


class TooSlow(BaseException):
    """Nothing on the way may take it for a fault of the input."""


def _alarm(*_: object) -> NoReturn:
    raise TooSlow


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """The time that one input may take."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    try:
        yield
    except TooSlow as error:
        raise AssertionError(f"takes more than {CPU_S:g} s of the processor, or {WALL_S:g} s") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def peak_bytes() -> int:
    """Since it was last asked: else all inputs behind a large one would count as large, too."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    return peak


class Target(NamedTuple):
    inputs: st.SearchStrategy[Any]
    opened: Callable[[Path], contextlib.AbstractContextManager[Attempt]]


TARGETS = {
    "frames": Target(
        st.one_of(changed_json(FRAMES), changed_bytes(FRAMES).map(readable), changed_bytes(FRAMES)), frames
    ),
    "offers": Target(changed_json(CLAIMS), offers),
    "headers": Target(weights(), headers),
    "bundles": Target(bundles(), tars),
    "http": Target(responses(), http),
    "images": Target(images(), pictures),
}


def tried(name: str, *, seconds: float, inputs: int, number: int) -> int:
    """How many inputs a target was tried with, at most ``inputs``, for about ``seconds``.

    Raises:
        AssertionError: or whatever else an input led to; a note on it has the smallest such input.
    """
    logging.getLogger().addHandler(logging.NullHandler())  # a refused input is no news here
    count, until = 0, time.monotonic() + seconds
    signal.signal(signal.SIGPROF, _alarm)
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder, TARGETS[name].opened(Path(folder)) as attempt:
        before: list[int] = []

        def one(made: Any) -> None:
            nonlocal count
            count += 1
            with limits():
                attempt(made)
            if not before:  # with what the first has loaded
                before.append(peak_bytes())
            grown = peak_bytes() - before[0]
            assert grown < MEMORY_BYTES, f"has grown by {grown / 1e6:.0f} MB"

        while count < inputs and time.monotonic() < until:
            batch = settings(
                max_examples=min(_BATCH, inputs - count),
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )
            seed(number)(batch(given(TARGETS[name].inputs)(one)))()
            number += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("target", nargs="*", choices=[*TARGETS, []], help="default: all of them")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each target")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="for each target, at most")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name in args.target or TARGETS:
        started = time.monotonic()
        count = tried(name, seconds=args.seconds, inputs=args.inputs, number=args.seed)
        print(f"{name}: {count} inputs in {time.monotonic() - started:.0f} s, nothing unexpected", flush=True)


if __name__ == "__main__":
    main()
