"""The soak: the real service, a real studio, and everything that goes wrong between them. ``make chaos``.

A script made from a seed says which fault comes at which job; the moments within a job are the machine's own.
At the end there is an account, and nothing may be missing from it:

* every job is done exactly once, or failed for a reason that is known;
* no picture that was made is lost, unless the studio refused it;
* none was made again while the outbox held it;
* no file of the worker's state is damaged, and nothing is left over;
* jobs that ask for the same picture got the same bytes, whatever happened in between.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.service_process import ServiceProcess, ServiceProcessError
from studio_worker.errors import ControlError, StateUnavailable
from studio_worker.local_studio import DATABASE_NAME, LocalStudio
from studio_worker.local_studio.rules import JobStatus
from studio_worker.report.control import ask
from studio_worker.spool.in_hand import poisoned_jobs
from tests.chaos.disk import StateDisk
from tests.chaos.proxy import ChaosProxy, UploadFault

STALLED_S = 90.0
"""So long without an accepted offer, and something hangs."""
MARK = "a hidden castle"
"""In every prompt; no log may hold it."""
WEIGHTS = {
    "drop": 18, "kill studio": 7, "kill worker": 13, "stop worker": 6, "duplicate": 12, "pause": 7,
    "upload status": 12, "upload refused": 6, "upload swallowed": 8, "upload denied": 5, "upload cut": 6,
    "upload slow": 8, "read-only disk": 8, "portal": 8, "broken IPv6": 8,
}  # fmt: skip
"""How often each fault comes, relative to the others."""


@dataclass(frozen=True)
class Fault:
    """One entry of the script: ``delay_s`` after the accept number ``after``."""

    kind: str
    after: int
    delay_s: float
    status: int
    seconds: float


def script(seed: int, jobs: int, faults: int, stalls: int) -> list[Fault]:
    """The faults of a soak, in order; the same for the same arguments."""
    chance = random.Random(f"{seed} {jobs} {faults}")
    kinds = list(WEIGHTS)  # each at least once, where there are so many
    kinds += chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=max(0, faults - stalls - len(kinds)))
    chance.shuffle(kinds)
    kinds = kinds[: faults - stalls] + ["stall"] * stalls
    return [
        Fault(
            kind=kind,
            after=1 + number * max(1, jobs - 2) // faults,
            delay_s=chance.uniform(0.0, 0.8),
            status=chance.choice([500, 502, 503, 504, 429, 408]),
            seconds=chance.uniform(0.5, 2.5),
        )
        for number, kind in enumerate(kinds)
    ]


@dataclass
class Account:
    """What came of it. Everything in ``wrong`` is a broken promise."""

    seed: int
    done: int = 0
    failed: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    made: int = 0
    made_twice: int = 0
    refused: int = 0
    processes: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Studio:
    """The local studio as a process of its own, on one port and one file, so that it can be killed."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        with (self._folder / "studio.log").open("ab") as log_file:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "studio_worker", "local-studio", "--port", str(self.port),
                    "--data", str(self._folder), "--models", str(sample_model.WEIGHTS.parent),
                    "--approve-all",
                ],
                stdout=subprocess.DEVNULL,
                stderr=log_file,
            )  # fmt: skip

    def await_answer(self) -> None:
        deadline = time.monotonic() + STALLED_S
        while not self.counts():
            if time.monotonic() > deadline:
                raise ServiceProcessError("the studio does not answer")
            time.sleep(0.1)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def counts(self) -> dict[str, int]:
        """Jobs by status; empty while it is down."""
        try:
            answer = requests.get(f"{self.url}/api/state", timeout=5).json()
        except requests.RequestException:
            return {}
        return dict(answer["queue"])


