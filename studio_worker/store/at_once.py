"""Several tasks that wait for the network, side by side, until the first of them fails.

The threads do not keep the process alive, so that a stop is never stuck behind a stalled server.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from studio_worker.context import carried
from studio_worker.errors import DownloadCancelled

_LOOK_AGAIN_S = 0.1


def do_all(
    tasks: Sequence[Callable[[threading.Event], None]],
    cancel: threading.Event | None,
    at_once: int,
) -> None:
    """Do every task, ``at_once`` at a time; each gets the event that ends it.

    Raises:
        Exception: the first error of any; the others are cancelled, and have ended when it is raised.
    """
    cancel = cancel or threading.Event()
    if min(at_once, len(tasks)) < 2:
        for task in tasks:
            task(cancel)
        return
    stop = threading.Event()
    waiting: queue.SimpleQueue[Callable[[threading.Event], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def work() -> None:
        while not stop.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                task(stop)
            except Exception as error:
                stop.set()
                ended.put(error)
                return
        ended.put(None)

    threads = min(at_once, len(tasks))
    for number in range(threads):
        threading.Thread(target=carried(work), name=f"fetch-{number}", daemon=True).start()
    first: Exception | None = None
    while threads:
        if cancel.is_set():
            stop.set()
        try:
            error = ended.get(timeout=_LOOK_AGAIN_S)
        except queue.Empty:
            continue
        threads -= 1
        if first is None or isinstance(first, DownloadCancelled):
            first = error or first
    if first is None and stop.is_set():
        first = DownloadCancelled("the models")
    if first is not None:
        raise first
