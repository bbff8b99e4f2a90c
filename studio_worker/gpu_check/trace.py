"""What a profile says of the steps of a picture: what the host waits for and launches, when the GPU idles.

Read from the trace that torch's profiler exports (Chrome's Trace Event Format, times in microseconds), which
is the one form of it that is public.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

MARK = "gpu-check step"
"""What the marks between two steps are called."""

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_CALLS = {"cuda_runtime", "cuda_driver"}

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """The time from the first mark to the last.

    Args:
        steps: how many are between them.
        waits: how often the host waits for the device, by the operation in which it does.
        launches: of kernels.
        busy_share: how much of the time the device computes; ``None`` where it is not seen.
    """

    steps: int
    waits: Mapping[str, int]
    launches: int
    busy_share: float | None


def read_trace(path: Path) -> Trace:
    """The trace in the file ``path``."""
    return judge(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def judge(events: Iterable[Event]) -> Trace:
    """What ``events`` say. Without two marks, nothing."""
    timed = [event for event in events if event.get("ph") == "X" and "ts" in event]
    marks = sorted(
        _start(event) for event in timed if event.get("cat") == "user_annotation" and event["name"] == MARK
    )
    if len(marks) < 2:
        return Trace(0, {}, 0, None)
    first, last = marks[0], marks[-1]
    within = [event for event in timed if first <= _start(event) < last]
    calls = [event for event in within if event.get("cat") in _CALLS]
    operations = sorted((event for event in within if event.get("cat") == "cpu_op"), key=_start)
    waits = Counter(_around(event, operations) for event in calls if is_wait(str(event["name"])))
    computed = [event for event in timed if event.get("cat") in _ON_DEVICE]
    return Trace(
        steps=len(marks) - 1,
        waits=dict(waits),
        launches=sum(is_launch(str(event["name"])) for event in calls),
        busy_share=_covered(computed, first, last) / (last - first) if computed else None,
    )


def is_wait(call: str) -> bool:
    """Whether the host waits for the device in a call of CUDA's runtime or driver."""
    return "Synchronize" in call or call == "cudaMemcpy"


def is_launch(call: str) -> bool:
    return "LaunchKernel" in call or "GraphLaunch" in call


def _start(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event.get("dur", 0))


def _around(call: Event, operations: Sequence[Event]) -> str:
    """The operations around ``call``, the outermost and the innermost."""
    at = _start(call)
    before = takewhile(lambda each: _start(each) <= at, operations)
    around = [str(each["name"]) for each in before if each.get("tid") == call.get("tid") and at < _end(each)]
    ends = dict.fromkeys((*around[:1], *around[-1:]))
    return " > ".join((*ends, str(call["name"])))


def _covered(events: Iterable[Event], first: float, last: float) -> float:
    """For how long between ``first`` and ``last`` any of ``events`` runs."""
    covered, until = 0.0, first
    for start, end in sorted((max(_start(event), first), min(_end(event), last)) for event in events):
        if end > until:
            covered += end - max(start, until)
            until = end
    return covered
