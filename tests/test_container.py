"""The container image's files, as far as they can be judged without building it: what they share with unit
and service, and that the Kubernetes example is one. tests/acceptance/test_container.py runs the image.
"""

from __future__ import annotations

import re
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
