"""Judging an offer before it is answered."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.appliance.news import News
from studio_worker.errors import NotServed
from studio_worker.jobs import ImageTask
from studio_worker.models import ModelSource
from studio_worker.studio.session.offers import (
    AlreadyOurs,
    Ignore,
    Impossible,
    Judgement,
    Need,
    OnItsWay,
    Refuse,
    Situation,
    Take,
    judge,
)
from studio_worker.work.breaker import Refusal
from tests.lab.frames import CLAIM, SOURCE, claim
from tests.lab.session import IDLE


def test_job_that_the_device_cannot_hold_is_left_to_another_worker() -> None:
    """Where the files are here to tell that a picture needs more memory than there is, it is rejected at
    once, whatever the studio's estimate says; where they are not, the studio's estimate counts.
    """
    situation = replace(IDLE, memory_gb=8.0, needed_gb=lambda source, task: 9.3)
    judgement = judge(claim(vramGbEstimate=1.0), situation)
    assert isinstance(judgement, Refuse)
    assert judgement.reason == "the job needs 9.3 GB of memory and 8.0 GB are free here"
    assert judgement.code is None
    for needed in (7.9, None):
        told = replace(situation, needed_gb=lambda source, task, n=needed: n)
        assert isinstance(judge(CLAIM, told), Take)


def test_headers_are_asked_for_last_and_decide_as_whole_files_do() -> None:
    """What the headers of files tell that are not here is compared as what whole files tell; nobody is asked
    for them where the offer is refused anyway.
    """
    situation = replace(IDLE, memory_gb=8.0, previewed=lambda source, task: Need(9.3, 0))
    judgement = judge(CLAIM, situation)
    assert isinstance(judgement, Refuse)
    assert judgement.reason == "the job needs 9.3 GB of memory and 8.0 GB are free here"
    short = judge(CLAIM, replace(IDLE, previewed=lambda source, task: Need(None, 3_000_000_000)))
    assert isinstance(short, Refuse)
    assert "3.0 GB too little room" in short.reason
    assert isinstance(judge(CLAIM, replace(IDLE, previewed=lambda source, task: Need(7.9, 0))), Take)

    def asked(source: ModelSource, task: ImageTask) -> NoReturn:
        pytest.fail("the files' servers were asked")

    for other in (
        replace(IDLE, is_paused=True),
        replace(IDLE, threshold_gib=1.0),
        replace(IDLE, memory_gb=8.0, needed_gb=lambda source, task: 9.3),
        replace(IDLE, on_demand=False, is_on_box=lambda files: False),
        replace(IDLE, shortfall_bytes=lambda files: 1),
    ):
        assert isinstance(judge(CLAIM, replace(other, previewed=asked)), Refuse)


def test_pause_that_comes_while_headers_are_asked_for_holds() -> None:
    """A look at headers takes seconds: an operator who has paused the worker meanwhile gets no job."""
    judgement = judge(CLAIM, replace(IDLE, is_paused_by_now=lambda: True))
    assert judgement == Refuse("j1", "the worker takes no jobs at present", "paused", is_routine=True)


def test_offer_that_can_be_done_is_taken_with_the_wires_defaults() -> None:
    """A plain offer becomes a job; what the task leaves out has the protocol's defaults."""
    judgement = judge(CLAIM, IDLE)
    assert isinstance(judgement, Take)
    job = judgement.job
    assert (job.job_id, job.model, job.taken_at) == ("j1", "m", 12.5)
    assert (job.task.prompt, job.task.denoise, job.task.ext) == ("a castle", 0.75, "webp")
    assert job.task.width is None
    assert job.source.files[0].filename == "m.safetensors"


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        (
            replace(IDLE, is_paused=True),
            Refuse("j1", "the worker takes no jobs at present", "paused", is_routine=True),
        ),
        (
            replace(IDLE, current_job_id="other"),
            Refuse("j1", "the worker has a job in hand", "busy", is_routine=True),
        ),
        (replace(IDLE, current_job_id="j1"), AlreadyOurs("j1")),
        (replace(IDLE, is_in_outbox=lambda job_id: True), AlreadyOurs("j1")),
        (replace(IDLE, is_in_outbox=lambda job_id: True, is_paused=True), AlreadyOurs("j1")),
        (replace(IDLE, current_job_id="j1", is_paused=True), AlreadyOurs("j1")),
        (replace(IDLE, is_uploading=lambda job_id: True, is_in_outbox=lambda job_id: True), OnItsWay("j1")),
        (
            replace(IDLE, is_just_delivered=lambda job_id: True),
            Refuse("j1", "the job's result was delivered a moment ago", "busy", is_routine=True),
        ),
        (replace(IDLE, state_problem=lambda: "3 pictures wait"), Refuse("j1", "3 pictures wait", "busy")),
        (
            replace(IDLE, failed_for_good=lambda job_id: "no such sampler"),
            Impossible("j1", "no such sampler"),
        ),
        (
            replace(IDLE, is_poisoned=lambda job_id: True),
            Refuse("j1", "the worker crashed twice while it worked on this job"),
        ),
    ],
)
def test_offer_is_answered_by_the_workers_own_state(situation: Situation, expected: Judgement) -> None:
    """Busy, paused, poisoned and already-ours offers get the protocol's answers."""
    assert judge(CLAIM, situation) == expected


