"""A fresh installation: what is there, what is not yet done, what the service may and may not do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import studio_worker
from tests.acceptance import figures
from tests.acceptance.box import SITE, STATE, UNIT, Box
from tests.acceptance.conftest import ROOT
from tests.acceptance.machine import Machine

EXPOSURE_AT_MOST = 1.6
SITE_PACKAGES = "/usr/lib/studio-worker/lib/python3.11/site-packages"

SUITE = (
    "config/test_loading.py",
    "engine/families/test_identify.py",
    "engine/test_diffusion.py",
    "engine/test_parameters.py",
    "spool/test_in_hand.py",
    "store/test_bundles.py",
    "studio/http/test_api.py",
    "studio/http/test_courier.py",
    "studio/http/test_registration.py",
    "studio/session/test_offers.py",
    "studio/session/test_protocol.py",
    "studio/session/test_session.py",
    "studio/test_wire.py",
    "test_formats.py",
    "test_sample_model.py",
    "work/test_worker.py",
)
"""Tests of what an installed copy can get wrong: its libraries' versions, torch, the files it carries."""


@pytest.mark.short
def test_fresh_install_is_neither_enabled_nor_started(box: Box) -> None:
    """apt installs without network, starts nothing, and says in three steps what to do."""
    machine = box.machine
    assert machine.run("systemctl", "is-enabled", UNIT, check=False).stdout.strip() == "disabled"
    assert box.show("ActiveState") == "inactive"
    log = machine.path("/root/install.log").read_text()
    assert "systemctl enable --now studio-worker" in log
    assert "/etc/studio-worker/conf.d/50-site.toml" in log
    assert machine.run("systemctl", "is-system-running").stdout.strip() == "running"
    groups = machine.run("id", "-Gn", "studio-worker").stdout.split()
    assert {"studio-worker", "video", "render"} <= set(groups)
    version = machine.run("studio-worker", "version").stdout.strip()
    assert version == f"studio-worker {studio_worker.__version__}"


@pytest.mark.short
def test_three_steps_lead_to_a_running_service(box: Box) -> None:
    """Site file, check-config as root, enable --now: nothing else, and no file of root's is in the way."""
    machine = box.machine
    machine.path(SITE).unlink()
    refused = machine.run("systemctl", "start", UNIT, check=False)
    assert refused.returncode != 0  # no GPU here, and none is made up
    assert 'device = "cpu"' in box.log_lines()[-1]["error"]
    machine.run("systemctl", "stop", UNIT)
    machine.shell(f"rm -rf {STATE} /var/cache/studio-worker; systemctl reset-failed {UNIT} || true")
    box.configure()
    assert "configuration is valid" in machine.run("studio-worker", "check-config").stdout
    machine.run("systemctl", "enable", "--now", UNIT)
    assert box.show("ActiveState") == "active"
    owner = machine.run("stat", "-c", "%U %a", STATE, f"{STATE}/identity.json").stdout.split("\n")
    assert owner[0] == "studio-worker 700"
    assert owner[1] == "studio-worker 600"