class Soak:
    """One run. ``jobs`` of which a part needs torch, unless ``synthetic``."""

    def __init__(
        self, folder: Path, *, seed: int, jobs: int, faults: int, stalls: int, synthetic: bool, lanes: int
    ) -> None:
        self._folder = folder
        self._script = script(seed, jobs, faults, stalls)
        self._account = Account(seed)
        self._held: set[str] = set()
        self._kept: collections.Counter[str] = collections.Counter()
        self._refused: set[str] = set()
        self._variants: dict[str, str] = {}
        self._jobs = jobs
        self._synthetic = synthetic
        self._lanes = lanes
        self._chance = random.Random(seed)

    def run(self) -> Account:
        with contextlib.ExitStack() as ends:
            self._run(ends)
        return self._account

    def _run(self, ends: contextlib.ExitStack) -> None:
        began = time.monotonic()
        with LocalStudio(self._folder / DATABASE_NAME, auto_approve=True) as studio:
            port = studio.port
            work = self._folder / "work"
            work.mkdir()
            self._state = work / "state"
            self._disk = ends.enter_context(StateDisk(self._state))
            with ChaosProxy(port) as proxy:
                self._environment = proxy.names(self._folder / "names")
                self._config = write_configuration(studio, work)
                text = (self._config / "config.toml").read_text()
                text = text.replace(studio.base_url, proxy.url).replace("[log]", '[log]\nlevel = "debug"')
                text = text.replace("[worker]", f"[worker]\nlanes = {self._lanes}")
                assert f"lanes = {self._lanes}" in text
                (self._config / "config.toml").write_text(text)
                for number in range(self._jobs):
                    self._queue(studio, number)
                studio.stop()
                process = Studio(self._folder, port)
                process.await_answer()  # a worker whose first model cannot be had ends, as it should
                self._soak(proxy, process)
                self._account.wrong += proxy.violations
        with LocalStudio(self._folder / DATABASE_NAME) as studio:
            self._judge(studio)
        self._check_state()
        self._account.seconds = time.monotonic() - began

    # --- the jobs ---

    def _queue(self, studio: LocalStudio, number: int) -> None:
        chance = self._chance
        source: Any = {"engine": "synthetic", "files": [], "cliDefaults": {}}
        if number % 40 == 7:
            variant, task = "impossible", {"seed": 1, "initImageUrl": "ftp://x/y"}
        elif self._synthetic or number % 3 == 0:
            seed = chance.randrange(3)
            variant, task = f"synthetic {seed}", {"seed": seed, "width": 192, "height": 192, "steps": 60}
        else:
            seed, steps = chance.randrange(4), chance.choice([6, 12, 30])
            variant, task = f"sample {seed} {steps}", {"seed": seed, "steps": steps}
            source = sample_source(studio)
        prompt = f"{sample_model.prompt('red', 'gem', 'sky')}, {MARK}"
        job_id = studio.queue_job(
            model=MODEL_ID,
            task={"kind": "image", "prompt": prompt, "ext": "png", **task},
            model_source=source,
            max_attempts=90,
        )
        self._variants[job_id] = variant

    # --- the faults ---

    def _soak(self, proxy: ChaosProxy, studio: Studio) -> None:
        self._proxy, self._studio = proxy, studio
        self._service = self._start_worker()
        try:
            for fault in self._script:
                if not self._await_accept(fault.after):
                    break
                # The moment within a job is what is random here, so a plain wait is the point.
                time.sleep(fault.delay_s)
                self._do(fault)
            self._finish()
        finally:
            self._service.kill()
            studio.kill()

    def _await_accept(self, count: int) -> bool:
        """Whether so many offers have been accepted; ``False`` where all jobs ended before."""
        accepts = self._proxy.counts["accept"]
        deadline = time.monotonic() + STALLED_S
        while not self._proxy.wait_for("accept", count, 1.0):
            if self._are_all_ended():
                return False
            if self._proxy.counts["accept"] != accepts:
                accepts, deadline = self._proxy.counts["accept"], time.monotonic() + STALLED_S
            if self._service.process.poll() is not None:
                raise ServiceProcessError(f"the service ended by itself; {self._service.last_line()}")
            if time.monotonic() > deadline:
                raise ServiceProcessError(
                    f"no offer was accepted for {STALLED_S:g} s: {self._studio.counts()}; "
                    f"{self._service.last_line()}"
                )
        return True

    def _are_all_ended(self) -> bool:
        counts = self._studio.counts()
        # What was in hand at two crashes stays in the queue, for another worker.
        left = len(poisoned_jobs(self._state / "spool"))
        return bool(counts) and counts["done"] + counts["failed"] + min(left, counts["queued"]) == self._jobs

    def _do(self, fault: Fault) -> None:
        is_left_out = fault.kind == "read-only disk" and not self._disk.is_there
        self._account.faults[fault.kind + " (left out: not root)" * is_left_out] += 1
        match fault.kind:
            case "drop":
                self._proxy.drop()
            case "stall":
                self._proxy.stall()
            case "duplicate":
                self._proxy.duplicate_next_offer()
            case "kill studio":
                self._studio.kill()
                time.sleep(fault.delay_s)
                self._studio.start()
            case "kill worker":
                self._service.kill()
                self._end_worker()
                self._service = self._start_worker()
            case "stop worker":
                self._stop_worker()
                self._service = self._start_worker()
            case "pause":
                self._pause(fault.seconds)
            case "portal":
                self._proxy.open_portal(fault.seconds)
            case "broken IPv6":
                with self._proxy.broken_first_address():
                    time.sleep(fault.seconds)
            case "read-only disk":
                with self._disk.read_only():
                    time.sleep(fault.seconds)
                self._await_start()
            case _:
                kind: Any = fault.kind.removeprefix("upload ")
                self._proxy.spoil_next_upload(UploadFault(kind, fault.status, fault.seconds))

    def _await_start(self) -> None:
        """A start that found the disk read-only has ended with 75; systemd would try again."""
        try:
            self._service.await_message("READY=1", STALLED_S)
        except ServiceProcessError:
            if self._service.process.poll() != StateUnavailable.exit_status:
                raise
            self._end_worker()
            self._service = self._start_worker()

    def _pause(self, seconds: float) -> None:
        run = self._folder / "work" / "run"
        try:
            in_hand = ask(run, "pause")["job_ids"]
        except ControlError:  # it has only just been started
            return
        begin = self._service.log_path.stat().st_size
        time.sleep(seconds)
        lines = self._service.log_path.read_bytes()[begin:].decode().splitlines()
        ask(run, "resume")
        for line in _parsed(lines):
            if line["message"] == "job accepted" and line["job_id"] not in in_hand:
                self._account.wrong.append(f"job {line['job_id']} was accepted while paused")

    def _finish(self) -> None:
        """All that is left is made and delivered without another fault, and the service ends."""
        deadline = time.monotonic() + STALLED_S
        last: dict[str, int] = {}
        while not self._are_all_ended():
            counts = self._studio.counts()
            if counts != last:
                last, deadline = counts, time.monotonic() + STALLED_S
            if time.monotonic() > deadline:
                self._account.wrong.append(f"the jobs do not come to an end: {counts}")
                break
            time.sleep(0.5)
        self._stop_worker()

    # --- the worker's processes, and what their logs say ---

    def _start_worker(self) -> ServiceProcess:
        # What is on disk is what counts: a line about it may have gone down with the process.
        self._held = {json.loads(note.read_text())["job_id"] for note in self._notes()}
        self._account.processes += 1
        log_path = self._folder / f"service-{self._account.processes}.log"
        return ServiceProcess(self._config, log_path, self._environment)

    def _notes(self) -> Iterator[Path]:
        return (self._state / "outbox").glob("*.json")

    def _stop_worker(self) -> None:
        self._service.signal(signal.SIGTERM)
        status = self._service.wait(STALLED_S)
        # Before Python has come to the service's first line, the signal itself ends the process; systemd
        # calls that a clean end, too.
        is_begun = self._service.log_path.stat().st_size > 0
        if status != 0 and (is_begun or status != -signal.SIGTERM):
            self._account.wrong.append(f"a stop ended with exit status {status}; {self._service.last_line()}")
        self._end_worker()

    def _end_worker(self) -> None:
        """Read the log of a process that has ended."""
        self._service.__exit__(None, None, None)
        text = self._service.log_path.read_text()
        if MARK in text:
            self._account.wrong.append(f"a prompt is in {self._service.log_path.name}")
        for line in _parsed(text.splitlines()):
            job_id = line.get("job_id", "")
            match line["message"]:
                case "picture made":
                    self._kept[job_id] += 1
                    if job_id in self._held:
                        self._account.wrong.append(f"job {job_id} was made while the outbox held its picture")
                    self._held.add(job_id)
                case "job accepted":
                    if job_id in self._held:
                        self._account.wrong.append(
                            f"job {job_id} was begun while the outbox held its picture"
                        )
                case "job done":
                    self._held.discard(job_id)
                # The second: refused after a try whose answer was lost, so that the studio may have it.
                case "result refused for good and dropped" | "result was probably delivered":
                    self._held.discard(job_id)
                    self._refused.add(job_id)
                case "job crashed" | "session crashed" | "delivery failed":
                    self._account.wrong.append(f"{line['message']}: {line}")

    # --- the account ---

    def _judge(self, studio: LocalStudio) -> None:
        account = self._account
        pictures: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for job_id, variant in self._variants.items():
            job = studio.job(job_id)
            if job.status is JobStatus.DONE:
                account.done += 1
                pictures[variant][hashlib.sha256(studio.result(job_id)).hexdigest()] += 1
                if job.completions != 1:
                    account.wrong.append(f"job {job_id} was completed {job.completions} times")
                if variant == "impossible":
                    account.wrong.append(f"job {job_id} cannot be done and was")
                continue
            reason = job.reason or ""
            if variant == "impossible":
                is_known = job.status is JobStatus.FAILED and "not an http(s) URL" in reason
            else:
                reason = " ".join(said.reason for said in job.rejections.values())
                is_known = job.status in {JobStatus.QUEUED, JobStatus.FAILED} and "crashed twice" in reason
            account.failed[re.sub(r"'[^']*'", "…", reason)] += 1
            if not is_known:
                account.wrong.append(f"job {job_id} ({variant}) is {job.status} for reason {reason!r}")
            if self._kept[job_id] and job_id not in self._refused:
                account.wrong.append(f"the picture of job {job_id} was made and is lost")
        for variant, found in pictures.items():
            if len(found) > 1:
                account.wrong.append(f"{variant}: pictures differ: {dict(found)}")
        account.made = sum(self._kept.values())
        account.made_twice = sum(count - 1 for count in self._kept.values() if count > 1)
        account.refused = len(self._refused)

    def _check_state(self) -> None:
        wrong = self._account.wrong
        for path in self._folder.joinpath("work").rglob("*"):
            if path.name.endswith((".tmp", ".part")) or path.suffix == ".data" or "unreadable" in path.parts:
                wrong.append(f"left over: {path.relative_to(self._folder)}")
            if path.suffix == ".json" and path.is_file():
                try:
                    json.loads(path.read_text())
                except ValueError:
                    wrong.append(f"damaged: {path.relative_to(self._folder)}")
        wrong += [f"left in the outbox: {note.name}" for note in self._notes()]
        if any((self._state / "spool").glob("job-in-hand*")):
            wrong.append("a job is still noted as in hand")
        command = [sys.executable, "-m", "studio_worker", "models", "verify", "--no-repair"]
        done = subprocess.run(
            [*command, "--config", str(self._config)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            wrong.append(f"models verify: {done.stdout} {done.stderr}")


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed process may be half a line
            yield json.loads(line)


def soak(
    folder: Path,
    *,
    seed: int,
    jobs: int,
    faults: int,
    stalls: int = 0,
    synthetic: bool = False,
    lanes: int = 1,
) -> Account:
    """Run one soak in ``folder``.

    Raises:
        ServiceProcessError: the service ended by itself, or nothing moves any more.
    """
    made = Soak(folder, seed=seed, jobs=jobs, faults=faults, stalls=stalls, synthetic=synthetic, lanes=lanes)
    return made.run()


def main() -> int:
    """Run soaks and print their accounts; exit status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--faults", type=int, default=110)
    parser.add_argument("--stalls", type=int, default=2)
    parser.add_argument("--synthetic", action="store_true", help="no torch")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for what the soaks leave")
    given = parser.parse_args()
    console = Console()
    are_right = True
    for seed in given.seed:
        with contextlib.ExitStack() as stack:
            if given.keep:
                folder = given.keep / f"seed-{seed}"
                folder.mkdir(parents=True)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            account = soak(
                folder, seed=seed, jobs=given.jobs, faults=given.faults, stalls=given.stalls,
                synthetic=given.synthetic, lanes=given.lanes,
            )  # fmt: skip
        console.print(_table(account))
        are_right = are_right and not account.wrong
    return 0 if are_right else 1


def _table(account: Account) -> Table:
    table = Table(title=f"seed {account.seed}, {account.seconds:.0f} s", show_header=False)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(account.faults.items()))
    failed = ", ".join(f"{count} {reason}" for reason, count in account.failed.items())
    for name, text in (
        ("jobs", f"{account.done} done once, {sum(account.failed.values())} failed: {failed}"),
        ("faults", f"{sum(account.faults.values())}: {faults}"),
        ("processes of the worker", str(account.processes)),
        (
            "pictures made",
            f"{account.made}, of which {account.made_twice} again; {account.refused} refused (409)",
        ),
        ("wrong", "\n".join(account.wrong) or "nothing: no picture lost, none made twice, no state damaged"),
    ):
        table.add_row(name, text)
    return table


if __name__ == "__main__":
    sys.exit(main())
