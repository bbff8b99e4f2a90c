"""A farm in simulation: ``make farm``.

Studio processes on one PostgreSQL database and one S3 storage, a crowd of workers in one event loop, people
who queue jobs, and everything that goes wrong between them, by a script from a seed: a verdict.

Then figures, without faults, of as many workers that take as long for a picture and load no models: the same
farm, a studio of one desk (SQLite, a folder, one process), and a bare queue in the same database server,
whose clients claim with ``SKIP LOCKED``, wait as long as a picture takes, and note that it is done. Their
pictures go nowhere, and they know no turns. All of them find all jobs queued when they begin. How long a job
waits for its offer is measured besides, with jobs that come at half that speed. The bare queue is run without
the work, too: what its server can do.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.farm.bare_loop import jobs_per_second
from tests.farm.farm import Farm, Outcome, Size
from tests.farm.postgres import Cluster
from tests.farm.s3 import S3Server
from tests.farm.s3_proxy import S3Proxy
from tests.farm.stores import Bucket, OneDatabase, OneDesk, SharedFolder, Shelves

_SHOWN = 10
GOAL = 0.5
"""Of the bare queue's jobs a second."""
HALF_LOADED_S = 40
"""So long jobs come at half speed."""


def one_desk(folder: Path, size: Size) -> Outcome:
    """The default studio: one process on an SQLite file."""
    folder.mkdir()
    return Farm(size, OneDesk(folder), folder).run()


def one_farm(folder: Path, size: Size, cluster: Cluster, shelves: Shelves) -> Outcome:
    """Several processes on one database."""
    folder.mkdir()
    return Farm(size, OneDatabase(cluster, folder, shelves), folder).run()


@contextlib.contextmanager
def bucket(seed: int) -> Iterator[Bucket]:
    """Of an S3 server that starts now, behind a proxy that fails on order."""
    with S3Server() as server, S3Proxy(server.port, seed) as proxy:
        yield Bucket(server, proxy)


