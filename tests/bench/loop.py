"""How fast jobs go through session, engine and upload, and how long the engine waits for the network between.

Beside it, in the same run: a bare client that takes the same offers from the same studio and uploads bytes it
already has. That is what the studio and loopback allow; the difference is the worker's own.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from websockets.sync.client import connect

from studio_worker import sample_model
from studio_worker.demo import MODEL_ID, sample_source, write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from studio_worker.studio.wire import SUBPROTOCOL, Capabilities

JOBS = 200
PICTURES = 40
SYNTHETIC: dict[str, Any] = {"engine": "synthetic", "files": [], "cliDefaults": {}}
SMALL = {"kind": "image", "prompt": "a red potion", "width": 64, "height": 64, "steps": 4}


def main() -> None:
    """Measure and print."""
    table = Table("what", "measured", "beside", title="the loop")
    with tempfile.TemporaryDirectory() as name:
        for row in loop(Path(name)):
            table.add_row(*row)
    Console().print(table)


def loop(folder: Path) -> list[tuple[str, str, str]]:
    """Jobs a second, the engine's share of the time, and where the rest goes."""
    weights = sample_model.WEIGHTS
    with LocalStudio(folder / "studio.sqlite3", models_dir=weights.parent, auto_approve=True) as studio:
        (folder / "work").mkdir()
        config = write_configuration(studio, folder / "work")
        with ServiceProcess(config, folder / "log") as service:
            studio.wait_for(lambda: any(studio.is_online(w.worker_id) for w in studio.workers()), 60.0)
            run(studio, 1, SYNTHETIC, "placeholder", SMALL)  # whatever is imported late
            synthetic_s = run(studio, JOBS, SYNTHETIC, "placeholder", SMALL)
            picture = {"kind": "image", "prompt": sample_model.prompt("red", "potion", "grass")}
            run(studio, 2, sample_source(studio), MODEL_ID, picture)
            pictures_s = run(studio, PICTURES, sample_source(studio), MODEL_ID, picture)
            service.stop()
        done = [line for line in service.log_lines() if line["message"] == "job done"][-PICTURES:]
        identity = json.loads((folder / "work" / "state" / "identity.json").read_text())
        bare_s = run_bare(studio, identity, JOBS)
    engine_s = sum(line["load_ms"] + line["generate_ms"] + line["encode_ms"] for line in done) / 1000
    upload_s = sum(line["upload_ms"] for line in done) / 1000
    waits = 1 - engine_s / pictures_s
    return [
        (
            "synthetic jobs through the loop",
            f"{JOBS / synthetic_s:.1f} a second",
            f"bare client: {JOBS / bare_s:.1f}; ratio {bare_s / synthetic_s:.2f}",
        ),
        (
            f"engine waits, sample model, {engine_s / PICTURES * 1000:.0f} ms a picture",
            f"{100 * waits:.1f}% of the time",
            f"{(pictures_s - engine_s) / PICTURES * 1000:.1f} ms between two pictures, "
            f"{upload_s / PICTURES * 1000:.1f} ms of it the upload",
        ),
    ]


def run(studio: LocalStudio, count: int, source: Any, model: str, task: dict[str, Any]) -> float:
    """Seconds from the first accept to the last delivery of ``count`` jobs."""
    ids = queue(studio, count, source, model, task)
    studio.wait_for(lambda: studio.job(ids[-1]).status == "done", 600.0)
    first, last = studio.job(ids[0]), studio.job(ids[-1])
    assert first.offered_at is not None
    assert last.finished_at is not None
    return last.finished_at - first.offered_at


def queue(studio: LocalStudio, count: int, source: Any, model: str, task: dict[str, Any]) -> list[str]:
    return [studio.queue_job(model=model, task=task, model_source=source) for _ in range(count)]


def run_bare(studio: LocalStudio, identity: dict[str, str], count: int) -> float:
    """The same for a client that makes nothing and keeps nothing."""
    ids = queue(studio, count, SYNTHETIC, "placeholder", SMALL)
    worker, token = identity["worker_id"], identity["auth_token"]
    base = f"{studio.base_url}/graphics/api/workers/{worker}"
    headers = {"Authorization": f"Bearer {token}"}
    facts = Capabilities(
        machine_name="bare", username="bare", agent_version="0", vram_total_gb=0, vram_threshold_gb=8,
        auto_enabled=True, supported_models=("synthetic:*",), supported_models_per_kind={},
    ).model_dump(by_alias=True, exclude_none=True, mode="json")  # fmt: skip
    picture = b"\x89PNG" + bytes(20_000)
    with (
        connect(
            f"ws{base.removeprefix('http')}/connect",
            additional_headers=headers,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        ) as socket_,
        requests.Session() as session,
    ):

        def say(**frame: Any) -> None:
            socket_.send(json.dumps(frame))

        say(type="hello", authToken=token, capabilities=facts)
        socket_.recv()
        began = time.monotonic()
        say(type="heartbeat", capabilities=facts)
        for _ in range(count):
            while (frame := json.loads(socket_.recv()))["type"] != "offer":
                pass
            job_id = frame["claim"]["jobId"]
            say(type="accept", jobId=job_id)
            session.post(
                f"{base}/jobs/{job_id}/complete",
                headers=headers,
                data={"prompt": "a red potion", "ext": "png"},
                files={"image": (f"{job_id}.png", picture, "image/png")},
                timeout=60,
            ).raise_for_status()
        assert studio.job(ids[-1]).status == "done"
        return time.monotonic() - began


if __name__ == "__main__":
    main()
