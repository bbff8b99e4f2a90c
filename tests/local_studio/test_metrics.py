"""What Prometheus gets of a studio of one's own, what the examples ask of it, and when alerts fire."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from studio_worker.local_studio import Door, LocalStudio, Tls
from studio_worker.local_studio.metrics import Metrics
from studio_worker.local_studio.pictures import StorageAway
from studio_worker.local_studio.rules import (
    LOST_CONNECTION,
    JobStatus,
    QueuedJob,
    accepted,
    declined,
    failed,
    offered,
    released,
)
from tests.fakes.certificates import certificate
from tests.fakes.machine import WAIT_S, Machine, queue
from tests.lab.programs import program
from tests.lab.service import samples

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples"
ALERTS = EXAMPLES / "local-studio-alerts.yml"
PAGE = Path(__file__).parents[2] / "docs" / "farm.md"
DASHBOARD = EXAMPLES / "local-studio-dashboard.json"
TOKEN = "a token of sufficient length"


def scrape(studio: LocalStudio, **headers: str) -> dict[str, float]:
    answer = requests.get(f"{studio.base_url}/metrics", headers=headers, timeout=WAIT_S)
    assert answer.status_code == 200
    return samples(answer.text)


def test_metrics_tell_of_line_workers_and_jobs(studio: LocalStudio) -> None:
    """Length and age of the line by model, sessions by state, jobs by outcome, claims, answers, offers."""
    began = time.time()
    Machine(studio, name="newcomer", approve=False)
    job_id = queue(studio)
    queue(studio)
    machine = Machine(studio).connect()
    fresh = scrape(studio)
    assert fresh["local_studio_queue_jobs model=test"] == 2
    assert began - 1 < fresh["local_studio_queue_oldest_timestamp_seconds model=test"] < time.time() + 1
    assert fresh["local_studio_sessions state=idle"] == 1
    assert fresh["local_studio_registrations_pending"] == 1
    machine.take()
    machine.beat(job_id)
    held = scrape(studio)
    assert held["local_studio_queue_jobs model=test"] == 1
    assert held["local_studio_jobs status=running"] == 1
    assert held["local_studio_sessions state=working"] == 1
    assert held["local_studio_sessions state=idle"] == 0
    assert held["local_studio_offer_wait_seconds_count"] == 1
    assert machine.upload(job_id).status_code == 200
    assert machine.upload(job_id).status_code == 409
    machine.offered()
    machine.hang_up()
    requests.get(f"{studio.base_url}/api/jobs/nothing", timeout=WAIT_S)
    after = scrape(studio)
    assert after["local_studio_jobs_queued_total"] == 2
    assert after["local_studio_jobs_ended_total outcome=done"] == 1
    assert after["local_studio_jobs_ended_total outcome=failed"] == 0
    assert after["local_studio_claims_released_total cause=worker"] == 1
    assert after["local_studio_claims_released_total cause=studio"] == 0
    assert after["local_studio_http_answers_total part=upload status=200"] == 1
    assert after["local_studio_http_answers_total part=upload status=409"] == 1
    assert after["local_studio_http_answers_total part=api status=404"] == 1
    assert after["local_studio_sessions state=working"] == 0
    assert after["process_resident_memory_bytes"] > 0
    assert "local_studio_certificate_end_timestamp_seconds" not in after


def test_offer_is_measured_once_a_job() -> None:
    """An offer that is declined, or a later attempt, is no second wait in the line."""
    metrics = Metrics()
    job = QueuedJob("j", "m", {}, {}, created_at=100.0)
    first = offered(job, "a", 103.0)
    second = offered(declined(first, "a"), "a", 200.0)
    for before, after in ((job, first), (first, declined(first, "a")), (declined(first, "a"), second)):
        metrics.stepped(before, after)
    found = samples(metrics.answer("")[1].decode())
    assert found["local_studio_offer_wait_seconds_count"] == 1
    assert found["local_studio_offer_wait_seconds_sum"] == 3


def test_claims_that_are_lost_are_told_from_those_given_back() -> None:
    """A lost worker and a stopping studio are counted apart; a declined or failed job is no lost claim."""
    metrics = Metrics()
    job = accepted(offered(QueuedJob("j", "m", {}, {}, created_at=0.0), "a", 1.0), "a", 2.0)
    back = released(job, LOST_CONNECTION, 3.0)
    again = offered(back, "a", 4.0)
    for before, after in (
        (job, back),
        (job, released(job, "away", 3.0, counts=False)),
        (job, failed(job, "a", "no", 3.0, retryable=True)),
        (again, declined(again, "a")),
        (back, replace(back, status=JobStatus.FAILED)),
    ):
        metrics.stepped(before, after)
    found = samples(metrics.answer("")[1].decode())
    assert found["local_studio_claims_released_total cause=worker"] == 1
    assert found["local_studio_claims_released_total cause=studio"] == 1
    assert found["local_studio_jobs_ended_total outcome=failed"] == 1


def test_answers_of_our_mistakes_are_counted(studio: LocalStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that fails inside is in the metrics as it is in the log."""
    monkeypatch.setattr(studio, "pending", lambda: 1 / 0)
    assert requests.get(f"{studio.base_url}/api/state", timeout=WAIT_S).status_code == 500
    monkeypatch.undo()
    assert scrape(studio)["local_studio_http_answers_total part=api status=500"] == 1


