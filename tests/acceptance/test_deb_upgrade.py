"""Upgrade, downgrade, remove and purge, as apt does them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance import figures
from tests.acceptance.box import SOME, STATE, UNIT, Box
from tests.acceptance.conftest import Debs
from tests.acceptance.packages import repack

NEXT = "0.6.0"


@pytest.fixture(scope="module")
def next_deb(debs: Debs, work: Path) -> Iterator[Path]:
    """The next version of the worker, made of this one."""
    deb = repack(debs.worker, NEXT, work)
    yield deb
    deb.unlink()


def apt(box: Box, *arguments: str) -> str:
    done = box.machine.run("apt-get", "-y", "-o", "Dpkg::Use-Pty=0", *arguments, limit_s=300)
    return done.stdout + done.stderr


def install(box: Box, deb: Path, *options: str) -> str:
    box.machine.copy_in(deb, "/root/debs")
    return apt(box, "install", *options, f"/root/debs/{deb.name}")


@pytest.mark.short
def test_upgrade_in_a_job_loses_nothing(box: Box, next_deb: Path) -> None:
    """apt waits for the job in hand, replaces the files while nothing runs, and starts what ran before."""
    box.configure(require_sample=True)
    box.start()
    worker_id = box.await_online()
    job_id = box.queue_picture(SOME)
    box.await_in_engine(job_id)
    behind = [box.queue_picture() for _ in range(2)]
    old = box.pid
    text = install(box, next_deb)
    assert "the job in hand is finished before the upgrade goes on" in text
    job = box.studio.job(job_id)
    assert (job.status, job.completions, job.attempts) == ("done", 1, 1)
    box.machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")
    assert box.pid != old
    assert NEXT in box.machine.run("studio-worker", "version").stdout
    assert box.await_online() == worker_id
    for each in behind:
        box.await_job(each, "done")
        assert box.studio.job(each).attempts == 1


def test_upgrade_does_not_fetch_torch_again(box: Box, next_deb: Path) -> None:
    """A new worker takes the torch that is there: apt's plan has one package."""
    box.machine.copy_in(next_deb, "/root/debs")
    plan = apt(box, "install", "--simulate", f"/root/debs/{next_deb.name}")
    assert [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")] == ["studio-worker"]


def test_upgrade_leaves_a_stopped_service_stopped(box: Box, next_deb: Path) -> None:
    """What did not run before an upgrade does not run after it."""
    install(box, next_deb)
    assert box.show("ActiveState") == "inactive"
    assert box.machine.run("systemctl", "is-enabled", UNIT, check=False).stdout.strip() == "disabled"


def test_upgrade_restarts_the_instances_that_ran(box: Box, next_deb: Path) -> None:
    """Instances are stopped and started like the single service, those that ran and no others."""
    box.drop_in("[Service]", "Environment=STUDIO_WORKER_WORKER__DEVICE=cpu", unit="studio-worker@1.service")
    box.machine.run("systemctl", "start", "studio-worker@1.service")
    install(box, next_deb)
    box.machine.await_that(
        "back", lambda: box.machine.show("studio-worker@1.service", "ActiveState") == "active"
    )
    assert box.show("ActiveState") == "inactive"
    assert box.machine.show("studio-worker@0.service", "ActiveState") == "inactive"


def test_upgrade_waits_for_a_stop_that_is_under_way(box: Box, debs: Debs) -> None:
    """A service that somebody has just stopped finishes its job on the old files, and stays stopped."""
    box.start()
    job_id = box.queue_picture(SOME)
    box.await_in_engine(job_id)
    box.machine.run("systemctl", "stop", "--no-block", UNIT)
    text = install(box, debs.torch, "--reinstall")
    assert "the job in hand is finished before the upgrade goes on" in text
    assert box.studio.job(job_id).status == "done"
    assert box.show("ActiveState") == "inactive"


def test_torch_upgrade_in_a_job_loses_nothing(box: Box, debs: Debs) -> None:
    """The same holds where torch's package is replaced (here by itself) under a running service."""
    box.start()
    job_id = box.queue_picture(SOME)
    box.await_in_engine(job_id)
    text = install(box, debs.torch, "--reinstall")
    assert "the job in hand is finished before the upgrade goes on" in text
    assert box.studio.job(job_id).status == "done"
    box.machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")
    after = box.queue_picture()
    box.await_job(after, "done")


def test_configuration_edits_survive_an_upgrade_and_a_downgrade(box: Box, debs: Debs, next_deb: Path) -> None:
    """Site files and even an edited config.toml are kept, without a question, in both directions."""
    config = box.machine.path("/etc/studio-worker/config.toml")
    config.write_text(config.read_text() + "# edited on this box\n")
    box.configure(log={"level": "debug"})
    box.start()
    box.await_online()
    identity = box.machine.path(f"{STATE}/identity.json").read_text()
    install(box, next_deb)
    install(box, debs.worker, "--allow-downgrades")
    assert config.read_text().endswith("# edited on this box\n")
    box.machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")
    assert box.machine.path(f"{STATE}/identity.json").read_text() == identity
    job_id = box.queue_synthetic()
    box.await_job(job_id, "done")


@pytest.mark.short
def test_remove_keeps_models_and_identity_and_purge_leaves_nothing(box: Box, debs: Debs) -> None:
    """After remove and install the box is the worker it was; purge asks nothing and leaves nothing."""
    box.configure(require_sample=True)
    box.machine.run("systemctl", "enable", "--now", UNIT)
    worker_id = box.await_online()
    apt(box, "remove", "studio-worker")
    assert box.show("ActiveState") in {"inactive", ""}
    assert list(box.machine.path(f"{STATE}/models").rglob("*.safetensors"))
    assert box.machine.path(f"{STATE}/identity.json").exists()
    install(box, debs.worker)
    box.start()
    assert box.await_online() == worker_id
    assert len(box.studio.workers()) == 1
    box.drop_in("[Service]", "Environment=A=b")
    apt(box, "purge", "studio-worker", "studio-worker-torch-cpu")
    left = box.machine.shell(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /var/log/journal -o -path /root \\) -prune -o "
        "\\( -iname '*studio-worker*' -o -iname '*studio_worker*' -o -nouser -o -nogroup \\) -print"
    ).split()
    assert [path for path in left if not path.startswith("/var/lib/systemd/")] == []
    assert "studio-worker" not in box.machine.path("/etc/passwd").read_text()
    assert box.machine.run("systemctl", "is-system-running").stdout.strip() == "running"
    figures.note("left behind by purge", "nothing")
