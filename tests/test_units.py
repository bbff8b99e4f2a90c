"""What the units ask of systemd, beside the oldest that the packages are for: Ubuntu 22.04's 249."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGING = Path(__file__).parents[1] / "packaging"
OLDEST = 249

SINCE = {
    187: "KillMode NoNewPrivileges SystemCallFilter",
    188: "TimeoutStartSec TimeoutStopSec",
    189: "RestartPreventExitStatus",
    201: "After Description Documentation WantedBy Wants",
    208: "DeviceAllow DevicePolicy",
    209: "SystemCallArchitectures SystemCallErrorNumber",
    211: "CacheDirectory ConfigurationDirectory RestrictAddressFamilies RuntimeDirectory StateDirectory",
    214: "ProtectHome ProtectSystem",
    229: "AmbientCapabilities StartLimitBurst StartLimitIntervalSec",
    231: "MemoryDenyWriteExecute RestrictRealtime",
    232: "ProtectControlGroups ProtectKernelModules ProtectKernelTunables RemoveIPC",
    233: "RestrictNamespaces",
    234: "CacheDirectoryMode StateDirectoryMode",
    235: "IPAddressAllow IPAddressDeny KeyringMode LockPersonality",
    242: "ProtectHostname RestrictSUIDSGID",
    243: "OOMPolicy TimeoutAbortSec",
    244: "ConditionPathExists ProtectKernelLogs",
    245: "ProtectClock",
    247: "LoadCredential ProtectProc",
    248: "PrivateIPC",
}
"""Directives by the version that the manual of systemd 257 says they were added in: systemd.unit(5),
systemd.service(5), systemd.exec(5), systemd.kill(5), systemd.resource-control(5). A newer directive is a
warning in the journal, and what it would have done is missing.
"""
OLDER = """
    CapabilityBoundingSet Environment ExecReload ExecStart Group LimitCORE LimitNOFILE NotifyAccess
    PrivateNetwork PrivateTmp Restart RestartSec SupplementaryGroups Type UMask User WatchdogSec
"""
"""Directives without a note there: they were there before the manual wrote any."""

NEWER_VALUES = {
    r"LoadCredential=[^:]+": 252,  # without a path: from /etc/credstore
    r"Type=notify-reload": 253,
    r"(Cache|State|Runtime|Logs)Directory=.*:.*": 251,  # a link to it
    r".*%[dD].*": 250,  # folders of credentials and of shared data
    r"PrivateTmp=disconnected": 257,
    r"ProtectControlGroups=(private|strict)": 257,
}
"""Values of older directives by the version that brought them (systemd's NEWS). These can do more than be
missing: what is not known may be taken for another.
"""
DEGRADES = {
    "LoadCredential=download-token.huggingface.co": (
        "before 252 the line is ignored with a warning ('Invalid syntax, ignoring' on 247, tried there); "
        "the start goes on and no token is sent; the comment above it says what to write there"
    ),
}

UNITS = sorted(
    path.relative_to(PACKAGING).as_posix()
    for path in PACKAGING.rglob("*")
    if path.suffix in {".service", ".conf", ".timer", ".socket", ".path"}
    and re.search(r"^\[(Unit|Service)\]$", path.read_text(), re.MULTILINE)
)


def settings(unit: str) -> list[tuple[str, str]]:
    return re.findall(r"^([A-Z]\w+)=(.*)$", (PACKAGING / unit).read_text(), re.MULTILINE)


def test_all_units_are_looked_at() -> None:
    """What a package installs for systemd to read, and the drop-in among the examples, is in the list."""
    assert {"studio-worker.service", "studio-worker@.service", "studio-worker-devices.service"} < set(UNITS)
    assert "examples/own-studio.conf" in UNITS


@pytest.mark.parametrize("unit", UNITS)
def test_oldest_systemd_knows_every_directive(unit: str) -> None:
    """On Ubuntu 22.04 no line of a unit is a directive that its systemd has never heard of."""
    since = {name: version for version, names in SINCE.items() for name in names.split()}
    since |= dict.fromkeys(OLDER.split(), 0)
    asked = {name for name, _ in settings(unit)}
    assert asked - since.keys() == set(), "look up since when systemd knows it"
    assert {name: since[name] for name in asked if since[name] > OLDEST} == {}


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_newer_than_the_oldest_systemd_degrades(unit: str) -> None:
    """A value that Ubuntu 22.04's systemd does not know is one of which it is known that the service starts
    all the same.
    """
    for name, value in settings(unit):
        line = f"{name}={value}"
        brought = max((v for form, v in NEWER_VALUES.items() if re.fullmatch(form, line)), default=0)
        assert brought <= OLDEST or line in DEGRADES, f"{line}: since systemd {brought}"
