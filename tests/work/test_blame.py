"""Whose fault a failure is: every cause is played for real, and what the studio is told decides.

``retryable: false`` ends a job for every worker there is. Only what no worker can do may say so; this box's
own troubles go back to the queue, and what this worker lacks is left to others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import resource
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from PIL import Image

from studio_worker import sample_model
from studio_worker.appliance.abilities import Abilities
from studio_worker.appliance.news import News
from studio_worker.appliance.parts import LaneParts, Parts
from studio_worker.appliance.provisioning import SeenFiles
from studio_worker.box.device import Device
from studio_worker.config import Config
from studio_worker.config.current import Current
from studio_worker.config.settings import Settings
from studio_worker.engine import default_router
from studio_worker.report.activity import Activity
from studio_worker.report.logs import ShippingBuffer
from studio_worker.spool.failures import Failures
from studio_worker.spool.in_hand import JobInHand
from studio_worker.spool.outbox import Outbox
from studio_worker.store import Store
from studio_worker.store.terms import fixed
from studio_worker.studio.http.api import StudioApi
from studio_worker.studio.http.identity import Credentials
from studio_worker.studio.session.connection import Timings
from studio_worker.studio.session.connector import Connector
from studio_worker.studio.session.session import StudioSession
from studio_worker.transfer.policy import Policy
from studio_worker.work.desk import Hands
from studio_worker.work.inputs import input_fetcher
from studio_worker.work.ports import Ports
from studio_worker.work.worker import Worker
from tests.fakes.certificates import certificate
from tests.fakes.played import untouched_health
from tests.fakes.scripted import LIMIT_S, ScriptedStudio
from tests.fakes.servers import FileServer, raw_server, refused_url
from tests.lab.engine import changed_sample, write_header

PAGE = b"<!DOCTYPE html><html><title>Welcome to the hotel's network</title></html>"
PICTURE = io.BytesIO()
Image.new("RGB", (64, 64), "red").save(PICTURE, "PNG")

QUICK = Policy(connect_s=5, stall_s=5, delays_s=(), wait=lambda event, seconds: event.is_set())

Job = dict[str, Any]
"""The parts of a claim: ``task``, ``modelSource``; and ``policy`` for the box."""


class Scene:
    """Servers on loopback, and what a job needs of them."""

    def __init__(self, folder: Path, server: FileServer) -> None:
        self.folder = folder
        self.server = server
        self.ending = contextlib.ExitStack()

    def job(
        self,
        content: bytes | None = None,
        *,
        url: str | None = None,
        sha256: str | None = None,
        policy: dict[str, Any] | None = None,
        filename: str = "model.safetensors",
        files: list[dict[str, Any]] | None = None,
        engine: str = "sd-cpp",
        **task: Any,
    ) -> Job:
        """A job for the sample model, or for a model whose one file has this ``content`` or ``url``."""
        content = sample_model.WEIGHTS.read_bytes() if content is None else content
        url = url or self.server.serve("/model.safetensors", content).url
        file = {"role": "model", "url": url, "filename": filename}
        if sha256 != "":
            file["sha256"] = sha256 or hashlib.sha256(content).hexdigest()
        if policy is None and "http://127.0.0.1:" in str(task):  # inputs of this machine itself
            policy = {"allow_insecure": True}
        return {
            "task": {"kind": "image", "prompt": "a castle", "width": 64, "height": 64, "steps": 2, **task},
            "modelSource": {"engine": engine, "files": [file] if files is None else files},
            "policy": policy or {},
        }

    def input(self, content: bytes) -> str:
        return self.server.serve("/input.png", content).url

    def secure(
        self, not_before: str, not_after: str, *, is_trusted: bool = True
    ) -> tuple[str, dict[str, Any]]:
        """A model behind TLS with such a certificate, and the policy of a box that knows its authority."""
        made = certificate(self.folder, not_before, not_after)
        server = self.ending.enter_context(FileServer())
        server.use_tls(made.shown, made.key)
        url = server.serve("/model.safetensors", sample_model.WEIGHTS.read_bytes()).url
        return url, {"ca_bundle": made.authority} if is_trusted else {}


# --- this box's own troubles ---


def clock_without_battery(scene: Scene) -> Job:
    """To a clock that stands at 1970 every certificate is of the future, as this one is to ours."""
    url, policy = scene.secure("20990101000000Z", "21000101000000Z")
    return scene.job(url=url, policy=policy)


def certificate_that_ended(scene: Scene) -> Job:
    url, policy = scene.secure("20100101000000Z", "20110101000000Z")
    return scene.job(url=url, policy=policy)


def authority_that_is_not_known_here(scene: Scene) -> Job:
    url, policy = scene.secure("20200101000000Z", "20990101000000Z", is_trusted=False)
    return scene.job(url=url, policy=policy)


def page_in_a_models_place(scene: Scene) -> Job:
    return scene.job(url=scene.server.serve("/portal", PAGE).url)


def page_in_the_place_of_a_model_without_a_hash(scene: Scene) -> Job:
    return scene.job(PAGE, sha256="")


def redirect_to_a_captive_portal(scene: Scene) -> Job:
    file = scene.server.serve("/model.safetensors", b"", redirect="http://portal.example/login")
    return scene.job(url=file.url)


def page_in_a_pictures_place(scene: Scene) -> Job:
    return scene.job(initImageUrl=scene.input(PAGE))


def proxy_that_wants_a_password(scene: Scene) -> Job:
    proxy = raw_server(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
    return scene.job(
        url="https://models.example/model.safetensors", policy={"proxy": scene.ending.enter_context(proxy)}
    )


def proxy_that_wants_a_password_for_plain_http(scene: Scene) -> Job:
    job = proxy_that_wants_a_password(scene)
    job["modelSource"]["files"][0]["url"] = "http://models.example/model.safetensors"
    job["policy"]["allow_insecure"] = True
    return job


def host_that_is_down(scene: Scene) -> Job:
    return scene.job(url=refused_url())


def host_that_wants_a_token_which_this_box_lacks(scene: Scene) -> Job:
    file = scene.server.serve("/model.safetensors", b"", answers=[(401, {})] * 9)
    return scene.job(url=file.url)


def host_that_serves_other_countries(scene: Scene) -> Job:
    file = scene.server.serve("/model.safetensors", b"", answers=[(451, {})] * 9)
    return scene.job(url=file.url)


def name_with_a_private_address_here(scene: Scene) -> Job:
    """As the DNS of a company answers inside of it."""
    return scene.job(initImageUrl=scene.input(PICTURE.getvalue()).replace("127.0.0.1", "localhost"))


def disk_that_takes_no_more(scene: Scene) -> Job:
    """A limit of bytes that a file may have stands for it: the same system call fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    scene.ending.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    return scene.job()


