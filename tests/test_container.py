"""The container image's files, as far as they can be judged without building it: what they share with unit
and service, and that the Kubernetes example is one. tests/acceptance/test_container.py runs the image.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from studio_worker import service
from studio_worker.config.settings import Settings

ROOT = Path(__file__).parents[1]
CONTAINER = ROOT / "packaging" / "container"
CONTAINERFILE = (CONTAINER / "Containerfile").read_text()


def objects() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all((CONTAINER / "kubernetes.yaml").read_text())
    return {f"{each['kind']} {each['metadata']['name']}": each for each in found}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = objects()["StatefulSet studio-worker"]["spec"]["template"]["spec"]
    return spec


def worker() -> dict[str, Any]:
    (container,) = pod()["containers"]
    return dict(container)


def test_image_sets_what_the_unit_sets() -> None:
    """The service finds in a container the environment that systemd gives it."""
    unit = (ROOT / "packaging" / "studio-worker.service").read_text()
    wanted = {word for line in re.findall(r"^Environment=(.*)$", unit, re.MULTILINE) for word in line.split()}
    text = CONTAINERFILE.replace("\\\n", " ")
    given = {word for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for word in line.split()}
    assert wanted
    assert wanted <= given


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("name", sorted(objects()))
def test_kubernetes_example_is_valid(name: str, version: str) -> None:
    """Every object of the example is one that Kubernetes takes, with no key that it does not know."""
    kubernetes_validate.validate(objects()[name], version, strict=True)


def test_kubernetes_waits_as_long_as_a_stop_may_take() -> None:
    """The job in hand is finished, or handed back, before Kubernetes kills."""
    stop_s = Settings().worker.stop_timeout_s + service._AFTER_LIMIT_S
    assert pod()["terminationGracePeriodSeconds"] >= stop_s


def test_kubernetes_gives_the_images_user_its_volumes() -> None:
    """The example's user is the image's, all of whose folders that are written to are volumes."""
    user = re.search(r"^USER (\d+):(\d+)$", CONTAINERFILE, re.MULTILINE)
    assert user is not None
    rights = pod()["securityContext"]
    assert (rights["runAsUser"], rights["runAsGroup"], rights["fsGroup"]) == (
        int(user[1]),
        int(user[2]),
        int(user[2]),
    )
    assert worker()["securityContext"]["readOnlyRootFilesystem"]
    volumes = re.search(r"^VOLUME \[(.*)\]$", CONTAINERFILE, re.MULTILINE)
    assert volumes is not None
    mounted = {each["mountPath"] for each in worker()["volumeMounts"]}
    assert {*re.findall(r'"([^"]+)"', volumes[1]), "/tmp", str(Settings().models.root)} <= mounted


def test_kubernetes_restarts_no_worker_that_still_fetches_its_models() -> None:
    """What Kubernetes restarts by is --alive; --ready only says when jobs may come."""
    asked = {
        name: worker()[name]["exec"]["command"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    alive = ["studio-worker", "status", "--alive"]
    ready = ["studio-worker", "status", "--ready"]
    assert asked == {"startupProbe": alive, "livenessProbe": alive, "readinessProbe": ready}


def install(
    folder: Path, version: str, torch: str, *files: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run what the Containerfile runs, with these packages, and commands that only note their calls."""
    (folder / "packages").mkdir()
    for name in files:
        (folder / "packages" / name).touch()
    commands, calls = folder / "bin", folder / "calls"
    commands.mkdir()
    calls.touch()
    (commands / "ls").symlink_to(shutil.which("ls") or "/bin/ls")
    for name in ("groupadd", "useradd", "apt-get", "install", "rm", "dpkg-query"):
        command = commands / name
        command.write_text(f'#!/bin/sh\necho "{name} $*" >>"{calls}"\n')
        command.chmod(0o755)
    with (commands / "dpkg-query").open("a") as query:
        query.write(f"echo {version}\n")
    done = subprocess.run(
        ["/bin/sh", CONTAINER / "install", folder / "packages", torch, version],
        env={"PATH": str(commands)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, calls.read_text()


WORKER, TORCH = "studio-worker_0.5.0_amd64.deb", "studio-worker-torch-cpu_2.0_amd64.deb"


@pytest.mark.parametrize(
    ("version", "torch", "said"),
    [
        pytest.param("", "cpu", "say which studio-worker, by --build-arg VERSION=...", id="none"),
        pytest.param("0.5", "cpu", "no studio-worker 0.5 and no keyring in build/packages", id="mistyped"),
        pytest.param(
            "0.5.0",
            "cuda",
            "no studio-worker-torch-cuda in build/packages, which TORCH asks for",
            id="no-torch",
        ),
    ],
)
def test_image_without_its_packages_says_what_is_there(
    tmp_path: Path, version: str, torch: str, said: str
) -> None:
    """A VERSION or TORCH that build/packages has not ends the build with what it has, and nothing is done."""
    done, calls = install(tmp_path, version, torch, WORKER, TORCH)
    assert done.returncode == 1
    assert done.stderr.split() == f"{said}; there is: {TORCH} {WORKER}".split()
    assert calls == ""


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        pytest.param((WORKER, TORCH), "{packages}/" + WORKER + " {packages}/" + TORCH, id="files"),
        pytest.param(
            ("studio-worker-archive-keyring.deb",),
            "studio-worker=0.5.0 studio-worker-torch-cpu",
            id="repository",
        ),
    ],
)
def test_image_takes_its_packages_from_files_or_repository(
    tmp_path: Path, files: tuple[str, ...], wanted: str
) -> None:
    """Where the packages' files lie they are installed; where the keyring lies alone, its repository's."""
    done, calls = install(tmp_path, "0.5.0", "cpu", *files)
    assert done.returncode == 0, done.stderr
    last = [line for line in calls.splitlines() if line.startswith("apt-get -q install")][-1]
    assert last.endswith(" tini " + wanted.format(packages=tmp_path / "packages"))
