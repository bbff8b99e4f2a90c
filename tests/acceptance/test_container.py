"""The container image as an operator runs it: without systemd, configured by environment and mounts alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Picture

from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS, prompt
from tests.acceptance import figures
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.box import JOB_S, SOME
from tests.acceptance.conftest import Debs
from tests.acceptance.container import Container, Image, built_image
from tests.fakes.driver import build_driver
from tests.fakes.servers import FileServer

pytestmark = pytest.mark.skipif(SUITE != BUILT_ON, reason=f"of one base image: checked with {BUILT_ON}")

STATE = "/var/lib/studio-worker"
MODELS_D = "/etc/studio-worker/models.d"
SECRETS = "/run/secrets/studio-worker"


@pytest.fixture(scope="session")
def image(debs: Debs) -> Image:
    """The image of the packages that were built."""
    began = time.monotonic()
    version = debs.worker.name.split("_")[1]
    image = built_image(debs.worker, debs.torch, version=version)
    figures.note("container image built or found", f"{time.monotonic() - began:.0f} s")
    return image


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[LocalStudio]:
    """A studio on loopback, which the containers of this module share with the host."""
    with LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio:
        yield studio


@pytest.fixture
def volume(work: Path, tmp_path: Path) -> Path:
    """A fresh volume for the state folder, as an engine makes it from the image's."""
    return fresh(work / f"{tmp_path.name}-volume")


def fresh(folder: Path, user: int = 10001, group: int = 10001, mode: int = 0o700) -> Path:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    os.chown(folder, user, group)
    return folder


def settings(studio: LocalStudio) -> dict[str, str]:
    """All that a container is told of its site."""
    return {
        "STUDIO_WORKER_STUDIO__API_BASE_URL": studio.base_url,
        "STUDIO_WORKER_WORKER__DEVICE": "cpu",
    }


def as_kubernetes_mounts(folder: Path, group: int, **files: str) -> Path:
    """A ConfigMap or Secret as the kubelet lays it out: names are links through ``..data``, for the group."""
    data = folder / "..2026_11_27"
    data.mkdir(parents=True)
    (folder / "..data").symlink_to(data.name)
    for name, content in files.items():
        (data / name).write_text(content)
        (data / name).chmod(0o440)
        os.chown(data / name, 0, group)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def queue_picture(studio: LocalStudio, **task: Any) -> str:
    task = {"kind": "image", "prompt": prompt("red", "gem", "sky"), "ext": "png", "seed": 7} | task
    return studio.queue_job(model=MODEL_ID, task=task, model_source=sample_source(studio))


def await_job(container: Container, studio: LocalStudio, job_id: str, status: str) -> None:
    container.await_that(f"the job is {status}", lambda: studio.job(job_id).status == status, JOB_S)


def await_ready(container: Container) -> None:
    container.await_that("READY", lambda: "service ready" in [line["message"] for line in container.log()])


def probe(container: Container, asked: str) -> tuple[int, str]:
    """Exit status and line of ``studio-worker status ASKED``."""
    done = container.exec("studio-worker", "status", asked)
    return done.returncode, done.stdout


