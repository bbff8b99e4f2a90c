"""The units under a systemd older than any that the packages are for: Debian 11's 247; Ubuntu 22.04 has 249.

The packages do not run there, its C library is too old: a stand-in says READY in the service's place.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.bases import SUITE
from tests.acceptance.box import UNIT
from tests.acceptance.conftest import ROOT
from tests.acceptance.machine import Machine

STAND_IN = """#!/bin/sh
[ "$1" = run ] || exit 0
systemd-notify --ready
exec sleep 600
"""

pytestmark = [
    pytest.mark.older_systemd,
    pytest.mark.skipif(SUITE != "bullseye", reason="make test-deb SUITE=bullseye:older_systemd"),
]


def test_units_start_where_some_of_their_lines_are_not_known(base: Path, work: Path) -> None:
    """A systemd that is too old for two lines warns of these, and the service is READY all the same."""
    with Machine([base], work / "older") as machine:
        for unit in (ROOT / "packaging").glob("*.service"):
            machine.copy_in(unit, "/etc/systemd/system")
        machine.shell(
            "useradd --system studio-worker; getent group render || groupadd --system render; "
            "mkdir /etc/studio-worker /etc/credstore; "
            "echo token >/etc/credstore/download-token.huggingface.co"
        )
        machine.write("/usr/bin/studio-worker", STAND_IN, 0o755)
        # systemd-notify is a process of its own.
        machine.write(f"/etc/systemd/system/{UNIT}.d/50-test.conf", "[Service]\nNotifyAccess=all\n")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", UNIT)
        assert machine.show(UNIT, "ActiveState") == "active"
        journal = machine.run("journalctl", "--output=cat", "--no-pager").stdout.splitlines()
        said = {line.partition(": ")[2] for line in journal if "studio-worker" in line and "ignoring" in line}
    assert said == {
        "Invalid syntax, ignoring: download-token.huggingface.co",
        "Unknown key name 'PrivateIPC' in section 'Service', ignoring.",
    }
