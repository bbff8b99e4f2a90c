"""What Prometheus gets: names, values, where they are served, and that examples use no others."""

from __future__ import annotations

import json
import re
import select
import socket
import stat
import threading
import urllib.request
from pathlib import Path

import pytest
import yaml

from studio_worker import config
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio
from studio_worker.report.metrics import Exporter, Metrics
from studio_worker.report.scrapes import MAX_CONNECTIONS
from studio_worker.report.snapshot import (
    DeviceFacts,
    DownloadFacts,
    EndedJob,
    GpuFacts,
    HealthFacts,
    HeldFacts,
    LaneFacts,
    OfferFacts,
    OutboxFacts,
    ProcessFacts,
    RegistrationFacts,
    ResidentModel,
    SessionFacts,
    Snapshot,
    TurnFacts,
    UploadFacts,
)
from tests.fakes.servers import FileServer, free_port
from tests.lab.service import READY_S, await_status, override, queue_synthetic, require, samples

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "packaging" / "examples"

EVERYTHING = Snapshot(
    version="1.2.3",
    phase="ready",
    ready_after_s=1.5,
    process=ProcessFacts(starts=7, crashes=2),
    registration=RegistrationFacts(state="approved"),
    session=SessionFacts(state="connected", reconnects=3),
    health=HealthFacts(failures=4, held=(HeldFacts(model="m", failures=3),)),
    jobs={"done": 5, "failed": 1, "handed_back": 0, "refused": 0},
    offers=OfferFacts(accepted=6, rejected={"busy": 4}),
    uploads=UploadFacts(delivered=5, retries=2, delivered_bytes=5000),
    downloads=DownloadFacts(done=2, failed=1, received_bytes=7_000_000_000),
    outbox=OutboxFacts(count=1, size_bytes=1000, oldest_at=1e9),
    device=DeviceFacts(
        name="cuda:0",
        total_bytes=24_000_000_000,
        used_bytes=6_000_000_000,
        gpu=GpuFacts(
            pci_bus_id="0000:41:00.0",
            temperature_celsius=65,
            power_watts=280,
            utilization_ratio=0.97,
            used_bytes=7_000_000_000,
            slowed_by=(),
        ),
    ),
    resident=(ResidentModel(model='a "b"\n', size_bytes=4_000_000_000),),
    lanes=(LaneFacts(lane=1), LaneFacts(lane=2, registration=RegistrationFacts(state="approved"))),
    turns=TurnFacts(switches=5, switches_saved=2),
)


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(lambda: EVERYTHING, lambda: True)
    made.job_ended(EndedJob(job_id="j", model="m", outcome="done", stages_s={"generate": 3.0, "upload": 0.2}))
    return made


def test_metrics_tell_everything_by_conventional_names(metrics: Metrics) -> None:
    """Counters end in _total, units are base units, labels are bounded, histograms have buckets by stage."""
    found = samples(metrics.text().decode())
    assert (
        found.items()
        >= {
            "studio_worker_build_info version=1.2.3": 1,
            "studio_worker_ready": 1,
            "studio_worker_startup_seconds": 1.5,
            "studio_worker_starts_total": 7,
            "studio_worker_crashes_total": 2,
            "studio_worker_registered": 1,
            "studio_worker_session_connected": 1,
            "studio_worker_session_reconnects_total": 3,
            "studio_worker_jobs_total outcome=done": 5,
            "studio_worker_failures_in_a_row": 4,
            "studio_worker_held_back scope=box": 0,
            "studio_worker_held_back scope=model": 1,
            "studio_worker_offers_total answer=rejected_busy": 4,
            "studio_worker_download_bytes_total": 7e9,
            "studio_worker_downloads_total outcome=failed": 1,
            "studio_worker_upload_bytes_total": 5000,
            "studio_worker_upload_retries_total": 2,
            "studio_worker_outbox_pictures": 1,
            "studio_worker_outbox_oldest_timestamp_seconds": 1e9,
            "studio_worker_device_memory_used_bytes device=cuda:0": 6e9,
            'studio_worker_model_memory_bytes model=a "b" ': 4e9,
            "studio_worker_job_stage_seconds_bucket le=5.0 stage=generate": 1,
            "studio_worker_job_stage_seconds_bucket le=2.5 stage=generate": 0,
            "studio_worker_job_stage_seconds_sum stage=upload": 0.2,
            "studio_worker_config_last_reload_successful": 1,
            "studio_worker_lane_registered lane=2": 1,
            "studio_worker_lane_connected lane=2": 0,
            "studio_worker_lane_job_in_hand lane=2": 0,
            "studio_worker_model_switches_total": 5,
            "studio_worker_model_switches_saved_total": 2,
        }.items()
    )
    assert found["process_resident_memory_bytes"] > 0