@pytest.mark.parametrize(
    ("changes", "situation", "reason"),
    [
        ({"task": None}, IDLE, "no task"),
        ({"modelSource": None}, IDLE, "no modelSource"),
        ({"task": {"kind": "video", "prompt": "x"}}, IDLE, "kind 'video'"),
        ({"task": {"kind": "llm", "messages": []}}, IDLE, "kind 'llm'"),
        ({"task": {"kind": "audio_stt", "inputUrl": "x"}}, IDLE, "kind 'audio_stt'"),
        ({"task": {"kind": "audio_tts", "text": "x"}}, IDLE, "kind 'audio_tts'"),
        ({"task": {"kind": "k" * 5000}}, IDLE, "kind 'kkk"),
        ({"modelSource": {**SOURCE, "engine": "onnx"}}, IDLE, "unknown engine 'onnx'"),
        ({"vramGbEstimate": 9.0}, IDLE, "needs 9 GiB and this worker takes up to 8 GiB"),
        ({}, replace(IDLE, shortfall_bytes=lambda files: 3_200_000_000), "3.2 GB too little"),
        ({}, replace(IDLE, on_demand=False, is_on_box=lambda files: False), "not on this box"),
    ],
)
def test_offer_that_another_worker_could_do_is_refused_without_code(
    changes: dict[str, Any], situation: Situation, reason: str
) -> None:
    """What only this box cannot do goes back to the studio with its reason, for another worker."""
    judgement = judge(claim(**changes), situation)
    assert isinstance(judgement, Refuse)
    assert judgement.code is None
    assert reason in judgement.reason


def _not_served(source: ModelSource, task: ImageTask) -> float:
    raise NotServed("flux.gguf is of a family that is not served")


def _broken(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error")


def test_offer_of_what_is_not_served_is_left_to_another_worker() -> None:
    """Where the files are here and are of no family that is served, the refusal says so."""
    refused = judge(CLAIM, replace(IDLE, needed_gb=_not_served))
    assert refused == Refuse("j1", "flux.gguf is of a family that is not served")


@pytest.mark.parametrize(
    "asked",
    ["is_in_outbox", "is_poisoned", "failed_for_good", "state_problem", "needed_gb", "is_on_box",
     "shortfall_bytes"],
)  # fmt: skip
def test_offer_is_not_taken_by_guess(asked: str) -> None:
    """Where the disk cannot be asked, nothing is judged: neither taken nor failed."""
    situation = replace(IDLE, on_demand=False, **{asked: _broken})
    with pytest.raises(OSError, match="Input/output"):
        judge(CLAIM, situation)


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        ({"is_paused": True, "current_job_id": "other"}, "paused"),
        ({"is_just_delivered": lambda job_id: True, "is_in_outbox": lambda job_id: True}, "delivered"),
        ({"is_poisoned": lambda job_id: True, "failed_for_good": lambda job_id: "no"}, "crashed"),
    ],
)
def test_offer_is_refused_for_what_comes_first(situation: dict[str, Any], expected: str) -> None:
    """Of two reasons the one is told that another worker, or a later hour, is the cure for."""
    judgement = judge(CLAIM, replace(IDLE, **situation))
    assert isinstance(judgement, Refuse)
    assert expected in f"{judgement.reason} {judgement.code}"


def test_offer_at_the_very_limits_is_taken() -> None:
    """What needs just what there is, has as long a name as may be, or asks for what is allowed, is taken."""
    roomy = replace(IDLE, memory_gb=8.0, needed_gb=lambda source, task: 8.0, allow_insecure_urls=True)
    plain = {**SOURCE, "files": [{**SOURCE["files"][0], "url": "http://models.example/m"}]}  # type: ignore[dict-item]
    offered = claim(jobId="j" * 200, vramGbEstimate=8.0, modelSource=plain)
    assert isinstance(judge(offered, roomy), Take)


