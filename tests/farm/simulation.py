"""A farm in simulation: ``make farm``.

Studio processes on one database, a crowd of workers in one event loop, people who queue jobs, and everything
that goes wrong between them, by a script from a seed. A verdict, and figures beside a studio of one desk and
beside a bare queue of the same database.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.farm.farm import Farm, Outcome, Size
from tests.farm.stores import OneDesk

_SHOWN = 10


def one_desk(folder: Path, size: Size) -> Outcome:
    """The default studio: one process on an SQLite file."""
    folder.mkdir()
    return Farm(size, OneDesk(folder), folder).run()


def main() -> int:
    """Run the farm and print its account; exit status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--keep", type=Path, help="a folder for what the studios leave")
    given = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        desk = one_desk(
            folder / "desk",
            Size(given.seed, given.jobs, workers=given.workers, processes=1, faults=given.faults),
        )
        console.print(table("one desk: SQLite", desk))
    return 0 if is_clean(desk) else 1


def is_clean(outcome: Outcome) -> bool:
    """Whether every promise was kept."""
    return outcome.verdict.is_clean and not outcome.wrong


def table(title: str, outcome: Outcome) -> Table:
    """The account of one run."""
    made = Table(title=f"{title}, seed {outcome.size.seed}, {outcome.seconds:.0f} s", show_header=False)
    book, verdict = outcome.book, outcome.verdict
    account = book.account
    waits = sorted(verdict.waits.values()) or [0.0]
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.faults.items()))
    for name, text in (
        (
            "jobs",
            f"{len(account.delivered)} done, {len(account.hopeless)} given up; {outcome.jobs_per_s:.1f}/s",
        ),
        ("workers", f"{outcome.size.workers}; {book.sessions} sessions, {book.offers} offers"),
        ("pictures", f"{book.made} made, {account.refused.total()} refused, {book.uploads_again} sent again"),
        ("faults", f"{outcome.faults.total()}: {faults}"),
        (
            "queue to offer",
            f"p50 {statistics.median(waits):.2f} s, p99 {waits[int(len(waits) * 0.99)]:.2f} s",
        ),
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