@pytest.mark.short
def test_units_are_valid(box: Box) -> None:
    """systemd has nothing to say about the units."""
    units = [UNIT, "studio-worker@0.service", "studio-worker-devices.service"]
    done = box.machine.run("systemd-analyze", "verify", "--man=no", *units, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.short
@pytest.mark.parametrize("unit", [UNIT, "studio-worker@0.service"])
def test_exposure_is_small(box: Box, unit: str) -> None:
    """systemd's own judgement of the sandbox is 1.6 or better, whichever systemd it is."""
    box.machine.run(
        "systemctl", "start", "--no-block", "studio-worker@0.service"
    )  # it knows loaded units only
    text = box.machine.run("systemd-analyze", "security", unit, "--no-pager", check=False).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", text)
    assert found, text
    figures.note(f"exposure of {unit}", found[1], "1.6 or better")
    assert float(found[1]) <= EXPOSURE_AT_MOST, text


@pytest.mark.short
def test_sandbox_lets_in_what_cuda_needs_and_keeps_out_the_rest(box: Box) -> None:
    """The GPU's devices open, a disk does not; nothing is written but the service's own folders."""
    machine = box.machine
    machine.shell(
        "mknod -m 666 /dev/probe-gpu c 195 0; mknod -m 666 /dev/probe-gpu-control c 195 255;"
        "mknod -m 666 /dev/probe-disk b 8 0; mknod -m 666 /dev/probe-loop b 7 0;"
        "mknod -m 666 /dev/probe-memory c 1 1; mknod -m 666 /dev/probe-input c 13 64"
    )
    machine.copy_in(Path(__file__).with_name("probe.py"), "/opt")
    box.drop_in(
        "[Service]", "Type=oneshot", "Restart=no", "ExecStart=",
        f"ExecStart=/usr/lib/studio-worker/bin/python3 /opt/probe.py {STATE}/findings.json",
    )  # fmt: skip
    box.start()
    found = json.loads(machine.path(f"{STATE}/findings.json").read_text())
    allowed = {name for name, outcome in found.items() if outcome == "ok" and name.startswith("write ")}
    own = {"/var/lib/studio-worker", "/var/cache/studio-worker", "/run/studio-worker"}
    private = {"/tmp", "/var/tmp", "/dev/shm"}  # of its own, or only memory
    assert allowed == {f"write {folder}" for folder in own | private}
    # ENXIO is the kernel's answer where a device may be opened and has no driver: this host has no GPU.
    gpu = {found["open /dev/probe-gpu"], found["open /dev/probe-gpu-control"]}
    assert gpu <= {"ENXIO", "ok", "EIO", "ENODEV"}, found
    for device in ("disk", "loop", "memory", "input"):
        assert found[f"open /dev/probe-{device}"] == "EPERM"
    assert [found[f"socket {name}"] for name in ("AF_INET", "AF_INET6", "AF_UNIX")] == ["ok", "ok", "ok"]
    assert "ok" not in (found["socket AF_NETLINK"], found["socket AF_PACKET"])
    for forbidden in (
        "mknod",
        "unshare user namespace",
        "chroot",
        "setuid 0",
        "run a setuid program's privileges",
    ):
        assert found[forbidden] != "ok", forbidden
    # What CUDA and oneDNN cannot do without.
    assert found["memory that is written and run"] == "ok"
    assert found["read /proc/meminfo"] == "ok"


def test_token_for_downloads_reaches_the_service_alone(box: Box) -> None:
    """A token in root's credential store is the service's credential, and no file that others can read."""
    box.machine.write("/etc/credstore/download-token.huggingface.co", "hf_secret_of_the_test", 0o600)
    box.start()
    unit_folder = box.machine.path(f"/run/credentials/{UNIT}/download-token.huggingface.co")
    assert unit_folder.read_text() == "hf_secret_of_the_test"
    refused = box.machine.run(
        "cat", f"/run/credentials/{UNIT}/download-token.huggingface.co", check=False, user="nobody"
    )
    assert "Permission denied" in refused.stderr
    assert "hf_secret_of_the_test" not in box.machine.run("journalctl", "--no-pager").stdout


def test_network_can_be_limited_to_a_studio_of_ones_own(box: Box) -> None:
    """The example drop-in for a studio on the own network: it works there, and reaches nothing else."""
    example = box.machine.path("/usr/share/doc/studio-worker/examples/own-studio.conf").read_text()
    box.drop_in(*example.replace("192.0.2.10", "127.0.0.1").splitlines())
    box.start()
    job_id = box.queue_synthetic()
    box.await_job(job_id, "done")


def test_two_instances_work_side_by_side(box: Box) -> None:
    """One instance a GPU: two workers at the studio, one copy of the models, an identity each."""
    box.configure(require_sample=True)
    for number in (0, 1):
        unit = f"studio-worker@{number}.service"
        assert f"CUDA_VISIBLE_DEVICES={number}" in box.machine.show(unit, "Environment")
        box.drop_in("[Service]", "Environment=STUDIO_WORKER_WORKER__DEVICE=cpu", unit=unit)  # no GPU here
    box.machine.run("systemctl", "start", "studio-worker@0.service", "studio-worker@1.service", limit_s=120)
    box.studio.wait_for(lambda: sum(box.studio.is_online(w.worker_id) for w in box.studio.workers()) == 2, 60)
    jobs = [box.queue_picture() for _ in range(4)]
    for job_id in jobs:
        box.await_job(job_id, "done")
    assert len(list(box.machine.path(f"{STATE}/models").rglob("*.safetensors"))) == 1
    for number in (0, 1):
        assert box.machine.path(f"{STATE}/instance-{number}/identity.json").exists()
        told = box.machine.run("studio-worker", "status", "--instance", str(number)).stdout
        assert "ready, connected" in told
        seen = box.machine.run("studio-worker", "doctor", "--instance", str(number), check=False).stdout
        assert "service: ready, connected" in seen  # whatever it says of the GPU that is not here
    unsaid = box.machine.run("studio-worker", "status", check=False)
    assert (unsaid.returncode, "--instance N, of 0, 1" in unsaid.stderr) == (3, True)


def test_suite_passes_against_the_installed_copy(base: Path, installed: Path, work: Path) -> None:
    """The project's tests pass with the packages' interpreter, libraries and files, and no source beside."""
    with Machine([installed, base], work / "suite") as machine:
        tests = ROOT / "tests"
        helpers = [path for path in tests.glob("*.py") if not path.name.startswith("test_")]
        for path in (
            *(tests / name for name in SUITE),
            *helpers,
            tests / "data",
            tests / "fakes",
            tests / "lab",
        ):
            machine.copy_in(path, f"/opt/suite/{path.parent.relative_to(ROOT)}")
        machine.copy_in(ROOT / "packaging", "/opt/suite")
        _copy_test_libraries(machine)
        machine.shell("useradd --create-home tester && chown -R tester /opt/suite")
        script = (
            "cd /opt/suite && PYTHONPATH=/opt/suite:/opt/libraries "
            "/usr/lib/studio-worker/bin/python3 -B -m pytest "
            f"-q -p no:cacheprovider --timeout=300 --rootdir=/opt/suite -o pythonpath= -c /dev/null "
            "--import-mode=importlib "
            f"{' '.join(f'tests/{name}' for name in SUITE)}"
        )
        where = machine.shell(
            "/usr/lib/studio-worker/bin/python3 -c 'import studio_worker; print(studio_worker.__file__)'"
        )
        assert where.startswith(SITE_PACKAGES)
        done = machine.run("sh", "-c", script, check=False, user="tester", limit_s=850)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    figures.note("suite against the installed copy", done.stdout.strip().splitlines()[-1].strip("= "))


def _copy_test_libraries(machine: Machine) -> None:
    """pytest and what the tests need beside the package, as this environment has them."""
    folder = Path(pytest.__file__).parents[1]
    patterns = (
        "_pytest", "pytest", "py.py", "pytest-*", "pytest_timeout*", "pluggy", "iniconfig", "hypothesis",
        "hypothesis-*", "_hypothesis*", "sortedcontainers",
    )  # fmt: skip
    for pattern in patterns:
        for path in folder.glob(pattern):
            machine.copy_in(path, "/opt/libraries")
