"""Many boxes: the Ansible role, cloud-init's example, and a disk that is copied to a second machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from studio_worker.demo import sample_source
from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS
from tests.acceptance import figures
from tests.acceptance import machine as machine_module
from tests.acceptance.archive import KEYRING, Archive, KeyRing
from tests.acceptance.bases import CACHE
from tests.acceptance.box import SITE, STATE, UNIT, Box
from tests.acceptance.conftest import Debs
from tests.acceptance.machine import Machine

ROOT = Path(__file__).parents[2]
FLEET = ROOT / "packaging" / "ansible"
EXAMPLE = ROOT / "packaging" / "cloud-init" / "user-data.yaml"
MODEL = "sample.json"


heavy = pytest.mark.skipif("FLEET" not in os.environ, reason="minutes: make test-fleet")


@pytest.fixture(scope="session")
def ansible() -> Path:
    """Ansible and its linter, as the role's requirements name them: a folder for PYTHONPATH, made once."""
    wanted = FLEET / "requirements.txt"
    folder = CACHE / f"ansible-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}"
    if not folder.is_dir():
        part = folder.with_suffix(f".part{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={part}"]
        subprocess.run([*command, f"--requirement={wanted}"], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return folder


@pytest.fixture
def archive(work: Path, tmp_path: Path, debs: Debs) -> Iterator[Archive]:
    """A signed repository with the packages in its suite ``stable``."""
    folder = work / f"archive-{tmp_path.name}"
    folder.mkdir()
    with KeyRing() as keys, Archive(folder, keys) as archive:
        archive.publish(debs.worker, debs.torch, suite="stable")
        yield archive


@pytest.fixture(scope="session")
def cloud_image(base: Path, work: Path) -> Path:
    """A layer with what images of clouds have beyond the bare system: Python and cloud-init."""
    with Machine([base], work / "cloud-image", keep=True) as machine:
        install = "apt-get install -qq -y --no-install-recommends"
        machine.shell(f"apt-get -qq update && {install} cloud-init python3 python3-apt")
        # The machine has the network of its host, which is not to be set up.
        machine.write(
            "/etc/cloud/cloud.cfg.d/99-test.cfg", "datasource_list: [NoCloud]\nnetwork: {config: disabled}\n"
        )
        machine.power_off()
    return machine.changes


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    with LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio:
        yield studio


def only_ours(machine: Machine) -> None:
    """Debian's own archive is out of reach, so that apt is quick."""
    machine.shell("rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")


class Control:
    """The operator's side of Ansible, in the machine itself: over the local connection."""

    def __init__(self, machine: Machine, ansible: Path) -> None:
        self.machine = machine
        self.output = ""
        shutil.copytree(ansible, machine.path("/root/ansible"), symlinks=True)
        shutil.copytree(FLEET, machine.path("/root/fleet"))
        machine.write("/root/fleet/inventory/hosts.yml", "studio_workers: {hosts: {localhost: }}\n")
        shutil.rmtree(machine.path("/root/fleet/inventory/group_vars"))

    def play(self, variables: dict[str, Any], *options: str, check: bool = True) -> dict[str, int]:
        """One run of the example's playbook; returns its recap."""
        self.machine.write("/root/variables.json", json.dumps(variables))
        command = ["env", "--chdir=/root/fleet", "PYTHONPATH=/root/ansible", "ANSIBLE_PIPELINING=1"]
        command += ["python3", "-m", "ansible", "playbook", "site.yml", "--connection=local"]
        command += ["--extra-vars=@/root/variables.json", *options]
        done = self.machine.run(*command, check=False)
        self.output = done.stdout + done.stderr
        assert done.returncode == 0 or not check, self.output
        (recap,) = re.findall(r"^localhost +: (.*)$", done.stdout, re.MULTILINE)
        return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", recap)}


def test_role_is_in_order(ansible: Path) -> None:
    """ansible-lint finds nothing to say, by its strictest profile."""
    environment = {**os.environ, "PYTHONPATH": str(ansible), "PATH": f"{ansible}/bin:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "ansiblelint", "--offline", "--strict", "--profile=production", "."]
    done = subprocess.run(command, cwd=FLEET, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failure(s), 0 warning(s)" in done.stdout + done.stderr


@heavy
def test_role_makes_and_keeps_a_box(
    base: Path,
    cloud_image: Path,
    work: Path,
    tmp_path: Path,
    archive: Archive,
    studio: LocalStudio,
    ansible: Path,
    debs: Debs,
) -> None:
    """A bare machine is a worker after one run, and the next changes nothing. What check-config refuses never
    goes live, a live value is taken over without a restart, another one with it; no secret is shown. What is
    withdrawn goes: secrets from the disk, a service from the boot; an empty key is refused here.
    """
    with Machine([cloud_image, base], work / tmp_path.name) as machine:
        box, control = Box(machine, studio), Control(machine, ansible)
        only_ours(machine)
        key = machine.path("/root/archive.gpg")
        archive.keys.gpg("--output", str(tmp_path / "key"), "--export", archive.keys.key)
        shutil.copyfile(tmp_path / "key", key)
        source = sample_source(studio).model_dump(by_alias=True, exclude_none=True, mode="json")
        site = f'[studio]\napi_base_url = "{studio.base_url}"\n[worker]\ndevice = "cpu"\n'
        wanted: dict[str, Any] = {
            "studio_worker_repository": archive.address,
            "studio_worker_archive_key": "/root/archive.gpg",
            "studio_worker_version": debs.worker.name.split("_")[1],
            "studio_worker_torch": "studio-worker-torch-cpu",
            "studio_worker_conf_d": {"50-site.toml": site},
            "studio_worker_models_d": {MODEL: {"id": "sample", **source}},
        }
        assert control.play(wanted)["changed"] > 5
        box.await_message("service ready", limit_s=120)
        worker_id = box.await_online()
        assert control.play(wanted)["changed"] == 0, control.output

        def with_site(text: str) -> dict[str, Any]:
            return wanted | {"studio_worker_conf_d": {"50-site.toml": site + text}}

        pid, live = box.pid, machine.path(SITE).read_text()
        assert control.play(with_site("stop_timeout_s = -1\n"), check=False)["failed"] == 1
        assert re.search(r"50-site.toml:5: worker.stop_timeout_s: -1", control.output)
        assert machine.path(SITE).read_text() == live

        changed = with_site("stop_timeout_s = 77\n[models]\nbudget_gb = 50\n")
        assert control.play(changed, "--check")["changed"] > 0
        assert machine.path(SITE).read_text() == live
        control.play(changed)
        assert "configuration reloaded" in box.messages()
        assert box.pid == pid
        control.play(with_site("preload = true\n"))
        machine.await_that("the service was restarted", lambda: box.pid not in {0, pid})
        box.await_message("service ready", limit_s=120)

        identity = json.loads(machine.path(f"{STATE}/identity.json").read_text())
        token = identity["auth_token"]
        machine.path(f"{STATE}/identity.json").unlink()
        given = {"worker_id": worker_id, "auth_token": token}
        secrets: dict[str, Any] = {
            "studio_worker_credentials": {"studio-worker": given},
            "studio_worker_download_tokens": {"a.example.org": "first", "b.example.org": "second"},
        }
        control.play(wanted | secrets, "-vvv", "--diff")
        assert token not in control.output
        machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")
        assert box.await_online() == worker_id
        assert not machine.path(f"{STATE}/identity.json").exists()
        box.await_job(box.queue_picture(), "done")

        store = machine.path("/etc/studio-worker-credentials")
        control.play(wanted | {"studio_worker_download_tokens": {"a.example.org": "first"}})
        assert [each.name for each in store.rglob("*.*")] == ["download-token.a.example.org"]
        control.play(wanted | {"studio_worker_instances": [0]})
        assert [box.show(name) for name in ("ActiveState", "UnitFileState")] == ["inactive", "disabled"]
        assert machine.show("studio-worker@0", "UnitFileState") == "enabled"
        assert not list(store.iterdir())
        (tmp_path / "key").write_bytes(b"")
        shutil.copyfile(tmp_path / "key", key)
        assert control.play(wanted, check=False)["failed"] == 1
        assert "gpg --list-keys" in control.output
        assert machine.path("/etc/apt/keyrings/studio-worker.gpg").stat().st_size > 0
    figures.note("a bare machine made a worker, and changed, by the Ansible role", "yes")


@heavy
def test_cloud_init_makes_a_worker_at_the_first_boot(
    base: Path,
    cloud_image: Path,
    work: Path,
    tmp_path: Path,
    archive: Archive,
    studio: LocalStudio,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example is valid by cloud-init's schema, and a machine that boots with it is a worker."""
    monkeypatch.setattr(machine_module, "BOOT_S", 600.0)  # packages are installed in it
    key = archive.keys.gpg("--armor", "--export", archive.keys.key)
    data = yaml.safe_load(EXAMPLE.read_text())
    files = {each["path"]: each for each in data["write_files"]}
    files["/etc/apt/keyrings/studio-worker.asc"]["content"] = key
    sources = files["/etc/apt/sources.list.d/studio-worker.sources"]
    sources["content"] = sources["content"].replace("https://apt.example.org/studio-worker", archive.address)
    site = files[SITE]
    site["content"] = site["content"].replace("https://studio.example.org", studio.base_url)
    site["content"] += '[worker]\ndevice = "cpu"\n'
    data["packages"] = [name.replace("-cuda", "-cpu") for name in data["packages"]]
    with Machine([cloud_image, base], work / tmp_path.name) as machine:
        box = Box(machine, studio)
        machine.write("/root/user-data.yaml", EXAMPLE.read_text())
        assert "Valid" in machine.run("cloud-init", "schema", "-c", "/root/user-data.yaml").stdout
        only_ours(machine)
        machine.write("/var/lib/cloud/seed/nocloud/user-data", "#cloud-config\n" + yaml.safe_dump(data))
        machine.write("/var/lib/cloud/seed/nocloud/meta-data", "instance-id: box-01\n")
        machine.reboot()
        machine.await_that("the packages are there", machine.path("/usr/bin/studio-worker").exists, 300)
        box.await_message("service ready", limit_s=300)
        box.await_online()
        assert machine.show(UNIT, "UnitFileState") == "enabled"
        machine.await_that(
            "the key is the keyring package's",
            lambda: not machine.path("/etc/apt/keyrings/studio-worker.asc").exists(),
        )
        assert f"/{KEYRING}.gpg" in machine.path("/etc/apt/sources.list.d/studio-worker.sources").read_text()
        machine.shell("apt-get update --error-on=any")


def test_copy_of_a_machine_is_a_worker_of_its_own(
    base: Path, installed: Path, work: Path, tmp_path: Path, studio: LocalStudio
) -> None:
    """A registered machine reboots as the same worker; a copy of its disk, with an id of its own, is a second
    one and says so; adopted, it is the first.
    """
    with Machine([installed, base], work / f"{tmp_path.name}-original", keep=True) as original:
        box = Box(original, studio)
        box.configure()
        box.start()
        first = box.await_online()
        made = json.loads(original.path(f"{STATE}/identity.json").read_text())["machine"]
        asked = ["systemd-id128", "machine-id", "--app-specific=4896581c7b77469b855aa81b5dd8c12f"]
        assert original.run(*asked).stdout.strip() == made
        original.run("systemctl", "enable", UNIT)
        original.reboot()
        box.await_message("registration approved")
        studio.wait_for(lambda: studio.is_online(first), 120)
        assert [worker.worker_id for worker in studio.workers()] == [first]
        original.power_off()
    (original.changes / "etc/machine-id").write_text("")
    with Machine([original.changes, installed, base], work / tmp_path.name) as copy:
        box = Box(copy, studio)
        studio.wait_for(lambda: len(studio.workers()) == 2, 120)
        second = studio.workers()[1].worker_id
        studio.wait_for(lambda: studio.is_online(second), 60)
        assert not studio.is_online(first)
        box.await_message("studio-worker register --adopt")
        told = copy.run("studio-worker", "register").stdout
        assert told.startswith(f"approved as worker {second}\n")
        assert f"approved as worker {first}" in told
        box.stop()
        copy.run("studio-worker", "register", "--adopt")
        box.start()
        studio.wait_for(lambda: studio.is_online(first), 60)
        assert len(studio.workers()) == 2
