"""What an operator types at a running box: status, pause, doctor, the journal by job."""

from __future__ import annotations

import json
import urllib.request

from tests.acceptance.box import Box


def test_operator_sees_and_steers_the_service(box: Box) -> None:
    """status, pause and resume talk to the service; a job is found in the journal by its id."""
    box.start()
    job_id = box.queue_synthetic()
    box.await_job(job_id, "done")
    shown = json.loads(box.machine.run("studio-worker", "status", "--json").stdout)
    assert [job["job_id"] for job in shown["last_jobs"]] == [job_id]
    box.machine.run("studio-worker", "pause")
    assert json.loads(box.machine.run("studio-worker", "status", "--json").stdout)["paused"]
    box.machine.run("studio-worker", "resume")
    lines = box.machine.run("journalctl", f"JOB_ID={job_id}", "--output=cat", "--no-pager").stdout
    messages = [json.loads(line)["message"] for line in lines.splitlines()]
    assert "job accepted" in messages
    assert "job done" in messages
    # What the recipes among the package's examples begin with.
    for selection in ("OUTCOME=done", "OP=job"):
        found = box.machine.run("journalctl", selection, "--output=cat", "--no-pager").stdout
        assert job_id in {json.loads(line).get("job_id") for line in found.splitlines()}, selection
    nobody = box.machine.run("studio-worker", "status", check=False, user="nobody")
    assert nobody.returncode != 0
    assert "sudo" in nobody.stderr


def test_doctor_finds_a_running_box_in_order(box: Box) -> None:
    """doctor as root has no failure to tell of a box that works."""
    box.start()
    box.await_online()
    done = box.machine.run("studio-worker", "doctor", "--json", check=False, limit_s=120.0)
    findings = json.loads(done.stdout)["findings"]
    assert len(findings) > 10
    assert [finding for finding in findings if finding["level"] == "failure"] == []
    assert done.returncode == 0


def test_metrics_come_by_port_and_by_file(box: Box) -> None:
    """Prometheus asks on loopback; node_exporter finds the file in its folder, let in by a drop-in.

    Without the drop-in the start fails, and names it.
    """
    folder = "/srv/textfiles"
    box.machine.shell(f"mkdir {folder}; chgrp studio-worker {folder}; chmod 2775 {folder}")
    box.configure(metrics={"listen": "127.0.0.1:9464", "textfile": f"{folder}/studio-worker.prom"})
    assert not box.start(check=False)
    assert box.show("ExecMainStatus") == "78"
    assert f"ReadWritePaths={folder}" in box.tail()
    box.drop_in("[Service]", f"ReadWritePaths={folder}")
    box.start()
    box.await_online()
    with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=10) as answer:
        asked = answer.read().decode()
    assert "\nstudio_worker_ready 1.0\n" in asked
    written = box.machine.path(f"{folder}/studio-worker.prom")
    box.machine.await_that("the file", lambda: "\nstudio_worker_ready 1.0\n" in written.read_text())
    assert written.stat().st_mode & 0o044 == 0o044  # node_exporter is another user
    box.stop()
    assert not written.exists()
