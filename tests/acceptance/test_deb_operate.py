"""What an operator types at a running box: status, pause, doctor, the journal by job."""

from __future__ import annotations

import json

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
    nobody = box.machine.run("runuser", "-u", "nobody", "--", "studio-worker", "status", check=False)
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
