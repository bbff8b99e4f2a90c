"""The distribution under the package is upgraded, as an operator does it, and the appliance goes on."""

from __future__ import annotations

import time

import pytest

from tests.acceptance import figures
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.box import LONG, STATE, UNIT, Box

NEXT = "trixie"
APT = (
    "apt-get -y -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold "
    "-o Dpkg::Options::=--force-unsafe-io"  # the machine is thrown away
)

pytestmark = pytest.mark.skipif(SUITE != BUILT_ON, reason=f"from {BUILT_ON} to {NEXT}")


def fetch_next(box: Box) -> None:
    """The sources of the next Debian, and its packages; nothing is changed yet."""
    box.machine.shell(f"sed -i 's/{SUITE}/{NEXT}/' /etc/apt/sources.list && apt-get update")
    box.machine.shell(f"{APT} full-upgrade --download-only")


def upgrade_to_next(box: Box) -> str:
    """What Debian's release notes tell to type; returns what apt has said."""
    said = box.machine.shell(f"{APT} full-upgrade 2>&1", limit_s=800.0)
    return said + box.machine.shell(f"{APT} --purge autoremove 2>&1", limit_s=300.0)


@pytest.mark.dist_upgrade
@pytest.mark.timeout(1800)  # packages come over the network
def test_dist_upgrade_in_a_job_loses_nothing(box: Box) -> None:
    """From Debian 12 to 13 under a service at work: nothing of ours is removed, the job in hand is done once,
    the next ones too, before the reboot and after it, by the same worker; the old python3 may go.
    """
    machine = box.machine
    machine.shell(f"apt-get update && {APT} install --no-install-recommends python3")
    box.configure(require_sample=True)
    machine.run("systemctl", "enable", "--now", UNIT)
    worker_id = box.await_online()
    identity = machine.path(f"{STATE}/identity.json").read_text()
    packages = machine.shell("dpkg-query -W 'studio-worker*'")
    began = time.monotonic()
    fetch_next(box)
    figures.note(f"packages of {NEXT} fetched", f"{time.monotonic() - began:.0f} s")
    job_id = box.queue_picture({**LONG, "steps": 60})
    box.await_in_engine(job_id)
    began = time.monotonic()
    said = upgrade_to_next(box)
    figures.note(f"dist-upgrade {SUITE} to {NEXT}, a job in hand", f"{time.monotonic() - began:.0f} s")
    assert machine.path("/etc/debian_version").read_text().startswith("13.")
    assert "Removing python3.11" in said
    assert machine.shell("dpkg-query -W 'studio-worker*'") == packages
    assert machine.run("dpkg", "--audit").stdout == ""
    box.await_job(job_id, "done", limit_s=900.0)  # apt has had the cores
    job = box.studio.job(job_id)
    assert (job.completions, job.attempts) == (1, 1)
    for reboots in (False, True):
        if reboots:
            machine.reboot()
            machine.await_that("active", lambda: box.show("ActiveState") == "active", 120.0)
            assert "systemd 257" in machine.run("systemctl", "--version").stdout
        assert box.await_online() == worker_id
        after = box.queue_picture()
        box.await_job(after, "done")
        assert box.studio.job(after).attempts == 1
    assert machine.path(f"{STATE}/identity.json").read_text() == identity
    assert len(box.studio.workers()) == 1


def test_service_holds_the_systems_libraries_before_its_first_job(box: Box) -> None:
    """A service that has made no picture yet has all of the system's libraries that it will need: files of
    another release in their place do not matter to it.
    """

    def held() -> set[str]:
        lines = box.machine.shell(f"grep -o '/[^ ]*[.]so.*' /proc/{box.pid}/maps").splitlines()
        return {line for line in lines if not line.startswith("/usr/lib/studio-worker/")}

    box.configure(require_sample=True)
    box.start()
    before = held()
    job_id = box.queue_picture()
    box.await_job(job_id, "done")
    assert held() - before == set()