def disk_that_cannot_be_written(scene: Scene) -> Job:
    (scene.folder / "models").mkdir()
    (scene.folder / "models" / ".staging").write_text(
        "in the way, as a disk that was mounted again read-only"
    )
    return scene.job()


def card_that_computes_nan(scene: Scene) -> Job:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.diffusion_model.out.2.bias"][0] = float("nan")

    return scene.job(changed_sample(scene.folder / "nan.safetensors", spoil).path.read_bytes())


def file_that_this_disk_has_changed(scene: Scene) -> Job:
    """Verified once, damaged since: size and time are what they were."""
    job = scene.job()
    path = scene.folder / "models" / sample_model.SHA256 / "model.safetensors"
    path.parent.mkdir(parents=True)
    shutil.copyfile(sample_model.WEIGHTS, path)
    Store(scene.folder / "models").adopt(
        f"{sample_model.SHA256}/model.safetensors", path, sample_model.SHA256, "https://x/y", ["m"]
    )
    before = path.stat()
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 7))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return job


BOX = [
    clock_without_battery,
    certificate_that_ended,
    authority_that_is_not_known_here,
    page_in_a_models_place,
    page_in_the_place_of_a_model_without_a_hash,
    redirect_to_a_captive_portal,
    page_in_a_pictures_place,
    proxy_that_wants_a_password,
    proxy_that_wants_a_password_for_plain_http,
    host_that_is_down,
    host_that_wants_a_token_which_this_box_lacks,
    host_that_serves_other_countries,
    name_with_a_private_address_here,
    disk_that_takes_no_more,
    disk_that_cannot_be_written,
    card_that_computes_nan,
    file_that_this_disk_has_changed,
]


# --- the job's own ---


def malformed_task(scene: Scene) -> Job:
    return scene.job(denoise="a lot")


def unsafe_file_name(scene: Scene) -> Job:
    return scene.job(filename="../../etc/passwd")


def forbidden_scheme_of_a_model(scene: Scene) -> Job:
    return scene.job(url="ftp://models.example/model.safetensors")


def plain_http_to_a_model(scene: Scene) -> Job:
    return scene.job(url="http://models.example/model.safetensors")


def picture_at_a_private_address(scene: Scene) -> Job:
    return scene.job(initImageUrl="https://10.0.0.7/input.png")


def file_of_another_hash(scene: Scene) -> Job:
    return scene.job(sha256="0" * 64)


def file_that_is_shorter_than_its_header_says(scene: Scene) -> Job:
    return scene.job(sample_model.WEIGHTS.read_bytes()[:100_000], sha256="")