def test_metrics_go_on_without_the_database(studio: LocalStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database does not answer the process tells that, and everything that it knows itself."""
    queue(studio)
    machine = Machine(studio).connect()

    def away(*_: object) -> None:
        raise StorageAway("gone")

    with monkeypatch.context() as patch:
        patch.setattr(studio.queue, "counts", away)
        found = scrape(studio)
    assert found["local_studio_database_up"] == 0
    assert found["local_studio_sessions state=idle"] == 1
    assert found["local_studio_jobs_queued_total"] == 1
    assert "local_studio_queue_jobs model=test" not in found
    assert "local_studio_registrations_pending" not in found
    assert scrape(studio)["local_studio_database_up"] == 1
    machine.hang_up()


def test_metrics_want_the_token_as_everything_does(tmp_path: Path) -> None:
    """Prometheus brings the token as bearer; without it there are no numbers, the certificate's end say."""
    made = certificate(tmp_path)
    door = Door(token=TOKEN, tls=Tls(made.shown, made.key))
    with LocalStudio(tmp_path / "studio.sqlite3", door=door) as studio:
        address = f"{studio.base_url}/metrics"
        assert requests.get(address, verify=str(made.authority), timeout=WAIT_S).status_code == 401
        answer = requests.get(
            address,
            headers={
                "Authorization": f"Bearer {TOKEN}",
                "Accept": "application/openmetrics-text; version=1.0.0",
            },
            verify=str(made.authority),
            timeout=WAIT_S,
        )
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    assert "local_studio_certificate_end_timestamp_seconds 4.0709088e+09" in answer.text


# --- the examples -----------------------------------------------------------------------------------


def expressions(example: Path) -> list[str]:
    text = example.read_text()
    if example.suffix == ".md":
        return [text]
    if example.suffix == ".json":
        return [each["expr"] for panel in json.loads(text)["panels"] for each in panel["targets"]]
    return [rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("example", [ALERTS, DASHBOARD, PAGE], ids=["alerts", "dashboard", "page"])
def test_examples_use_metrics_that_exist(tmp_path: Path, example: Path) -> None:
    """No rule and no panel of the examples asks for a name or a label that a studio does not export."""
    made = certificate(tmp_path)
    with LocalStudio(tmp_path / "studio.sqlite3", door=Door(tls=Tls(made.shown, made.key))) as studio:
        queue(studio)
        text = requests.get(f"{studio.base_url}/metrics", verify=str(made.authority), timeout=WAIT_S).text
    found = samples(text)
    used = expressions(example)
    names = {name for expr in used for name in re.findall(r"\b(?:local_studio|process)_[a-z]\w+", expr)}
    assert len(names) > 5
    assert names <= {name.split(" ")[0] for name in found}
    matched = {label for expr in used for label in re.findall(r'(\w+)=~?"', expr)}
    grouped = {
        label for expr in used for by in re.findall(r"\bby \(([\w, ]+)\)", expr) for label in by.split(", ")
    }
    exported = {label for name in found for label in re.findall(r" (\w+)=", name)}
    assert matched | grouped <= exported | {"instance", "job"}


WELL = {
    "local_studio_database_up": "1x240",
    'up{job="local-studio"}': "1x240",
    "local_studio_build_info": "1x240",
    'local_studio_queue_jobs{model="m"}': "5x240",
    'local_studio_queue_oldest_timestamp_seconds{model="m"}': "0+60x240",
    'local_studio_sessions{state="working"}': "2x240",
    'local_studio_sessions{state="paused"}': "1x240",
    'local_studio_sessions{state="idle"}': "1x240",
    'local_studio_offer_wait_seconds_bucket{le="60.0"}': "0+60x240",
    "local_studio_offer_wait_seconds_count": "0+60x240",
    'local_studio_jobs_ended_total{outcome="done"}': "0+60x240",
    'local_studio_jobs_ended_total{outcome="failed"}': "0+0.1x240",
    'local_studio_claims_released_total{cause="worker"}': "0+0.05x240",
    'local_studio_claims_released_total{cause="studio"}': "0+5x240",
    'local_studio_http_answers_total{part="upload",status="200"}': "0+60x240",
    'local_studio_http_answers_total{part="upload",status="409"}': "0x240",
    'local_studio_http_answers_total{part="upload",status="507"}': "0x240",
    'local_studio_http_answers_total{part="api",status="500"}': "0x240",
    "local_studio_registrations_pending": "0x240",
    "local_studio_certificate_end_timestamp_seconds": "9999999x240",
}
"""Four hours of a studio that is well, a value a minute, as promtool writes them."""

TROUBLES: dict[str, Mapping[str, str]] = {
    "LocalStudioDown": {'up{job="local-studio"}': "1x200 0x40"},
    "LocalStudioDatabaseAway": {"local_studio_database_up": "1x200 0x40"},
    "LocalStudioNobodyWorks": {
        'local_studio_sessions{state="working"}': "2x200 0x40",
        'local_studio_sessions{state="idle"}': "1x200 0x40",
    },
    "LocalStudioQueueIsOld": {'local_studio_queue_oldest_timestamp_seconds{model="m"}': "60x240"},
    "LocalStudioOffersAreSlow": {'local_studio_offer_wait_seconds_bucket{le="60.0"}': "0+20x240"},
    "LocalStudioJobsFail": {
        'local_studio_jobs_ended_total{outcome="failed"}': "0+2x240",
        'local_studio_jobs_ended_total{outcome="done"}': "0+1x240",
    },
    "LocalStudioClaimsLost": {'local_studio_claims_released_total{cause="worker"}': "0+1x240"},
    "LocalStudioCannotStore": {'local_studio_http_answers_total{part="upload",status="507"}': "0x235 0+1x5"},
    "LocalStudioUploadsRefused": {
        'local_studio_http_answers_total{part="upload",status="409"}': "0x200 0+1x40"
    },
    "LocalStudioMakesMistakes": {'local_studio_http_answers_total{part="api",status="500"}': "0x235 1x5"},
    "LocalStudioWorkerAsks": {"local_studio_registrations_pending": "1x240"},
    "LocalStudioCertificateEnds": {"local_studio_certificate_end_timestamp_seconds": "604800x240"},
}

OWN = {
    "LocalStudioDown",
    "LocalStudioDatabaseAway",
    "LocalStudioCannotStore",
    "LocalStudioMakesMistakes",
    "LocalStudioCertificateEnds",
}
"""Alerts that name the process: two of them for two that are in trouble."""


def of(instance: str, series: Mapping[str, str]) -> dict[str, str]:
    """These series as Prometheus has them of one process."""
    named = {}
    for name, values in series.items():
        metric, _, labels = name.removesuffix("}").partition("{")
        said = [label for label in (labels, f'instance="{instance}"') if label]
        named[f"{metric}{{{','.join(said)}}}"] = values
    return named


def firing(
    tmp_path: Path, series: Mapping[str, str], expected: str | None, *, well: Mapping[str, str] | None = None
) -> str:
    """What promtool has to say where only ``expected`` is to fire, once, after four hours."""
    promtool = program("promtool")
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    # Alerts that fire are told by Prometheus's own series; their labels and words are the rules' business.
    asked = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "4h",
        "exp_samples": [{"labels": f'{{alertname="{expected}"}}', "value": 1}] if expected else [],
    }
    test: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values}
                    for name, values in (dict(WELL if well is None else well) | dict(series)).items()
                ],
                "promql_expr_test": [asked],
            }
        ],
    }
    assert set(TROUBLES) == {rule["alert"] for rule in rules}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_no_alert_fires_where_all_is_well(tmp_path: Path) -> None:
    """Nobody is called for a studio that works, has a line, and was restarted."""
    assert firing(tmp_path, {}, None) == ""


