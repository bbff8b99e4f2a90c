"""Object removal by the whole service: an offer on a real socket, graph and pictures by HTTP, the upload."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.local_studio import LocalStudio
from tests.fakes.servers import FileServer, ServedFile
from tests.lab.engine import decoded, encoded
from tests.lab.removal_graphs import IMAGE, MASK, pull_push, removal_graph, same
from tests.lab.service import await_online, await_status

pytestmark = pytest.mark.welcoming_studio


def source(file: ServedFile) -> dict[str, Any]:
    """As the live studio's registry has it."""
    return {
        "engine": "onnx",
        "files": [
            {
                "role": "model",
                "url": file.url,
                "filename": "lama_fp32.onnx",
                "sha256": hashlib.sha256(file.content).hexdigest(),
            }
        ],
        "cliDefaults": {"cfgScale": 1.0, "steps": 1, "width": 512, "height": 512},
    }


def test_service_removes_an_object(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """The studio is told of onnx models, and gets its picture back without the object and else to the bit; a
    graph that is none, or another one, is refused for good by name, and the next job goes on.
    """
    picture = Image.new("RGB", (640, 400), (60, 120, 180))
    picture.paste((255, 0, 0), (300, 150, 380, 230))
    mask = Image.new("L", (640, 400))
    mask.paste(255, (298, 148, 382, 232))
    task = {
        "kind": "image",
        "prompt": "",
        "initImageUrl": studio.add_picture(encoded(picture)),
        "maskUrl": studio.add_picture(encoded(mask)),
        "width": 640,
        "height": 400,
    }
    other = removal_graph(tmp_path / "other.onnx", same, inputs=(("img", IMAGE), ("hole", MASK)))
    good = removal_graph(tmp_path / "good.onnx", pull_push)
    with FileServer() as server, ServiceProcess(site, tmp_path / "log") as running:
        graph = good.path.read_bytes()
        contents = {"cut": graph[:-100], "other": other.path.read_bytes(), "good": graph}
        jobs = {
            name: studio.queue_job(
                model=f"lama-{name}", task=task, model_source=source(server.serve(f"/{name}.onnx", content))
            )
            for name, content in contents.items()
        }
        await_online(studio)
        await_status(studio, jobs["good"], "done", "failed")
        assert running.stop() == 0
    told = studio.workers()[0].capabilities
    assert "onnx:*" in told.supported_models
    assert "onnx:*" in told.supported_models_per_kind["image"]
    cut, odd, done = (studio.job(jobs[name]) for name in ("cut", "other", "good"))
    assert (cut.status, cut.attempts) == ("failed", 1)
    assert "lama_fp32.onnx is no ONNX graph, or a damaged one" in (cut.reason or "")
    assert (odd.status, odd.attempts) == ("failed", 1)
    assert "its inputs are hole, img" in (odd.reason or "")
    assert done.status == "done", done.reason
    result = studio.queue.result(done.job_id)
    assert result is not None
    assert (result.ext, result.generation_meta["engine"]) == ("webp", "onnx")
    made = np.asarray(decoded(studio.result(done.job_id)))
    assert (made == (60, 120, 180)).all()