@pytest.mark.parametrize(("is_for_now", "code"), [(True, "busy"), (False, None)])
def test_offer_of_what_failed_here_is_refused(is_for_now: bool, code: str | None) -> None:
    """Jobs that are held back come again; what this box cannot serve is left to another worker."""
    held = replace(IDLE, held_back=lambda model, source, task: Refusal(f"{model} failed", is_for_now))
    assert judge(CLAIM, held) == Refuse("j1", "m failed", code, is_routine=is_for_now)
    assert isinstance(judge(claim(task={"kind": "image"}), held), Impossible)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"task": {"kind": "image"}}, "prompt"),
        ({"task": {"kind": "image", "prompt": "x", "denoise": 3}}, "denoise"),
        ({"modelSource": {"files": []}}, "engine"),
        (
            {"modelSource": {**SOURCE, "files": [{**SOURCE["files"][0], "filename": "../../etc/passwd"}]}},  # type: ignore[dict-item]
            "plain file name",
        ),
        (
            {"modelSource": {**SOURCE, "files": [{**SOURCE["files"][0], "url": "http://models.example/m"}]}},  # type: ignore[dict-item]
            "plain http",
        ),
        ({"task": {"kind": "image", "prompt": "x", "initImageUrl": "file:///etc/passwd"}}, "address"),
        ({"model": None}, "model"),
        ({"vramGbEstimate": "much"}, "vramGbEstimate"),
        ({"vramGbEstimate": float("nan")}, "vramGbEstimate"),
        ({"vramGbEstimate": float("inf")}, "vramGbEstimate"),
        ({"vramGbEstimate": -1}, "vramGbEstimate"),
        ({"task": "a castle"}, "task"),
        ({"task": {"prompt": "x"}}, "task.kind"),
        ({"task": {"kind": ["image"], "prompt": "x"}}, "task.kind"),
        ({"modelSource": []}, "modelSource"),
        ({"modelSource": {**SOURCE, "files": [{**SOURCE["files"][0], "role": "oven"}]}}, "role"),  # type: ignore[dict-item]
        ({"modelSource": {**SOURCE, "files": [{**SOURCE["files"][0], "sha256": "00"}]}}, "sha256"),  # type: ignore[dict-item]
    ],
)
def test_offer_that_no_worker_could_do_is_failed_for_good(changes: dict[str, Any], error: str) -> None:
    """A malformed or forbidden offer is accepted and failed with its reason, so it is not tried for ever."""
    judgement = judge(claim(**changes), IDLE)
    assert isinstance(judgement, Impossible)
    assert error in judgement.error


@pytest.mark.parametrize("field", ["initImageUrl", "maskUrl", "refImageUrl"])
def test_input_may_stand_in_its_address(field: str) -> None:
    """Pictures of a task may come as data: addresses; files of a model may not."""
    address = "data:image/png;base64,iVBORw0KGgo="
    task = {**CLAIM["task"], "initImageUrl": address, field: address}
    assert isinstance(judge(claim(task=task), IDLE), Take)
    source = {**SOURCE, "files": [{**SOURCE["files"][0], "url": address}]}  # type: ignore[dict-item]
    assert isinstance(judge(claim(modelSource=source), IDLE), Impossible)


def test_malformed_offer_error_does_not_quote_the_prompt() -> None:
    """The reason of a refusal names the fields, never what they held."""
    judgement = judge(claim(task={"kind": "image", "prompt": ["hidden castle"]}), IDLE)
    assert isinstance(judgement, Impossible)
    assert "castle" not in judgement.error


@pytest.mark.parametrize("job_id", [None, 7, ""])
def test_offer_without_a_job_is_ignored(job_id: object) -> None:
    """An offer that names no job cannot be answered and is dropped."""
    assert isinstance(judge(claim(jobId=job_id), IDLE), Ignore)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*CLAIM, "other"]), JSON),
    st.dictionaries(st.sampled_from(["kind", "prompt", "steps", "width", "seed", "ext"]), JSON),
    st.dictionaries(st.sampled_from(["engine", "files", "cliDefaults"]), JSON),
)
def test_any_offer_gets_a_judgement(
    changes: dict[str, Any], task: dict[str, Any], source: dict[str, Any]
) -> None:
    """Whatever JSON an offer holds, the worker has an answer and does not crash."""
    offered = {
        **CLAIM,
        **changes,
        "task": {**CLAIM["task"], **task},
        "modelSource": {**SOURCE, **source},
    }
    assert isinstance(judge(offered, IDLE), Take | Refuse | Impossible | Ignore | AlreadyOurs)