def main() -> int:
    """Run the farm and print its account; exit status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--makes", type=float, default=2.0, metavar="SECONDS", help="for a picture")
    parser.add_argument("--folder", action="store_true", help="pictures in a folder, and not in S3")
    parser.add_argument("--figures", type=int, default=4_000, metavar="JOBS", help="without faults; 0: none")
    parser.add_argument("--keep", type=Path, help="a folder for what the studios leave")
    given = parser.parse_args()
    console = Console()
    size = Size(
        given.seed, given.jobs, workers=given.workers, processes=given.processes, faults=given.faults,
        makes_s=given.makes, loads_s=2 * given.makes,
    )  # fmt: skip
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        folder: Path = given.keep or Path(tempfile.mkdtemp(prefix="farm-"))
        folder.mkdir(parents=True, exist_ok=True)
        stack.callback(_clear, folder, outcomes, is_kept=given.keep is not None)
        cluster = stack.enter_context(Cluster())
        with contextlib.ExitStack() as while_failing:
            shelves: Shelves = SharedFolder(folder / "pictures")
            if not given.folder:
                shelves = while_failing.enter_context(bucket(given.seed))
            outcomes.append(one_farm(folder / "farm", size, cluster, shelves))
        console.print(table("the farm while everything fails", outcomes[-1]))
        if given.figures:
            calm = replace(size, jobs=given.figures, faults=0, loads_s=0.0, come="first")
            outcomes += _farm_and_desk(folder, calm, cluster)
            console.print(_figures(cluster, *outcomes[1:]))
    return 0 if all(is_clean(outcome) for outcome in outcomes) else 1


def _farm_and_desk(folder: Path, calm: Size, cluster: Cluster) -> list[Outcome]:
    """Both as fast as they can, and then with half as many jobs a second."""
    outcomes: list[Outcome] = []
    for name in ("farm", "desk"):

        def run(kind: str, size: Size, name: str = name) -> Outcome:
            place = folder / f"calm {name} {kind}"
            if name == "desk":
                return one_desk(place, replace(size, processes=1))
            return one_farm(place, size, cluster, SharedFolder(folder / f"pictures {kind}"))

        fast = run("at its fastest", calm)
        per_s = fast.jobs_per_s / 2
        outcomes += [fast, run("half loaded", replace(calm, jobs=int(per_s * HALF_LOADED_S), come=per_s))]
    return outcomes


def _clear(folder: Path, outcomes: Sequence[Outcome], *, is_kept: bool) -> None:
    """Remove what the studios left, unless somebody asked for it, or to see what broke a promise."""
    if not outcomes or not all(is_clean(outcome) for outcome in outcomes):
        sys.stdout.write(f"what the studios left, and what the verdict was found by: {folder}\n")
    elif not is_kept:
        shutil.rmtree(folder)


def _figures(cluster: Cluster, farm: Outcome, half_farm: Outcome, desk: Outcome, half_desk: Outcome) -> Table:
    size = farm.size
    loop, idle = (
        jobs_per_second(cluster.url(), jobs=size.jobs, clients=size.workers, makes_s=makes_s)
        for makes_s in (size.makes_s, 0.0)
    )
    made = Table(title=f"{size.jobs} jobs, {size.workers} workers, {size.makes_s:g} s a picture, no faults")
    columns = (
        "jobs/s",
        "of the loop",
        "half loaded, queue to offer: p50",
        "p99",
        "studios' CPU",
        "the crowd's",
    )
    for column in ("", *columns):
        made.add_column(column)
    kinds = ((f"farm of {size.processes} processes", farm, half_farm), ("one desk, SQLite", desk, half_desk))
    for name, outcome, half in kinds:
        ratio, (p50, p99) = outcome.jobs_per_s / loop, waits(half)
        goal = f" (goal {GOAL})" if outcome is farm else ""
        cpu = [f"{cpu_s / size.jobs * 1000:.1f} ms" for cpu_s in (outcome.studios_cpu_s, outcome.crowd_cpu_s)]
        told = (f"{outcome.jobs_per_s:.1f}", f"{ratio:.2f}{goal}", f"{p50:.2f} s", f"{p99:.2f} s")
        made.add_row(name, *told, *cpu)
        for each in (outcome, half):
            if not is_clean(each):
                made.add_row("", "this run broke promises:", str(each.wrong[:1]), str(each.verdict)[:200])
    made.add_row("bare SKIP LOCKED loop", f"{loop:.1f}", "1", "", "")
    made.add_row("the same without the work", f"{idle:.0f}", f"{idle / loop:.1f}", "", "")
    return made


def is_clean(outcome: Outcome) -> bool:
    """Whether every promise was kept."""
    return outcome.verdict.is_clean and not outcome.wrong


def waits(outcome: Outcome) -> tuple[float, float]:
    """Seconds from queue to offer: p50 and p99."""
    each = sorted(outcome.verdict.waits.values()) or [0.0]
    return statistics.median(each), each[int(len(each) * 0.99)]


def table(title: str, outcome: Outcome) -> Table:
    """The account of one run."""
    size, book, verdict = outcome.size, outcome.book, outcome.verdict
    made = Table(title=f"{title}, seed {size.seed}, {outcome.seconds:.0f} s", show_header=False)
    account = book.account
    p50, p99 = waits(outcome)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.faults.items()))
    done = f"{outcome.done} done, {len(account.hopeless)} given up"
    for name, text in (
        ("jobs", f"{done}, of {size.people} people; {outcome.jobs_per_s:.1f}/s"),
        ("studio processes", str(size.processes)),
        ("workers", f"{size.workers}; {book.sessions} sessions, {book.offers} offers"),
        ("pictures", f"{book.made} made, {account.refused.total()} refused, {book.uploads_again} sent again"),
        ("faults", f"{outcome.faults.total()}: {faults}"),
        ("queue to offer", f"p50 {p50:.2f} s, p99 {p99:.2f} s"),
        ("lost", _told(verdict.lost)),
        ("recorded or held twice", _told(verdict.twice)),
        ("unfair", _told(verdict.unfair)),
        ("priorities overtaken", _told(verdict.overtaken)),
        ("else wrong", _told(outcome.wrong)),
    ):
        made.add_row(name, text)
    return made


def _told(lines: Sequence[str]) -> str:
    return "\n".join([str(len(lines)), *lines[:_SHOWN]])


if __name__ == "__main__":
    sys.exit(main())