@pytest.mark.parametrize("example", ["prometheus-alerts.yml", "grafana-dashboard.json"])
def test_examples_use_metrics_that_exist(metrics: Metrics, example: str) -> None:
    """No rule and no panel of the shipped examples asks for a name that the worker does not export."""
    text = (EXAMPLES / example).read_text()
    if example.endswith(".json"):
        used = [each["expr"] for panel in json.loads(text)["panels"] for each in panel["targets"]]
    else:
        used = [rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    names = {name for expr in used for name in re.findall(r"\b(?:studio_worker|process)_\w+", expr)}
    exported = {name.split(" ")[0] for name in samples(metrics.text().decode())}
    assert len(names) > 5
    assert names <= exported
    labels = {label for expr in used for label in re.findall(r'(\w+)=~?"', expr)}
    assert labels <= {"outcome", "instance", "job", "answer", "file", "cause"}
    # Without this two series of one metric are never compared, and the rule never fires.
    assert not [expr for expr in used if re.search(r"\} *\[\w+\]\) *\n? *[<>]=? *increase", expr)]


def test_textfile_is_for_everybody_to_read_and_goes_at_the_end(tmp_path: Path, metrics: Metrics) -> None:
    """node_exporter, another user, reads whole files only; a stopped service leaves none behind."""
    path = tmp_path / "studio-worker.prom"
    exporter = Exporter(metrics, None, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert "studio_worker_ready" in samples(path.read_text())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    exporter.close()
    assert list(tmp_path.iterdir()) == []


def test_taken_port_and_closed_folder_are_configuration_errors(tmp_path: Path, metrics: Metrics) -> None:
    """What cannot be served or written ends the start with the key and the cure."""
    port = free_port()
    first = Exporter(metrics, ("127.0.0.1", port), None)
    with pytest.raises(ConfigError, match=r"metrics\.listen: cannot listen on .*name another port"):
        Exporter(metrics, ("127.0.0.1", port), None)
    first.close()
    with pytest.raises(ConfigError, match=r"metrics\.textfile: .*ReadWritePaths="):
        Exporter(metrics, None, tmp_path / "missing" / "x.prom")


def test_silent_connections_keep_no_scrape_out(metrics: Metrics) -> None:
    """Many connections that say nothing take neither a thread each nor the worker's descriptors."""
    port = free_port()
    exporter = Exporter(metrics, ("127.0.0.1", port), None)
    threads = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert "studio_worker_ready" in samples(answer.read().decode())
    assert threading.active_count() == threads
    assert len(select.select(silent, [], [], 0)[0]) >= 100 - MAX_CONNECTIONS
    exporter.close()
    for each in silent:
        each.close()


def test_scrape_that_does_not_come_is_not_waited_for(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose request never gets whole is closed."""
    monkeypatch.setattr("studio_worker.report.scrapes.DEADLINE_S", 0.1)
    port = free_port()
    exporter = Exporter(metrics, ("127.0.0.1", port), None)
    with socket.create_connection(("127.0.0.1", port), 10) as silent:
        silent.sendall(b"GET /metrics HT")
        assert silent.recv(100) == b""
    exporter.close()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("POST /metrics", 405), ("HEAD /", 200), ("nonsense", 405), ("A" * 9000, 431)],
)
def test_odd_requests_for_metrics_are_answered(metrics: Metrics, request_line: str, status: int) -> None:
    """What is no scrape gets a status and no more."""
    port = free_port()
    exporter = Exporter(metrics, ("127.0.0.1", port), None)
    with socket.create_connection(("127.0.0.1", port), 10) as asking:
        asking.sendall(f"{request_line} HTTP/1.1\r\n".encode() + (b"\r\n" if status != 431 else b""))
        answer = asking.makefile("rb").read()
    exporter.close()
    assert answer.split()[1] == str(status).encode()
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "192.168.1.2:9464", "9464", "127.0.0.1", "127.0.0.1:x"])
def test_metrics_are_served_on_this_machine_only(tmp_path: Path, address: str) -> None:
    """An address that others could reach, or that has no port, is refused with an example."""
    (tmp_path / "config.toml").write_text(f'[metrics]\nlisten = "{address}"\n')
    with pytest.raises(ConfigError, match=r"config\.toml:2: metrics\.listen"):
        config.load(tmp_path)


@pytest.mark.welcoming_studio
def test_service_exports_what_it_does(studio: LocalStudio, site: Path, tmp_path: Path) -> None:
    """The real service: a download, a job, the session and READY are in what Prometheus gets."""
    port = free_port()
    override(site, f'[metrics]\nlisten = "127.0.0.1:{port}"\ntextfile = "{tmp_path}/worker.prom"\n')
    with FileServer() as server:
        require(site, "small", server.serve("/small.safetensors", b"x" * 5000))
        with ServiceProcess(site, tmp_path / "log") as running:
            running.await_message("STATUS=ready, connected", READY_S)
            await_status(studio, queue_synthetic(studio), "done")

            def scraped() -> dict[str, float]:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    return samples(answer.read().decode())

            studio.wait_for(lambda: scraped()["studio_worker_jobs_total outcome=done"] == 1, READY_S)
            found = scraped()
            assert (tmp_path / "worker.prom").exists()
            assert running.stop() == 0
    assert found["studio_worker_ready"] == 1
    assert found["studio_worker_session_connected"] == 1
    assert found["studio_worker_registered"] == 1
    assert 0 < found["studio_worker_startup_seconds"] < READY_S
    assert found["studio_worker_downloads_total outcome=done"] == 1
    assert found["studio_worker_download_bytes_total"] == 5000
    assert found["studio_worker_job_stage_seconds_count stage=generate"] == 1
    assert not (tmp_path / "worker.prom").exists()