def test_offer_is_read_with_every_field_of_the_protocol() -> None:
    """Every field of claim, task, model source and defaults arrives as sent; unknown ones are ignored."""
    offered = {
        "jobId": "j1", "gameId": "g", "assetName": "a", "model": "m", "vramGbEstimate": 7.5, "newField": 1,
        "task": {
            "kind": "image", "prompt": "p", "negativePrompt": "n", "initImageUrl": "https://x/i.png",
            "maskUrl": "https://x/m.png", "refImageUrl": "https://x/r.png", "denoise": 0.5, "cfgScale": 3.5,
            "samplingMethod": "dpm++2m", "width": 640, "height": 480, "steps": 12, "seed": 99, "ext": "png",
            "newField": [],
        },
        "modelSource": {
            "engine": "sd-cpp",
            "files": [
                {"role": role, "url": f"https://x/{role}", "filename": f"{role}.gguf", "approxBytes": 5,
                 "sha256": "A" * 64, "newField": {}}
                for role in ("diffusion-model", "text-encoder", "text-encoder-vision", "vae", "lora", "model")
            ],
            "cliDefaults": {
                "cfgScale": 1.0, "steps": 8, "width": 1024, "height": 768, "samplingMethod": "euler",
                "flowShift": 3.0, "zeroCondT": True, "offloadToCpu": False, "contextSize": 4096,
                "chatTemplateKwargs": {"a": 1}, "mmap": True, "maxVramGib": 6.5, "newField": None,
            },
        },
    }  # fmt: skip
    judgement = judge(offered, IDLE)
    assert isinstance(judgement, Take)
    job = judgement.job
    task = job.task.model_dump(by_alias=True)
    assert task == {key: value for key, value in offered["task"].items() if key != "newField"}  # type: ignore[attr-defined]
    assert (job.job_id, job.model, job.vram_gb_estimate, job.source.engine) == ("j1", "m", 7.5, "sd-cpp")
    first = job.source.files[0]
    assert (first.role, first.url, first.filename) == ("diffusion-model", "https://x/diffusion-model",
                                                       "diffusion-model.gguf")  # fmt: skip
    assert (first.approx_bytes, first.sha256, len(job.source.files)) == (5, "a" * 64, 6)
    defaults = job.source.cli_defaults.model_dump(by_alias=True)
    sent = offered["modelSource"]["cliDefaults"]  # type: ignore[index]
    assert defaults == {key: value for key, value in sent.items() if key != "newField"}


def test_offer_without_its_optional_fields_has_the_protocols_defaults() -> None:
    """Only jobId, model, task and modelSource are required; what is absent is the protocol's default."""
    minimal = {
        "jobId": "j1",
        "model": "m",
        "task": {"kind": "image", "prompt": "p"},
        "modelSource": {"engine": "synthetic"},
    }
    judgement = judge(minimal, IDLE)
    assert isinstance(judgement, Take)
    task = judgement.job.task
    assert (task.denoise, task.ext, task.width, task.height, task.steps) == (0.75, "webp", None, None, None)
    assert judgement.job.vram_gb_estimate == 0.0
    assert judgement.job.source.files == ()


def test_box_that_refuses_what_it_is_offered_says_why() -> None:
    """A box that looks healthy and makes nothing has the reason in its status line, until it takes a job."""
    news = News()
    lane = news.lane(1)
    full = replace(IDLE, state_problem=lambda: "the disk for finished pictures is full")
    busy = replace(IDLE, current_job_id="other")
    said = []
    for situation in (full, busy, IDLE):
        lane.offer_answered(judge(CLAIM, situation), "m")
        said.append(news.activity.snapshot().status)
    why = "ready; the last offer was refused: the disk for finished pictures is full"
    assert said == [why, why, "ready"]


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("seed", 5.0, 5),
        ("seed", "5", 5),
        ("seed", None, None),
        ("width", "512", 512),
        ("steps", None, None),
        ("cfgScale", 7, 7.0),
        ("denoise", "0.5", 0.5),
        ("negativePrompt", None, None),
    ],
)
def test_numbers_as_sloppy_clients_write_them_are_read(field: str, value: Any, read: Any) -> None:
    """A number as text, a whole one with a point, a null for what may be absent: read as what it means."""
    judgement = judge({**CLAIM, "task": {"kind": "image", "prompt": "x", field: value}}, IDLE)
    assert isinstance(judgement, Take)
    assert judgement.job.task.model_dump(by_alias=True)[field] == read


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 5.5), ("seed", 1e30), ("width", "wide"), ("denoise", None), ("ext", None)]
)
def test_field_that_means_nothing_is_named(field: str, value: Any) -> None:
    """What cannot be read fails the job for good, by the name of the field."""
    judgement = judge({**CLAIM, "task": {"kind": "image", "prompt": "x", field: value}}, IDLE)
    assert isinstance(judgement, Impossible)
    assert field in judgement.error
