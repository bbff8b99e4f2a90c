"""doctor: each check by itself, and the command on a real box, running or not."""

from __future__ import annotations

import dataclasses
import email.utils
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from studio_worker import config
from studio_worker.demo import write_configuration
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.doctor import Box, Check, Finding, Result, examine, failure, ok
from studio_worker.doctor.box import (
    check_disk_space,
    check_disk_speed,
    check_driver,
    check_memory,
    check_nodes,
    check_permissions,
)
from studio_worker.doctor.checks import CHECKS
from studio_worker.doctor.network import check_clock, check_dns, check_proxy, check_tls
from studio_worker.doctor.worker import (
    check_last_errors,
    check_models,
    check_registration,
    check_service,
)
from studio_worker.local_studio import LocalStudio
from studio_worker.report.snapshot import (
    EndedJob,
    HealthFacts,
    HeldFacts,
    LaneFacts,
    ProcessFacts,
    RegistrationFacts,
    SessionFacts,
    Snapshot,
)
from studio_worker.report.starts import Starts
from studio_worker.sample_model import WEIGHTS
from studio_worker.studio.http.identity import Identity, IdentityFile
from tests.fakes.driver import build_driver
from tests.fakes.servers import raw_server, refused_url
from tests.fakes.system_files import ALL, CLOSED, bus, machine
from tests.lab.nobody import open_above, told_to_nobody
from tests.lab.service import READY_S

ROOT = Path(__file__).parents[2]
SECRET = "secret-0123456789"


def box_with(tmp_path: Path, toml: str = "", studio: str = "https://studio.example", **more: Any) -> Box:
    """A box with a configuration of its own, looked at from inside this process."""
    folder = tmp_path / "etc"
    (folder / "models.d").mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f'[studio]\napi_base_url = "{studio}"\n'
        f'[state]\ndir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
        f'[models]\nroot = "{tmp_path}/models"\n{toml}'
    )
    (tmp_path / "state").mkdir(mode=0o700, exist_ok=True)
    (tmp_path / "models").mkdir(exist_ok=True)
    return Box(folder, config.load(folder), **more)


def told(result: Result | Finding, level: str, *words: str) -> None:
    assert result.level == level, result
    for word in words:
        assert word in f"{result.text} → {result.cure}", result
    assert result.level == "ok" or result.cure