def test_image_is_for_an_ordinary_user_and_holds_no_more_than_it_needs(image: Image, debs: Debs) -> None:
    """The image runs as a user known by number, keeps state and caches in volumes of his, names its version,
    and has neither systemd, nor apt's lists, nor the packages in it.
    """
    config = image.config
    assert config["User"] == "10001:10001"
    assert set(config["Volumes"]) == {STATE, "/var/cache/studio-worker"}
    for volume in config["Volumes"]:
        found = (image.root / volume.lstrip("/")).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (10001, 10001, 0o700)
    assert config["Labels"]["org.opencontainers.image.version"] == debs.worker.name.split("_")[1]
    assert config["Healthcheck"]["Test"] == ["CMD", "studio-worker", "status", "--alive"]
    assert "NVIDIA_VISIBLE_DEVICES=void" in config["Env"]  # torch's CPU build
    assert not (image.root / "usr/lib/systemd/systemd").exists()
    assert not list((image.root / "var/lib/apt/lists").glob("*_Packages*"))
    assert not list(image.root.glob("mnt/*/*"))
    size = subprocess.run(
        ["du", "-sm", image.root], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    figures.note("container image with torch's CPU build, unpacked", f"{size} MB")


def test_container_goes_from_download_to_picture_by_environment_alone(
    image: Image, work: Path, volume: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """Read-only but for /tmp and one volume, without capabilities: alive while it downloads, ready
    afterwards; a picture comes, orphans are taken in, and every line it says is JSON.
    """
    with FileServer() as server:
        held = server.serve("/held.safetensors", b"held" * 100_000, hold_after=200_000)
        file = {"role": "model", "url": held.url, "filename": "held.safetensors", "sha256": held.sha256}
        entry = json.dumps({"id": "held", "engine": "sd-cpp", "files": [file]})
        required = as_kubernetes_mounts(tmp_path / "models.d", 10001, **{"held.json": entry})
        volumes = {STATE: volume, MODELS_D: required}
        with Container(image, work / tmp_path.name, settings(studio), volumes) as container:
            container.await_that("a download", lambda: "downloading" in probe(container, "--alive")[1])
            assert probe(container, "--alive")[0] == 0
            status, said = probe(container, "--ready")
            assert (status, said.partition(" held: ")[0]) == (1, "provisioning: downloading")
            held.release()
            await_ready(container)
            assert probe(container, "--ready")[0] == 0
            job_id = queue_picture(studio)
            await_job(container, studio, job_id, "done")
            container.exec("sh", "-c", "sleep 0.1 & exit 0")
            container.await_that("no orphan is left", lambda: len(container.processes()) == 1)
            lines = container.log()
    with Picture.open(io.BytesIO(studio.result(job_id))) as picture:
        assert len(picture.convert("RGB").getcolors(64 * 64) or ()) > 16
    assert {"timestamp", "level", "message"} <= lines[0].keys()


def test_stopped_container_delivers_its_job_and_is_the_same_worker_afterwards(
    image: Image, work: Path, volume: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """SIGTERM in a job: no longer ready, but alive, until the picture is delivered; exit status 0. The next
    container with the volume is the same worker, though Kubernetes has opened all files to the group; and so
    is one that is given id and token as a Secret.
    """
    with Container(image, work / tmp_path.name, settings(studio), {STATE: volume}) as container:
        await_ready(container)
        job_id = queue_picture(studio, **SOME)
        await_job(container, studio, job_id, "running")
        container.stop()
        container.await_that("it drains", lambda: probe(container, "--ready")[1].startswith("draining: "))
        assert probe(container, "--ready")[0] == 1
        assert probe(container, "--alive")[0] == 0
        assert container.wait(JOB_S) == 0
    assert studio.job(job_id).status == "done"
    (worker,) = studio.workers()
    subprocess.run(["chmod", "-R", "g+rwX", volume], check=True)
    identity = json.loads((volume / "identity.json").read_text())
    secret = as_kubernetes_mounts(
        tmp_path / "secret",
        10001,
        **{
            "studio-worker.worker-id": identity["worker_id"],
            "studio-worker.auth-token": identity["auth_token"],
        },
    )
    elsewhere = fresh(work / f"{tmp_path.name}-elsewhere")
    told = {"CREDENTIALS_DIRECTORY": SECRETS}
    for environment, volumes in (({}, {STATE: volume}), (told, {STATE: elsewhere, SECRETS: secret})):
        with Container(image, work / tmp_path.name, settings(studio) | environment, volumes) as container:
            container.await_that("a session", lambda: studio.is_online(worker.worker_id))
            container.stop()
            assert container.wait() == 0
    assert [each.worker_id for each in studio.workers()] == [worker.worker_id]


def test_container_of_another_user_needs_but_a_volume_that_he_may_write_to(
    image: Image, work: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """On a cluster that gives each project a user of its own, without a name in the image, pictures come all
    the same; with a volume of somebody else's the container ends with 78, and says how it is given away.
    """
    shared = fresh(work / f"{tmp_path.name}-shared", 0, 0, 0o2770)
    with Container(
        image, work / tmp_path.name, settings(studio), {STATE: shared}, "1000650000:0"
    ) as container:
        await_ready(container)
        await_job(container, studio, queue_picture(studio), "done")
        assert probe(container, "--ready")[0] == 0
    closed = fresh(work / f"{tmp_path.name}-closed", 4711, 4711)
    with Container(image, work / tmp_path.name, settings(studio), {STATE: closed}) as container:
        assert container.wait() == 78
        (line,) = container.log()
    assert "mount a volume at /var/lib/studio-worker that user 10001 may write to (" in line["error"]


def test_container_that_is_stopped_at_once_ends_at_once(
    image: Image, work: Path, volume: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A stop before the service has come to its first line is not lost, as it would be if it were process 1
    itself: the engine would wait for minutes, and kill.
    """
    with Container(image, work / tmp_path.name, settings(studio), {STATE: volume}) as container:
        container.await_that(
            "its program is there", lambda: "studio-worker" in " ".join(container.processes())
        )
        container.stop()
        assert container.wait(20.0) in {0, 143}


@pytest.mark.parametrize("linker", [{}, {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}])
def test_driver_is_found_where_kubernetes_engine_of_google_mounts_it(
    image: Image, work: Path, volume: Path, tmp_path: Path, linker: dict[str, str]
) -> None:
    """The host's driver in /usr/local/nvidia/lib64 is found, whether or not the linker is told of it."""
    driver = build_driver(tmp_path / "lib64", "580.95.05")
    volumes = {STATE: volume, "/usr/local/nvidia/lib64": driver}
    environment = {"STUDIO_WORKER_WORKER__DEVICE": "cuda", "FAKE_COUNT": "1", **linker}
    command = ["doctor", "--json"]
    with Container(image, work / tmp_path.name, environment, volumes, command=command) as container:
        container.wait()
        findings = {each["check"]: each for each in json.loads(container.output())["findings"]}
    assert "580.95.05" in findings["driver"]["text"]
