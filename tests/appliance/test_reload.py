"""A reload: SIGHUP to the real process, and what is decided when the configuration is read again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from studio_worker import config
from studio_worker.appliance.provisioning import LaterProvision
from studio_worker.appliance.reload import read_again
from studio_worker.config.current import Current
from studio_worker.config.declaration import Declared
from studio_worker.config.downloads import policy_from
from studio_worker.config.settings import DECLARED
from studio_worker.demo import MODEL_ID, sample_source
from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import ReconnectExhausted
from studio_worker.local_studio import LocalStudio
from studio_worker.models import ModelFile, RequiredModel
from studio_worker.store import Store
from studio_worker.store.terms import Terms, fixed
from studio_worker.transfer.policy import Policy
from tests.fakes.certificates import certificate
from tests.fakes.servers import FileServer
from tests.lab.service import READY_S, await_status, override, queue_synthetic, reload, require

pytestmark = pytest.mark.welcoming_studio

ROOT = Path(__file__).parents[2]


def logged(running: ServiceProcess, message: str) -> list[dict[str, Any]]:
    return [line for line in running.log_lines() if line["message"] == message]


# --- the running service ---


def test_reload_applies_what_can_change_live(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """SIGHUP: systemd hears RELOADING with the time, then READY; the next offer meets the new values."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected", READY_S)
        override(site, "[worker]\nstep_timeout_s = 77\n[models]\non_demand = false\n")
        before_us = time.monotonic_ns() // 1000
        heard = reload(running)
        assert heard[:1] == ["RELOADING=1"]
        assert before_us <= int(heard[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        assert heard[heard.index("READY=1") + 1].startswith("STATUS=ready, connected")
        job_id = studio.queue_job(
            model=MODEL_ID, task={"kind": "image", "prompt": "a castle"}, model_source=sample_source(studio)
        )
        studio.wait_for(lambda: bool(logged(running, "job rejected")), READY_S)
        assert running.stop() == 0
    assert [line["applied"] for line in logged(running, "configuration reloaded")] == [
        ["worker.step_timeout_s", "models.on_demand"]
    ]
    assert logged(running, "job rejected")[0]["job_id"] == job_id


def test_reload_counts_failed_connections_anew(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """[studio] reconnect_attempts of a reload holds from the next failed connection on."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected", READY_S)
        override(site, "[studio]\nreconnect_attempts = 1\n")
        reload(running)
        studio.stop()
        assert running.wait(READY_S) == ReconnectExhausted.exit_status
    assert [line["applied"] for line in logged(running, "configuration reloaded")] == [
        ["studio.reconnect_attempts"]
    ]


def test_reload_with_a_fault_leaves_everything_as_it_was(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A fault is told with file, line, key and cure in log and STATUS, jobs go on; mended, it is gone."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected", READY_S)
        override(site, '[log]\nlevel = "error"\n[worker]\nstep_timeout_s = -1\n')
        heard = reload(running)
        assert any("STATUS=ready, connected; configuration not reloaded: " in line for line in heard)
        await_status(studio, queue_synthetic(studio), "done")
        override(site, "")
        assert heard[-1] != reload(running)[-1]
        running.await_message("STATUS=ready, connected", READY_S)
        assert running.messages[-1] == "STATUS=ready, connected"
        assert running.stop() == 0
    error = logged(running, "configuration not reloaded")[0]["error"]
    assert re.search(r"50-test\.toml:4: worker\.step_timeout_s: .*; change it or leave it out", error)
    assert logged(running, "job done"), "the level of the faulty files was applied"


def test_reload_names_what_needs_a_restart(site: Path, studio: LocalStudio, tmp_path: Path) -> None:
    """What cannot change live is named in STATUS and log until it is restarted, or taken back."""
    with ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("STATUS=ready, connected", READY_S)
        override(site, f'[worker]\ndevice = "auto"\n[models]\nroot = "{tmp_path}/elsewhere"\n')
        assert reload(running)[-1].endswith("; restart to apply: worker.device, models.root")
        assert reload(running)[-1].endswith("; restart to apply: worker.device, models.root")
        await_status(studio, queue_synthetic(studio), "done")
        override(site, "")
        assert "restart" not in reload(running)[-1]
        assert running.stop() == 0
    changes = logged(running, "configuration reloaded")
    assert changes[0]["restart_to_apply"] == ["worker.device", "models.root"]


def test_reload_brings_a_required_model_beside_the_jobs(
    site: Path, studio: LocalStudio, tmp_path: Path
) -> None:
    """A model added to models.d is fetched while jobs go on, STATUS shows it; a stop does not wait for it."""
    with FileServer() as server, ServiceProcess(site, tmp_path / "log") as running:
        running.await_message("READY=1", READY_S)
        first = server.serve("/first.safetensors", b"first" * 100_000, hold_after=200_000)
        require(site, "first", first)
        reload(running)
        running.await_message("STATUS=ready, connected; downloading first: ", READY_S)
        await_status(studio, queue_synthetic(studio), "done")
        first.release()
        studio.wait_for(lambda: bool(logged(running, "required models verified")[1:]), READY_S)
        stalled = server.serve("/stalled.safetensors", b"stalled" * 1000, hold_after=100)
        require(site, "stalled", stalled)
        reload(running)
        assert stalled.held.wait(READY_S)
        assert running.stop(20) == 0
        stalled.release()
    models = tmp_path / "work" / "models"
    assert (models / hashlib.sha256(first.content).hexdigest() / "first.safetensors").exists()


def test_reload_before_ready_waits_for_it(site: Path, tmp_path: Path) -> None:
    """SIGHUP while models come neither ends the service nor lets systemd take it for ready too early."""
    with FileServer() as server:
        held = server.serve("/held.safetensors", b"held" * 1000, hold_after=100)
        require(site, "held", held)
        with ServiceProcess(site, tmp_path / "log") as running:
            assert held.held.wait(READY_S)
            override(site, "[worker]\nstep_timeout_s = 77\n")
            running.signal(signal.SIGHUP)
            deadline = time.monotonic() + READY_S
            while not logged(running, "reload waits until the service is ready"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            held.release()
            deadline = time.monotonic() + READY_S
            running.await_message("RELOADING=1", READY_S)
            reloading = running.messages.index("RELOADING=1")
            assert running.messages.index("READY=1") < reloading
            while "READY=1" not in running.messages[reloading:]:  # the second may have come by now
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert running.stop() == 0
    assert logged(running, "configuration reloaded")[0]["applied"] == ["worker.step_timeout_s"]


# --- what is decided ---


def write(directory: Path, toml: str) -> None:
    (directory / "models.d").mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(
        f'[state]\ndir = "{directory}/state"\n[models]\nroot = "{directory}/models"\n{toml}'
    )


def marked_in_the_shipped_configuration() -> dict[str, bool]:
    """Every key of config.toml, and whether [restart] stands above it."""
    section, comment, marked = "", "", {}
    for line in (ROOT / "packaging" / "config.toml").read_text().splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section, comment = header[1], ""
        elif key := re.match(r"#?(\w+) = ", line):
            marked[f"{section}.{key[1]}"] = comment.startswith("# [restart] ")
            comment = ""
        else:
            comment += line
    return marked


OTHERS = {
    "studio.api_base_url": "https://other.example",
    "worker.device": "cpu",
    "worker.lanes": 2,
    "log.level": "debug",
    "log.format": "json",
    "models.ca_bundle": requests.certs.where(),
}
"""Values that are not the defaults, where one cannot be told from the default or the example."""


def other_value(setting: Declared, folder: Path) -> Any:
    if setting.key in OTHERS:
        return OTHERS[setting.key]
    if isinstance(setting.default, bool):
        return not setting.default
    if isinstance(setting.default, int | float):
        return setting.default / 2 or 7
    if isinstance(setting.default, Path) or str(setting.example).startswith("/"):
        (folder / setting.name).mkdir()
        return str(folder / setting.name)
    return setting.example


def test_reload_does_with_every_key_as_the_shipped_configuration_says(tmp_path: Path) -> None:
    """A key marked [restart] in config.toml stays as it was and is named so; every other one is applied."""
    (tmp_path / "config.toml").write_text("")
    before = config.load(tmp_path)
    others = {key: other_value(each, tmp_path) for key, each in DECLARED.items()}
    (tmp_path / "config.toml").write_text(
        "".join(
            f"{key} = {{ {', '.join(f'{json.dumps(a)} = {json.dumps(b)}' for a, b in value.items())} }}\n"
            if isinstance(value, dict)
            else f"{key} = {json.dumps(value)}\n"
            for key, value in others.items()
        )
    )
    after = config.load(tmp_path)
    assert [
        key for key, each in DECLARED.items() if each.of(before.settings) == each.of(after.settings)
    ] == []
    reloaded = read_again(tmp_path, Current(before, Policy()))
    marked = marked_in_the_shipped_configuration()
    assert reloaded.applied == tuple(key for key, needs_restart in marked.items() if not needs_restart)
    assert reloaded.needs_restart == tuple(key for key, needs_restart in marked.items() if needs_restart)
    for key, setting in DECLARED.items():
        holds = before if marked[key] else after
        assert setting.of(reloaded.config.settings) == setting.of(holds.settings), key


def test_required_models_change_at_a_reload(tmp_path: Path) -> None:
    """models.d counts as one key that changes live, and its new set holds."""
    write(tmp_path, "")
    running = config.load(tmp_path)
    assert read_again(tmp_path, Current(running, Policy())).applied == ()
    entry = f'id = "a"\nengine = "sd-cpp"\n[[files]]\nrole = "model"\nfilename = "a"\nsha256 = "{"0" * 64}"\n'
    (tmp_path / "models.d" / "a.toml").write_text(f'{entry}url = "https://models.example/a"\n')
    reloaded = read_again(tmp_path, Current(running, Policy()))
    assert reloaded.applied == ("models.d",)
    assert [model.id for model in reloaded.config.required] == ["a"]


def test_token_replaced_in_its_file_is_used_after_a_reload(tmp_path: Path) -> None:
    """A token's file holds no key of the configuration; its new content counts all the same."""
    write(tmp_path, f'token_dir = "{tmp_path}/tokens"\n')
    (tmp_path / "tokens").mkdir()
    token = tmp_path / "tokens" / "download-token.models.example"
    token.touch(mode=0o600)
    token.write_text("first-token")
    running = config.load(tmp_path)
    policy = policy_from(running.settings)
    token.write_text("second-token")
    assert read_again(tmp_path, Current(running, policy)).policy.tokens == {"models.example": "second-token"}


def test_unchanged_limits_are_shared_with_downloads_under_way(tmp_path: Path) -> None:
    """A reload does not let old and new downloads each take the whole limit, or all connections."""
    write(tmp_path, "download_limit_mb_s = 5\n")
    running = config.load(tmp_path)
    policy = policy_from(running.settings)
    assert read_again(tmp_path, Current(running, policy)).policy.limit is policy.limit
    assert read_again(tmp_path, Current(running, policy)).policy.connections is policy.connections
    write(tmp_path, "download_limit_mb_s = 6\nmax_connections = 7\n")
    changed = read_again(tmp_path, Current(running, policy)).policy
    assert changed.limit is not None
    assert (changed.limit.bytes_per_s, changed.connections.most) == (6e6, 7)


def test_downloads_after_a_reload_are_told_of_as_before(tmp_path: Path) -> None:
    """Who hears of ends and waits of downloads, the metrics and the log, hears of them after a reload too."""
    write(tmp_path, "download_limit_mb_s = 5\n")
    running = config.load(tmp_path)
    told: list[tuple[object, ...]] = []
    policy = dataclasses.replace(
        policy_from(running.settings),
        on_end=lambda *facts: told.append(facts),
        on_wait=lambda *facts: told.append(facts),
    )
    reloaded = read_again(tmp_path, Current(running, policy)).policy
    reloaded.on_end(True, 3)
    reloaded.on_wait("the host allows no more", 2.0)
    assert told == [(True, 3), ("the host allows no more", 2.0)]


# --- required models that come later ---


def required(
    server: FileServer, path: str, content: bytes, sha256: str | None = None, **faults: Any
) -> RequiredModel:
    served = server.serve(path, content, **faults)
    file = ModelFile(
        role="model",
        url=served.url,
        filename=path[1:],
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
    )
    return RequiredModel(id=path[1:], engine="sd-cpp", files=(file,))


class Notes:
    """What the operator is shown, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.changed = threading.Condition()

    def __call__(self, text: str) -> None:
        with self.changed:
            self.lines.append(text)
            self.changed.notify_all()

    def wait_for(self, wanted: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: wanted in (self.lines or [""])[-1], READY_S), self.lines

    def wait_for_nothing(self) -> None:
        """Until the last line is taken away."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.lines[-1:] == [""], READY_S), self.lines


def test_model_that_comes_later_is_tried_again_until_it_is_there(tmp_path: Path) -> None:
    """A mirror that is down at the reload is asked again, and the note goes when the model is there."""
    notes = Notes()
    with FileServer() as server:
        model = required(server, "/late", b"late" * 100, answers=[(503, {})] * 2)
        store = Store(tmp_path, fixed(Policy(delays_s=())))
        later = LaterProvision(store, notes, delays_s=(0.01,))
        later.begin((model,))
        notes.wait_for("required models missing: ")
        notes.wait_for_nothing()
    assert store.is_verified(model.files[0])


def test_model_that_comes_later_outlasts_this_boxs_own_troubles(tmp_path: Path) -> None:
    """A certificate that is not believed ends no waiting: once its authority is known, the model comes."""
    notes = Notes()
    made = certificate(tmp_path)
    with FileServer() as server:
        server.use_tls(made.shown, made.key)
        model = required(server, "/late", b"late" * 100)
        terms = [Terms(Policy(delays_s=()))]
        store = Store(tmp_path / "models", lambda: terms[-1])
        later = LaterProvision(store, notes, delays_s=(0.01,))
        later.begin((model,))
        notes.wait_for("SSLCertVerificationError")
        terms.append(Terms(Policy(delays_s=(), ca_bundle=made.authority), required=model.files))
        notes.wait_for_nothing()
        assert store.is_verified(model.files[0])


def test_model_that_comes_later_with_a_wrong_hash_is_not_fetched_again(tmp_path: Path) -> None:
    """What would end the same is not tried again: it stays in the note for the operator."""
    notes = Notes()
    with FileServer() as server:
        model = required(server, "/wrong", b"evil", sha256="0" * 64)
        later = LaterProvision(Store(tmp_path, fixed(Policy(delays_s=()))), notes, delays_s=(0.01,))
        later.begin((model,))
        notes.wait_for("sha256 mismatch")
        for thread in threading.enumerate():
            if thread.name == "later-provision":
                thread.join(READY_S)
                assert not thread.is_alive()