def doctor(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studio_worker", "doctor", "--config", str(folder), *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- the command ---


def test_doctor_finds_a_running_box_in_order(tmp_path: Path) -> None:
    """With service, studio and models in order no line fails, each check is told once, and it exits 0."""
    with LocalStudio(tmp_path / "s.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio:
        (tmp_path / "work").mkdir()
        folder = write_configuration(studio, tmp_path / "work")
        with ServiceProcess(folder, tmp_path / "log") as running:
            running.await_message("STATUS=ready, connected", READY_S)
            done = doctor(folder, "--json")
            assert running.stop() == 0
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    levels = {finding["check"]: finding["level"] for finding in answer["findings"]}
    assert list(levels) == [check.name for check in CHECKS]
    # What the machine under the tests is like is not judged here.
    told_of_machine = {"memory", "disk space", "disk speed", "last errors"}
    assert {name for name, level in levels.items() if level != "ok"} <= told_of_machine, done.stdout
    assert (done.returncode, answer["ok"]) == (0, True)


def test_doctor_says_what_is_wrong_and_keeps_secrets(tmp_path: Path) -> None:
    """A broken box: exit 1, a cure under every complaint, and no token or password in what is printed."""
    box = box_with(
        tmp_path,
        f'token_dir = "{tmp_path}/tokens"\nproxy = "{refused_url("/").replace("//", f"//user:{SECRET}@")}"\n'
        '[worker]\ndevice = "cpu"\n',
        studio=refused_url(""),
    )
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "download-token.models.example").write_text(SECRET)
    (tmp_path / "tokens" / "download-token.models.example").chmod(0o600)
    IdentityFile(tmp_path / "state" / "identity.json").save(Identity("i", rejected=f"no {SECRET}"))
    done = doctor(box.directory)
    assert done.returncode == 1
    assert "FAILURE  studio: " in done.stdout
    assert "FAILURE  proxy: " in done.stdout
    assert "register --reset" in done.stdout
    lines = done.stdout.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        assert line.startswith(("ok ", "  ")) or after.startswith("         → "), line
    assert SECRET not in done.stdout + done.stderr


def test_doctor_goes_on_with_a_wrong_configuration(tmp_path: Path) -> None:
    """A fault in the configuration is told with file, line and key; the rest is not a traceback."""
    folder = box_with(tmp_path).directory
    (folder / "config.toml").write_text("[worker]\ndevcie = 1\n")
    done = doctor(folder)
    assert done.returncode == 1
    assert "config.toml:2: worker.devcie: unknown key" in done.stdout
    assert "did you mean device?" in done.stdout
    assert "ok       memory: " in done.stdout
    assert done.stdout.count("not checked") == len(CHECKS) - 2
    assert done.stderr == ""


# --- how checks are run ---


def test_check_that_crashes_or_hangs_is_one_line(tmp_path: Path) -> None:
    """A check's own fault or endless wait is a failure with its name; the others are told all the same."""
    ended = threading.Event()

    def crash(_: Box) -> Result:
        raise KeyError("MemAvailable")

    def hang(_: Box) -> Result:
        ended.wait()
        return ok("late")

    checks = (
        Check("crash", crash, needs_config=False),
        Check("hang", hang, limit_s=0.1, needs_config=False),
        Check("fine", lambda _: ok("fine"), needs_config=False),
    )
    findings = examine(Box(tmp_path), checks)
    ended.set()
    assert [(finding.check, finding.level) for finding in findings] == [
        ("crash", "failure"),
        ("hang", "failure"),
        ("fine", "ok"),
    ]
    assert "KeyError" in findings[0].text
    assert "no answer within 0.1 s" in findings[1].text
    assert all(finding.cure for finding in findings[:2])


def test_finding_is_one_line() -> None:
    """A text from elsewhere cannot break the list of lines."""
    (finding,) = examine(Box(Path()), [Check("x", lambda _: failure("a\nb", "c\nd"), needs_config=False)])
    assert (finding.text, finding.cure) == ("a b", "c d")


def test_check_that_may_not_look_is_no_failure_of_the_box() -> None:
    """What is closed to whoever asks is said so, with who may look; nobody is told to report a bug."""

    def closed(_: Box) -> Result:
        raise PermissionError(13, "Permission denied", "/srv/closed")

    (finding,) = examine(Box(Path()), [Check("x", closed, needs_config=False)])
    assert (finding.level, finding.text) == ("warning", "/srv/closed may not be looked at by this user")
    assert "as root" in finding.cure


def test_doctor_by_a_user_who_may_not_look(tmp_path: Path) -> None:
    """Any other user gets warnings that say who may look, never a traceback."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    box = dataclasses.replace(box_with(tmp_path, '[worker]\ndevice = "cpu"\n'), root=Path("/"))
    IdentityFile(tmp_path / "state" / "identity.json").save(Identity("i"))
    (tmp_path / "models").chmod(0o700)
    open_above(tmp_path)

    def ask() -> str:
        names = {"registration", "models", "last errors", "disk speed", "service", "permissions"}
        found = examine(box, [check for check in CHECKS if check.name in names])
        return json.dumps([vars(finding) for finding in found])

    findings = [Finding(**each) for each in json.loads(told_to_nobody(ask))]
    assert not [f for f in findings if "check itself failed" in f.text]
    by_name = {finding.check: finding for finding in findings}
    for name in ("registration", "last errors", "disk speed"):
        assert by_name[name].level == "warning"
        assert "as root or as the service's user" in by_name[name].cure


# --- the box ---


def test_permissions_are_judged_for_the_services_user(tmp_path: Path) -> None:
    """Open folders and files of another user are named with the command that mends them."""
    box = box_with(tmp_path)
    told(check_permissions(box), "ok")
    (tmp_path / "state").chmod(0o755)
    told(check_permissions(box), "failure", "others may look into", "chmod 700")
    if os.geteuid() != 0:
        return
    (tmp_path / "state").chmod(0o700)
    os.chown(tmp_path / "state", 65534, 65534)
    (tmp_path / "state" / "identity.json").touch(mode=0o600)
    told(check_permissions(box), "failure", "identity.json belongs to root", "chown -R nobody:")
    os.chown(tmp_path / "state" / "identity.json", 65534, 65534)
    (box.directory / "config.toml").chmod(0o600)
    told(check_permissions(box), "failure", "user nobody may not read", "chmod a+rX")


def test_gpu_is_judged_by_nodes_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, one of AMD, missing nodes, no library, versions apart: each with its cure; else all is fine."""
    box = box_with(tmp_path, root=tmp_path / "none")
    told(check_nodes(box), "failure", "no NVIDIA GPU", 'device = "cpu"')
    amd = dataclasses.replace(box, root=bus(tmp_path / "amd", ("0x1002", "0x030000")))
    told(check_nodes(amd), "failure", "a GPU of AMD, which is not supported", 'device = "cpu"')
    told(of_driver(amd), "failure", "a GPU of AMD, which is not supported", 'device = "cpu"')
    half = dataclasses.replace(box, root=machine(tmp_path / "half", "nvidiactl", "nvidia0"))
    told(check_nodes(half), "failure", "/dev/nvidia-uvm", "modprobe nvidia-uvm")
    told(of_driver(half), "failure", "libcuda.so.1 is not installed", "install driver 580 or newer")
    whole = dataclasses.replace(box, root=machine(tmp_path / "whole", *ALL, driver=CLOSED))
    told(check_nodes(whole), "ok")
    monkeypatch.setenv("FAKE_COUNT", "1")
    build_driver(whole.root / "usr/local/nvidia/lib64", "550.163.01")
    monkeypatch.setenv("FAKE_INIT", "803")
    told(of_driver(whole), "failure", "535.183.01", "550.163.01", "reboot")
    monkeypatch.setenv("FAKE_INIT", "0")
    told(of_driver(whole), "ok", "kernel module 535.183.01, library 550.163.01, CUDA 13.0")


def of_driver(box: Box) -> Finding:
    (found,) = examine(box, [Check("driver", check_driver)])
    return found


def test_little_memory_is_a_warning(tmp_path: Path) -> None:
    """A machine with hardly any memory left is warned of before a model is loaded through it."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 1000000 kB\n")
    told(check_memory(Box(tmp_path, root=tmp_path)), "warning", "1.0 GB of 8.2 GB")


def test_disk_that_is_too_small_is_a_failure(tmp_path: Path) -> None:
    """Required models that cannot fit are told before hours of download."""
    box = box_with(tmp_path)
    told(check_disk_speed(box), "ok", "/s in ")
    assert not list((tmp_path / "models").iterdir())
    entry = {"role": "model", "url": "https://h.example/m", "filename": "m", "sha256": "0" * 64}
    model = {"id": "m", "engine": "sd-cpp", "files": [{**entry, "approxBytes": 10**15}]}
    (box.directory / "models.d" / "m.json").write_text(json.dumps(model))
    box = dataclasses.replace(box, loaded=config.load(box.directory))
    told(check_disk_space(box), "failure", "need 1000000 GB more", "[models] root")
    told(check_models(box), "warning", "1 of 1 required", "models pull")


# --- the network ---


def test_unknown_name_is_told(tmp_path: Path) -> None:
    """A studio whose name nobody knows is told by its name."""
    told(check_dns(box_with(tmp_path, studio="https://studio.invalid")), "failure", "studio.invalid")


def test_proxy_of_this_shell_is_not_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy from the shell's environment is shown without password, and that the service lacks it."""
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    with raw_server(b"HTTP/1.1 200 OK\r\n\r\n") as url:
        monkeypatch.setenv("HTTPS_PROXY", url.replace("//", f"//user:{SECRET}@"))
        result = check_proxy(box_with(tmp_path))
    told(result, "warning", url, "systemctl edit")
    assert SECRET not in result.text


@pytest.mark.parametrize(("off_s", "level"), [(2, "ok"), (-90, "warning"), (3600, "failure")])
def test_clock_is_compared_with_the_studios(tmp_path: Path, off_s: float, level: str) -> None:
    """A clock that is off by half a minute is a warning, by five a failure, with the cure."""
    date = email.utils.formatdate(time.time() - off_s, usegmt=True)
    with raw_server(f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()) as url:
        told(check_clock(box_with(tmp_path, studio=url)), level, "" if level == "ok" else "set-ntp")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of its own authority for 127.0.0.1, valid for three days, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=test"
    )
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "cert"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def secure_studio(certificate: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_certificate_is_checked_as_the_service_does(
    tmp_path: Path, secure_studio: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown authority is a failure, a named one is trusted, and an early end is a warning."""
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    box = box_with(tmp_path, studio=secure_studio)
    told(check_tls(box), "failure", "not trusted", "REQUESTS_CA_BUNDLE")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "cert"))
    told(check_tls(box), "warning", "TLSv1.3, the certificate ends on")


# --- the worker ---


@pytest.mark.parametrize(
    ("identity", "level", "words"),
    [
        (None, "warning", "not asked"),
        (Identity("i", secret="s" * 20, request_id="r1"), "warning", "waiting for approval"),
        (Identity("i", rejected="unknown machine"), "failure", "unknown machine"),
        (Identity("i", worker_id="w1", auth_token="t" * 20), "ok", "approved as worker w1"),
    ],
)
def test_registration_is_told(tmp_path: Path, identity: Identity | None, level: str, words: str) -> None:
    """Not asked, waiting, rejected, approved: each with what to do; looking asks for nothing."""
    path = tmp_path / "state" / "identity.json"
    box = box_with(tmp_path)
    if identity is not None:
        IdentityFile(path).save(identity)
    told(check_registration(box), level, words)
    assert path.exists() == (identity is not None)


def test_registration_of_another_machine_is_told(tmp_path: Path) -> None:
    """A disk from another machine is told before its first start here, with its cure."""
    root = tmp_path / "root"
    (root / "run/systemd/system").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "etc/machine-id").write_text("a" * 32)
    box = box_with(tmp_path, root=root)
    file = IdentityFile(tmp_path / "state" / "identity.json")
    file.save(Identity("i", worker_id="w1", auth_token="t" * 20, machine="b" * 32))
    result = check_registration(box)
    told(result, "warning", "approved as worker w1, on another machine")
    assert "studio-worker register --adopt" in result.cure


@pytest.mark.parametrize(
    ("snapshot", "level", "cure"),
    [
        (None, "warning", "systemctl start studio-worker"),
        (Snapshot(phase="ready", paused=True), "warning", "resume"),
        (Snapshot(phase="ready", hangs="no step ends"), "failure", "systemctl restart"),
        (Snapshot(session=SessionFacts(state="reconnecting")), "warning", "studio"),
        (Snapshot(status="ready; restart to apply: worker.device"), "warning", "systemctl restart"),
        (Snapshot(status="ready; configuration not reloaded: x"), "warning", "systemctl reload"),
        (Snapshot(status="ready; the last offer was refused: x"), "warning", "the reason tells"),
        (Snapshot(health=HealthFacts(failures=3)), "warning", "OUTCOME=failed"),
        (Snapshot(health=HealthFacts(held=(HeldFacts(model="m"),))), "warning", "goes on by itself"),
        (Snapshot(status="ready, connected", process=ProcessFacts(uptime_s=90)), "ok", "1 min 30 s"),
    ],
)
def test_service_is_told(tmp_path: Path, snapshot: Snapshot | None, level: str, cure: str) -> None:
    """Not running, paused, not connected, to be restarted: each with the command that helps."""
    told(check_service(box_with(tmp_path, service=snapshot)), level, cure)


def test_last_errors_are_told(tmp_path: Path) -> None:
    """Crashes, jobs given up, pictures set aside and failed jobs are remembered for the operator."""
    ended = EndedJob(job_id="j9", model="m", outcome="failed", reason="disk full")
    box = box_with(tmp_path, service=Snapshot(last_jobs=(ended,)))
    told(check_last_errors(box_with(tmp_path)), "ok", "none")
    state = tmp_path / "state"
    Starts(state).__enter__()  # and never left, as by kill -9
    with Starts(state):
        pass
    (state / "spool").mkdir()
    (state / "spool" / "crashes.json").write_text(json.dumps({"j1": ["a", "b"], "j2": ["c"]}))
    (state / "outbox" / "unreadable").mkdir(parents=True)
    (state / "outbox" / "unreadable" / "x.json").touch()
    result = check_last_errors(box)
    told(result, "warning", "1 crash(es)", "job j1 is refused", "1 picture(s)", "job j9 failed: disk full")
    assert "j2" not in result.text


@pytest.mark.parametrize(
    ("state", "level", "words"),
    [
        ("approved", "ok", "approved as worker w1, by systemd credentials"),
        ("ended", "failure", "give it an approved worker's id and token as studio-worker.worker-id"),
    ],
)
def test_worker_with_systemd_credentials_is_told_what_helps(
    tmp_path: Path, state: Any, level: str, words: str
) -> None:
    """A worker that registers nowhere is not told to: its id and token are what has to be renewed."""
    given = RegistrationFacts(state=state, worker_id="w1", is_given=True)
    box = box_with(tmp_path, service=Snapshot(lanes=(LaneFacts(lane=1, registration=given),)))
    told(check_registration(box), level, words)
    assert "--reset" not in check_registration(box).cure


def test_lane_that_ended_is_an_error_to_be_told(tmp_path: Path) -> None:
    """Why a lane ended is among the last errors, also where nothing else is."""
    gone = RegistrationFacts(state="ended", detail="deleted at the studio")
    box = box_with(
        tmp_path, service=Snapshot(lanes=(LaneFacts(lane=1), LaneFacts(lane=2, registration=gone)))
    )
    told(check_last_errors(box), "warning", "lane 2 ended: deleted at the studio")