def pointer_in_a_models_place(scene: Scene) -> Job:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
    return scene.job(url=scene.server.serve("/pointer", pointer).url)


def damaged_file_with_the_right_hash(scene: Scene) -> Job:
    return scene.job(sample_model.WEIGHTS.read_bytes()[:100_000])


def page_with_the_right_hash(scene: Scene) -> Job:
    return scene.job(PAGE)


def model_that_is_gone(scene: Scene) -> Job:
    return scene.job(url=scene.server.serve("/x", b"").url.replace("/x", "/gone"))


def too_many_steps(scene: Scene) -> Job:
    return scene.job(steps=9999)


def unknown_sampler(scene: Scene) -> Job:
    return scene.job(samplingMethod="guess")


def half_a_picture(scene: Scene) -> Job:
    return scene.job(initImageUrl=scene.input(PICTURE.getvalue()[:100]))


def drawing_in_a_pictures_place(scene: Scene) -> Job:
    return scene.job(initImageUrl=scene.input(b"<svg xmlns='http://www.w3.org/2000/svg'/>"))


def mask_without_a_picture(scene: Scene) -> Job:
    return scene.job(maskUrl=scene.input(PICTURE.getvalue()))


def two_models_in_one_source(scene: Scene) -> Job:
    job = scene.job()
    (file,) = job["modelSource"]["files"]
    job["modelSource"]["files"] = [file, {**file, "filename": "again.safetensors"}]
    return job


JOB = [
    malformed_task,
    unsafe_file_name,
    forbidden_scheme_of_a_model,
    plain_http_to_a_model,
    picture_at_a_private_address,
    file_of_another_hash,
    file_that_is_shorter_than_its_header_says,
    pointer_in_a_models_place,
    damaged_file_with_the_right_hash,
    page_with_the_right_hash,
    model_that_is_gone,
    too_many_steps,
    unknown_sampler,
    half_a_picture,
    drawing_in_a_pictures_place,
    mask_without_a_picture,
    two_models_in_one_source,
]


# --- what this worker lacks ---


def kind_of_job_that_is_not_served(scene: Scene) -> Job:
    return {**scene.job(), "task": {"kind": "llm", "messages": []}}


def engine_that_is_not_here(scene: Scene) -> Job:
    return scene.job(engine="parakeet")


def family_that_is_not_served(scene: Scene, *, ranges: bool = True) -> Job:
    path = write_header(
        scene.folder / "wan.safetensors", {"head.modulation": (1, 2), "patch_embedding.weight": (4, 4)}
    )
    return scene.job(
        url=scene.server.serve("/wan.safetensors", path.read_bytes(), ranges=ranges).url, sha256=""
    )


def pickled_model(scene: Scene, *, ranges: bool = True) -> Job:
    url = scene.server.serve("/model.ckpt", b"\x80\x04\x95pickle" * 9, ranges=ranges).url
    return scene.job(url=url, sha256="", filename="model.ckpt")


KNOWN_LACKS = [
    kind_of_job_that_is_not_served,
    engine_that_is_not_here,
    family_that_is_not_served,
    pickled_model,
]


def family_that_only_the_whole_file_tells(scene: Scene) -> Job:
    """Its server knows no ranges, so that its header comes with all the rest."""
    return family_that_is_not_served(scene, ranges=False)


def pickled_model_that_only_the_whole_file_tells(scene: Scene) -> Job:
    return pickled_model(scene, ranges=False)


def kind_of_job_that_the_family_has_not(scene: Scene) -> Job:
    return scene.job(refImageUrl=scene.input(PICTURE.getvalue()))


LATE_LACKS = [
    family_that_only_the_whole_file_tells,
    pickled_model_that_only_the_whole_file_tells,
    kind_of_job_that_the_family_has_not,
]


# --- one box, from the studio's frames to the engine ---


