"""Judging an offer before it is answered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio_worker.studio.offers import (
    AlreadyOurs,
    Ignore,
    Impossible,
    Judgement,
    Refuse,
    Situation,
    Take,
    judge,
)

SOURCE = {
    "engine": "sd-cpp",
    "files": [{"role": "model", "url": "https://models.example/m.safetensors", "filename": "m.safetensors"}],
    "cliDefaults": {"cfgScale": 4.0, "steps": 20, "width": 64, "height": 64},
}
CLAIM: dict[str, Any] = {
    "jobId": "j1",
    "gameId": "g",
    "assetName": "a",
    "model": "m",
    "vramGbEstimate": 4.0,
    "task": {"kind": "image", "prompt": "a castle"},
    "modelSource": SOURCE,
}
IDLE = Situation(
    now=12.5,
    current_job_id=None,
    is_paused=False,
    threshold_gb=8.0,
    engines=frozenset({"sd-cpp", "synthetic"}),
    on_demand=True,
    allow_insecure_urls=False,
    is_uploading=lambda job_id: False,
    is_just_delivered=lambda job_id: False,
    is_in_outbox=lambda job_id: False,
    outbox_problem=lambda: None,
    is_poisoned=lambda job_id: False,
    failed_for_good=lambda job_id: None,
    is_on_box=lambda files: True,
    shortfall_bytes=lambda files: 0,
)


def claim(**changes: Any) -> dict[str, Any]:
    """CLAIM with some fields changed; ``None`` removes one."""
    return {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}


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
        (replace(IDLE, is_paused=True), Refuse("j1", "the worker takes no jobs at present", "paused")),
        (replace(IDLE, current_job_id="other"), Refuse("j1", "the worker has a job in hand", "busy")),
        (replace(IDLE, current_job_id="j1"), AlreadyOurs("j1")),
        (replace(IDLE, is_in_outbox=lambda job_id: True), AlreadyOurs("j1")),
        (replace(IDLE, is_in_outbox=lambda job_id: True, is_paused=True), AlreadyOurs("j1")),
        (
            replace(IDLE, is_poisoned=lambda job_id: True),
            Impossible("j1", "the worker crashed twice while it worked on this job"),
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
        ({"vramGbEstimate": 9.0}, IDLE, "needs 9 GB and this worker takes up to 8 GB"),
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


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"modelSource": {**SOURCE, "engine": "onnx"}}, "unknown engine 'onnx'"),
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
    ],
)
def test_offer_that_no_worker_could_do_is_failed_for_good(changes: dict[str, Any], error: str) -> None:
    """A malformed or forbidden offer is accepted and failed with its reason, so it is not tried for ever."""
    judgement = judge(claim(**changes), IDLE)
    assert isinstance(judgement, Impossible)
    assert error in judgement.error


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