@pytest.mark.parametrize("alert", TROUBLES)
def test_alert_fires_in_its_trouble_and_alone(tmp_path: Path, alert: str) -> None:
    """Each alert fires when what it is for has gone on for long enough, and no other does."""
    assert firing(tmp_path, TROUBLES[alert], alert) == ""


@pytest.mark.parametrize("alert", [None, *TROUBLES])
def test_two_processes_raise_one_alert(tmp_path: Path, alert: str | None) -> None:
    """Where two processes tell of the same line, or of one that is in trouble itself, one alert fires."""
    well = of("north", WELL) | of("south", WELL)
    trouble = TROUBLES[alert] if alert else {}
    told = of("north", trouble)
    if alert not in OWN:  # what the database or the workers do, both tell
        told |= of("south", trouble)
    assert firing(tmp_path, told, alert, well=well) == ""


def test_process_that_is_away_raises_its_alert_alone(tmp_path: Path) -> None:
    """One of two that died for good, whose numbers are gone, is told as down; nothing else is said."""
    gone = {
        name: "1x200 0x40" if name.startswith("up{") else f"{values.removesuffix('x240')}x200 _x40"
        for name, values in WELL.items()
    }
    well = of("south", WELL)
    assert firing(tmp_path, of("north", gone), "LocalStudioDown", well=well) == ""