class Box:
    """Session, worker, store and engines as in the service, on the folder ``folder``."""

    def __init__(self, folder: Path, studio: ScriptedStudio, policy: Policy) -> None:
        api = StudioApi(studio.url)
        store, outbox = Store(folder / "models", fixed(policy)), Outbox(folder / "outbox")
        in_hand, failures = JobInHand(folder / "spool"), Failures(folder / "spool")
        lane = LaneParts.made(1, Hands(), in_hand, outbox)
        desk, engines, health = lane.desk, default_router("cpu"), untouched_health()
        settings = Settings.model_validate({"models": {"allow_insecure_urls": policy.allow_insecure}})
        parts = Parts(Device("cpu", "cpu", 24.0), engines, store, in_hand, failures, outbox, (lane,))
        abilities = Abilities(parts, lane, Current(Config(settings, ()), policy), health)
        self._session = StudioSession(abilities, desk, lane.uploads, failures, News().lane(1))
        self._connector = Connector(api, abilities, self._session, ShippingBuffer(), Timings(heartbeat_s=0.1))
        fetch = input_fetcher(policy, api.root)
        ports = Ports(
            source=desk,
            claims=self._session,
            files=SeenFiles(store, on_status=lambda text: None, on_end=lambda: None),
            engines=engines,
            in_hand=in_hand,
            results=lane.outbox,
            reports=Activity().lane(1),
            health=health,
            fetch=fetch,
        )
        self._worker = Worker([ports], lambda: 300.0)
        self._desk = desk
        self._threads = [
            threading.Thread(target=self._connector.run, args=(Credentials("w1", "token"),), daemon=True),
            threading.Thread(target=self._worker.run, daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._desk.close()
        self._connector.stop()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with FileServer() as server:
        made = Scene(tmp_path, server)
        with made.ending:
            yield made


def answers(scene: Scene, cause: Callable[[Scene], Job], *, offers: int = 1) -> list[tuple[Any, ...]]:
    """What the studio reads of the job, offered again and again: a failure, or a rejection with its code."""
    job = cause(scene)
    policy = dataclasses.replace(QUICK, **job.pop("policy"))
    told: list[tuple[Any, ...]] = []
    with ScriptedStudio() as studio, Box(scene.folder, studio, policy):
        conversation = studio.accept()
        conversation.welcome()
        for number in range(offers):
            claim = {"jobId": f"j{number}", "model": "m", **job}
            conversation.send(type="offer", claim=claim)
            while len(told) == number:
                frame = conversation.receive()
                match frame["type"]:
                    case "heartbeat":
                        conversation.send(type="heartbeatAck")
                    case "fail":
                        told.append(("fail", frame["retryable"], frame["error"]))
                    case "reject" if (
                        "has a job in hand" in frame["reason"]
                    ):  # the one before, which has failed
                        conversation.send(type="offer", claim=claim)
                    case "reject":
                        told.append(("reject", frame.get("code"), frame["reason"]))
    return told


def names(cause: Callable[[Scene], Job]) -> str:
    return cause.__name__.replace("_", " ")


@pytest.mark.parametrize("cause", BOX, ids=names)
def test_this_boxs_trouble_leaves_the_job_to_others(scene: Scene, cause: Callable[[Scene], Job]) -> None:
    """What another worker does not meet, or this one not another time, goes back to the queue."""
    ((frame, retryable, error),) = answers(scene, cause)
    assert (frame, retryable) == ("fail", True), error


@pytest.mark.parametrize("cause", JOB, ids=names)
def test_what_no_worker_can_do_is_failed_for_good(scene: Scene, cause: Callable[[Scene], Job]) -> None:
    """What is wrong with the job itself ends it, so that it is not tried by one worker after the other."""
    ((frame, retryable, error),) = answers(scene, cause)
    assert (frame, retryable) == ("fail", False), error


@pytest.mark.parametrize("cause", KNOWN_LACKS, ids=names)
def test_what_this_worker_lacks_is_rejected(scene: Scene, cause: Callable[[Scene], Job]) -> None:
    """A job that another kind of worker may do is given back before it is begun."""
    ((frame, code, _),) = answers(scene, cause)
    assert (frame, code) == ("reject", None)


@pytest.mark.parametrize("cause", LATE_LACKS, ids=names)
def test_what_turns_out_to_be_lacking_is_rejected_from_then_on(
    scene: Scene, cause: Callable[[Scene], Job]
) -> None:
    """What only a model's whole file tells costs one try; later jobs with that source are given back."""
    first, second = answers(scene, cause, offers=2)
    assert first[:2] == ("fail", True), first
    assert second[:2] == ("reject", None), second
    assert second[2] == first[2]


def test_file_that_this_disk_changed_is_fetched_again(scene: Scene) -> None:
    """A model's file that went bad on this disk is found by its hash, and the next job has it whole."""
    job = file_that_this_disk_has_changed(scene)
    assert answers(scene, lambda _: dict(job))[0][:2] == ("fail", True)
    assert not (scene.folder / "models" / sample_model.SHA256 / "model.safetensors").exists()


def test_family_that_is_lacking_is_known_after_a_restart(scene: Scene) -> None:
    """Where the files are here a new process knows at the offer what the last one found out too late."""
    job = family_that_only_the_whole_file_tells(scene)
    ((frame, retryable, error),) = answers(scene, lambda _: dict(job))
    assert (frame, retryable) == ("fail", True)
    ((frame, code, reason),) = answers(scene, lambda _: dict(job))
    assert (frame, code, reason) == ("reject", None, error)
