"""The commands, as an operator types them: what they print, how they end, and what they never do."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from studio_worker import __version__, cli
from studio_worker.config import settings
from studio_worker.report.control import ControlServer
from studio_worker.report.snapshot import JobFacts, ResidentModel, Snapshot
from studio_worker.studio.http.identity import IdentityFile

ROOT = Path(__file__).parents[2]
WEIGHTS = b"weights " * 4096
HEAVY = {"torch", "diffusers", "transformers", "numpy"}


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(settings.ENV_PREFIX)}
    return {"COLUMNS": "200"} | kept


def start(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "studio_worker", *map(str, args)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    with start(*args) as process:
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)


def mistake(*args: str | Path, status: int = 78) -> str:
    """What a command says of an operator's mistake, by default in the configuration: one line."""
    done = command(*args)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid configuration, without required models, whose own folders lie below ``tmp_path``."""
    directory = tmp_path / "etc"
    (directory / "models.d").mkdir(parents=True)
    (directory / "config.toml").write_text(
        f'[models]\nroot = "{tmp_path}/models"\n\n[state]\ndir = "{tmp_path}/state"\n'
    )
    return directory


@pytest.fixture
def required(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The same with one required model, whose file a mirror on loopback serves; gives the file's place."""
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "a.safetensors").write_bytes(WEIGHTS)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror"))
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        thread = threading.Thread(target=mirror.serve_forever)
        thread.start()
        entry = {
            "id": "sample",
            "engine": "sd-cpp",
            "files": [
                {
                    "role": "model",
                    "url": f"http://127.0.0.1:{mirror.server_port}/a.safetensors",
                    "filename": "a.safetensors",
                    "approxBytes": len(WEIGHTS),
                    "sha256": sha256,
                }
            ],
        }
        (folder / "models.d" / "sample.json").write_text(json.dumps(entry))
        yield tmp_path / "models" / sha256 / "a.safetensors"
        mirror.shutdown()
        thread.join()


# --- help ---


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, below in getattr(group, "commands", {}).items():
        yield (*path, name), below
        yield from commands(below, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_explains_every_command(path: tuple[str, ...]) -> None:
    """--help of every command says in a sentence what it does and explains each of its options."""
    done = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "200"}, terminal_width=200)
    assert done.exit_code == 0
    assert COMMANDS[path].help.splitlines()[0] in done.output
    for option in COMMANDS[path].params:
        assert getattr(option, "help", None), f"{option.name} is not explained"
        is_argument = option.param_type_name == "argument"
        assert (option.metavar if is_argument else option.opts[0]) in done.output


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != ("models",)], ids=" ".join)
def test_no_command_leaves_a_file_to_the_librarys_words(path: tuple[str, ...]) -> None:
    """A folder or file that may not be read is told in one line, as everything else, by whoever opens it."""
    hints = typing.get_type_hints(inspect.unwrap(COMMANDS[path].callback), include_extras=True)
    parts = {name: typing.get_args(hint) for name, hint in hints.items()}
    paths = {name: said for name, said in parts.items() if said and said[0] in {Path, Path | None}}
    assert [name for name, (_, option) in paths.items() if option.readable] == []


def test_help_is_shown_where_no_command_is_given() -> None:
    """studio-worker alone lists the commands."""
    done = command()
    assert "Traceback" not in done.stderr
    for name in ("run", "check-config", "models", "register", "local-studio", "demo"):
        assert name in done.stdout + done.stderr


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_commands_that_read_the_configuration_take_its_folder(path: tuple[str, ...]) -> None:
    """Every command that works with the service's configuration takes --config DIR."""
    options = {name for parameter in COMMANDS[path].params for name in parameter.opts}
    without = {
        ("models",),
        ("demo",),
        ("local-studio",),
        ("local-studio", "carry"),
        ("submit",),
        ("version",),
        ("gpu-check",),
    }
    assert ("--config" in options) is (path not in without)


@pytest.mark.parametrize("args", [("run", "--confg", "x"), ("rnu",), ("models", "list", "extra")])
def test_mistyped_command_ends_with_usage(args: tuple[str, ...]) -> None:
    """A mistyped command or option ends with status 2 and how to get help."""
    done = command(*args)
    assert done.returncode == 2
    assert "--help' for help" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_package_version() -> None:
    """version prints the version that the package is built with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert command("version").stdout == f"studio-worker {project['version']}\n"


# --- light ---


@pytest.mark.parametrize(
    "arguments", [[], ["check-config"], ["models", "list"], ["models", "verify"], ["register"]], ids=" ".join
)
def test_commands_load_no_torch(folder: Path, arguments: list[str]) -> None:
    """Neither the command line itself nor a command that only looks loads torch or its friends."""
    if arguments:
        arguments = [*arguments, "--config", str(folder)]
    script = """
import sys
from studio_worker.cli import main
if sys.argv[1:]:
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "studio_worker" in loaded
    assert not loaded & HEAVY


# --- mistakes ---


@pytest.mark.parametrize(
    "args", [("check-config",), ("register",), ("models", "list"), ("models", "pull"), ("models", "verify")]
)
def test_missing_configuration_is_one_line(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Without a configuration every command ends with status 78 and names the file it looked for."""
    assert f"{tmp_path}/none/config.toml: no such file" in mistake(*args, "--config", tmp_path / "none")


def test_run_without_configuration_ends_with_78(tmp_path: Path) -> None:
    """The service ends with status 78 and one line that journald can read."""
    done = command("run", "--config", tmp_path / "none")
    assert done.returncode == 78
    line = json.loads(done.stderr)
    assert (line["level"], line["exit_status"]) == ("CRITICAL", 78)
    assert "config.toml: no such file" in line["error"]


def test_run_with_an_unusable_device_ends_with_69(folder: Path) -> None:
    """The service ends with status 69, and no traceback, where its device cannot be used."""
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "device.toml").write_text('[worker]\ndevice = "cuda:99"\n')
    done = command("run", "--config", folder)
    assert done.returncode == 69
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["level"], last["exit_status"]) == ("CRITICAL", 69)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("occupied", "args"),
    [("models/ledger.json", ("models", "list")), ("state/identity.json", ("register",))],
)
def test_file_that_cannot_be_used_is_one_line(
    folder: Path, tmp_path: Path, occupied: str, args: tuple[str, ...]
) -> None:
    """A fault of the disk (here a folder where a file should be) is one line that names the file."""
    (tmp_path / occupied).mkdir(parents=True)
    done = command(*args, "--config", folder)
    assert done.returncode in {os.EX_IOERR, os.EX_CONFIG}
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"studio-worker: {tmp_path / occupied}: ")
    assert "Is a directory" in done.stderr


def test_local_studio_names_a_token_file_that_is_missing(tmp_path: Path) -> None:
    """A token file that is not there is one line that names it."""
    assert f"{tmp_path}/token: " in mistake("local-studio", "--token-file", tmp_path / "token")


@pytest.mark.parametrize(("mode", "folder_mode", "is_refused"), [(0o644, 0o755, True), (0o644, 0o700, False)])
def test_local_studio_refuses_a_token_that_others_can_read(
    folder: Path, mode: int, folder_mode: int, is_refused: bool
) -> None:
    """A token file that other users get at is refused with the cure; a private folder keeps it as well."""
    with tempfile.TemporaryDirectory() as private:
        path = Path(private) / "inner" / "token"
        path.parent.mkdir()
        path.write_text("short")  # so that it never starts
        path.chmod(mode)
        Path(private).chmod(folder_mode)
        said = mistake("local-studio", "--data", folder / "data", "--token-file", path)
    assert ("others can read it; chmod 600" in said) == is_refused
    assert ("fewer than" in said) != is_refused


@pytest.mark.parametrize("content", [b"short\n", b"", b"\xff\xfe" * 20])
def test_local_studio_refuses_a_token_that_is_none(tmp_path: Path, content: bytes) -> None:
    """A token that is too short to be one, or no text, is refused with the way to make one."""
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    said = mistake("local-studio", "--data", tmp_path / "data", "--token-file", tmp_path / "token")
    assert "openssl rand -hex 32" in said


def test_local_studio_needs_a_token_beyond_loopback(tmp_path: Path) -> None:
    """A studio that listens to the network without a token does not start."""
    assert "--token-file" in mistake("local-studio", "--host", "0.0.0.0", "--data", tmp_path / "data")


def test_local_studio_prints_its_address_and_stops_when_asked(tmp_path: Path) -> None:
    """The local studio says where it listens once it does, and a SIGTERM ends it with status 0."""
    with start("local-studio", "--port", "0", "--data", tmp_path / "data") as studio:
        assert studio.stdout is not None
        said, more = studio.stdout.readline(), studio.stdout.readline()
        studio.send_signal(signal.SIGTERM)
        _, err = studio.communicate(timeout=60)
    assert "Models" in more
    assert str(tmp_path / "data" / "models") in more
    assert err == ""  # no line of the log in a person's way
    assert said.startswith("local studio: http://127.0.0.1:"), err
    assert not said.strip().endswith(":0")
    assert studio.returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--behind-proxy", "127.0.0.1"],
            r"at its proxy's address, for people and workers; on this machine ",
        ),
        (["--plain-http"], r"at port \d+ of this machine's addresses; on this machine "),
    ],
    ids=["proxy", "plain"],
)
def test_local_studio_beyond_loopback_says_whose_its_address_is(
    tmp_path: Path, options: list[str], said: str
) -> None:
    """Where others reach it by another address, this machine's own is not told as theirs."""
    token = tmp_path / "token"
    token.write_text("a token of sufficient length")
    token.chmod(0o600)
    door = ("--host", "0.0.0.0", "--port", "0", "--token-file", token, *options)
    with start("local-studio", "--data", tmp_path / "data", *door, "--drain", "0") as studio:
        assert studio.stdout is not None
        line = studio.stdout.readline()
        studio.send_signal(signal.SIGTERM)
        studio.communicate(timeout=60)
    assert re.fullmatch(rf"local studio: {said}http://127\.0\.0\.1:\d+\n", line)


# --- register ---


def test_register_shows_who_the_worker_is(folder: Path, tmp_path: Path) -> None:
    """register says where the worker stands with the studio, without its secrets."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "identity.json").write_text(
        json.dumps({"install_id": "i", "worker_id": "w-7", "auth_token": "very-secret-token"})
    )
    done = command("register", "--config", folder)
    assert done.stdout == "approved as worker w-7\n"
    assert "very-secret-token" not in done.stdout + done.stderr


def test_register_reset_forgets_the_identity(folder: Path, tmp_path: Path) -> None:
    """register --reset forgets the worker's identity; what comes next is a new worker."""
    (tmp_path / "state").mkdir()
    before = IdentityFile(tmp_path / "state" / "identity.json").load()
    assert before.install_id in command("register", "--config", folder).stdout
    assert command("register", "--reset", "--config", folder).returncode == 0
    assert before.install_id not in command("register", "--config", folder).stdout


def test_commands_that_look_make_nothing(folder: Path, tmp_path: Path) -> None:
    """register, check-config and doctor make neither folders nor an identity, and say that nobody asked."""
    before = sorted(tmp_path.rglob("*"))
    assert "the service asks" in command("register", "--config", folder).stdout
    assert command("check-config", "--config", folder).returncode == 0
    found = command("doctor", "--json", "--config", folder).stdout
    (registration,) = (each for each in json.loads(found)["findings"] if each["check"] == "registration")
    assert "start the service" in registration["cure"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args", [("--version",), ("version",)])
def test_version_is_printed_however_it_is_asked_for(args: tuple[str, ...]) -> None:
    """``--version`` is understood as well as ``version``."""
    done = command(*args)
    assert (done.returncode, done.stdout) == (0, f"studio-worker {__version__}\n")


def test_prune_with_nothing_to_remove_says_so(folder: Path) -> None:
    """prune that frees nothing does not speak of 0 bytes."""
    said = command("models", "prune", "--config", folder).stdout
    assert said.startswith("nothing to remove")
    assert "freed" not in said


def test_status_without_a_service_fits_a_folder_of_ones_own(folder: Path) -> None:
    """With a configuration of one's own, no unit of the package is said to serve it."""
    said = command("status", "--config", folder).stderr
    assert f"start it: studio-worker run --config {folder}" in said
    assert "systemctl" not in said


def test_register_on_a_box_of_instances_wants_to_know_which(folder: Path, tmp_path: Path) -> None:
    """Where each GPU has a service of its own, no identity is shown or forgotten that is none of theirs."""
    (tmp_path / "state" / "instance-1").mkdir(parents=True)
    (tmp_path / "state" / "instance-1" / "identity.json").write_text("{}")
    assert "say which: --instance N, of 1" in mistake("register", "--reset", "--config", folder)
    assert not (tmp_path / "state" / "identity.json").exists()


def test_register_reset_mends_a_damaged_identity(folder: Path, tmp_path: Path) -> None:
    """A damaged identity is one line with its cure, and the cure works."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "identity.json").write_text("{")
    assert "register --reset" in mistake("register", "--config", folder)
    assert command("register", "--reset", "--config", folder).returncode == 0
    assert command("register", "--config", folder).returncode == 0


def test_register_reset_refuses_while_the_service_runs(folder: Path, tmp_path: Path) -> None:
    """While a service holds the state folder, its identity is not taken from under it."""
    (tmp_path / "state").mkdir()
    IdentityFile(tmp_path / "state" / "identity.json").load()
    before = (tmp_path / "state" / "identity.json").read_bytes()
    hold = """
import sys
from pathlib import Path
from studio_worker.box.state_lock import state_lock
with state_lock(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "state")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as service:
        assert service.stdout is not None
        assert service.stdout.readline()
        said = mistake("register", "--reset", "--config", folder, status=75)
        assert service.poll() is None
    assert "systemctl stop studio-worker" in said
    assert (tmp_path / "state" / "identity.json").read_bytes() == before


@pytest.mark.parametrize("words", [("generate", "--help"), ("doctor", "--config", "/nowhere")])
def test_output_in_another_encoding_is_whole(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """In a locale that is not UTF-8 a character that it lacks is written otherwise; nothing ends half-way."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = command(*words)
    assert "Traceback" not in done.stderr
    assert "\\u2" in done.stdout


@pytest.mark.parametrize(
    ("words", "redirection", "status", "says"),
    [
        ("version", ">/dev/full", 74, "studio-worker: output: No space left on device\n"),
        ("doctor --config /nowhere", ">&-", 1, ""),
    ],
)
def test_output_that_nobody_can_take_is_no_fault_of_the_program(
    words: str, redirection: str, status: int, says: str
) -> None:
    """A full disk behind the output is one line, a closed one none; never a traceback."""
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m studio_worker {words} {redirection}', sys.executable],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, says)


# --- models ---


def test_models_list_tells_what_is_missing(folder: Path, required: Path) -> None:
    """models list --json names every required file, its state, its size and its place."""
    done = command("models", "list", "--json", "--config", folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {
            "model": "sample",
            "role": "model",
            "file": "a.safetensors",
            "state": "missing",
            "size_bytes": len(WEIGHTS),
            "required": True,
            "last_used": None,
            "path": str(required),
            "in_memory": None,
        }
    ]


def test_models_list_without_models_says_why(folder: Path) -> None:
    """A box that holds nothing is told so in words, not by an empty table."""
    done = command("models", "list", "--config", folder)
    assert done.stdout == "no models: models.d requires none, and no offer has brought one\n"


def test_models_list_tells_what_the_service_has_loaded(folder: Path, required: Path, tmp_path: Path) -> None:
    """While the service runs, models list shows where in memory it has each model."""
    loaded = Snapshot(resident=(ResidentModel(model="sample", size_bytes=1, place="ram"),))
    with (folder / "config.toml").open("a") as file:
        file.write(f'runtime_dir = "{tmp_path}/run"\n')
    handlers = {"status": lambda: loaded.model_dump(mode="json")}
    with contextlib.closing(ControlServer(tmp_path / "run", handlers)):
        (row,) = json.loads(command("models", "list", "--json", "--config", folder).stdout)
    assert row["in_memory"] == "ram"


@pytest.mark.parametrize(
    ("stage", "words"),
    [("prepare", "preparing the request"), ("turn", "waiting for its turn at the device")],
)
def test_status_tells_what_a_job_that_has_its_files_waits_for(
    folder: Path, tmp_path: Path, stage: str, words: str
) -> None:
    """A job that has its files, and is prepared or waits for the device, is not shown as fetching them."""
    waiting = Snapshot(job=JobFacts(job_id="j1", model="m", stage=stage))
    with (folder / "config.toml").open("a") as file:
        file.write(f'runtime_dir = "{tmp_path}/run"\n')
    handlers = {"status": lambda: waiting.model_dump(mode="json")}
    with contextlib.closing(ControlServer(tmp_path / "run", handlers)):
        shown = command("status", "--config", folder).stdout
    assert f"j1 (m), {words}; " in " ".join(shown.split())


def test_status_tells_how_models_are_loaded(folder: Path, tmp_path: Path) -> None:
    """status shows where in memory each model is, and whether its quantised weights are written out there."""
    loaded = Snapshot(
        resident=(
            ResidentModel(model="a", size_bytes=24_600_000_000, unpacked=True),
            ResidentModel(model="b", size_bytes=4_000_000_000, place="ram"),
        )
    )
    with (folder / "config.toml").open("a") as file:
        file.write(f'runtime_dir = "{tmp_path}/run"\n')
    handlers = {"status": lambda: loaded.model_dump(mode="json")}
    with contextlib.closing(ControlServer(tmp_path / "run", handlers)):
        shown = command("status", "--config", folder).stdout
        (first, _) = json.loads(command("status", "--json", "--config", folder).stdout)["resident"]
    assert "a (25 GB, device, unpacked), b (4.0 GB, ram)" in " ".join(shown.split())
    assert first["unpacked"] is True


@pytest.mark.parametrize(
    ("asked", "facts", "status"),
    [
        ("--alive", {"phase": "starting"}, 0),
        ("--alive", {"phase": "provisioning"}, 0),
        ("--alive", {"phase": "ready"}, 0),
        ("--alive", {"phase": "draining"}, 0),
        ("--alive", {"phase": "ready", "hangs": "the job in hand makes no progress"}, 1),
        ("--ready", {"phase": "provisioning"}, 1),
        ("--ready", {"phase": "ready"}, 0),
        ("--ready", {"phase": "ready", "hangs": "the job in hand makes no progress"}, 1),
        ("--ready", {"phase": "draining"}, 1),
    ],
)
def test_status_answers_a_probe_by_its_exit_status(
    folder: Path, tmp_path: Path, asked: str, facts: dict[str, str], status: int
) -> None:
    """A probe learns whether the service is ready, or whether only a restart can help: never because it still
    fetches its models or finishes its last job. One line says why.
    """
    with (folder / "config.toml").open("a") as file:
        file.write(f'runtime_dir = "{tmp_path}/run"\n')
    snapshot = Snapshot.model_validate({"status": "what it does", **facts})
    with contextlib.closing(
        ControlServer(tmp_path / "run", {"status": lambda: snapshot.model_dump(mode="json")})
    ):
        done = command("status", asked, "--config", folder)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout == f"{facts['phase']}: {facts.get('hangs', 'what it does')}\n"


@pytest.mark.parametrize("asked", ["--alive", "--ready"])
def test_status_of_no_service_answers_a_probe_with_no(folder: Path, asked: str) -> None:
    """A service that does not run is neither alive nor ready."""
    assert command("status", asked, "--config", folder).returncode == 3


def test_models_list_is_a_table_for_people(
    folder: Path, required: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """models list without --json shows model, role, file, state, size, why it is kept, and its last use; in a
    pipe each file is one line, whole, however narrow the terminal is.
    """
    monkeypatch.setenv("COLUMNS", "40")
    done = command("models", "list", "--config", folder)
    for word in ("sample", "model", required.name, "missing", "33 kB", "required", "never"):
        assert word in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_models_list_shows_on_demand_models(folder: Path, required: Path) -> None:
    """What a job has brought, or models.d no longer names, is listed as on demand, with its last use."""
    command("models", "pull", "--config", folder)
    (folder / "models.d" / "sample.json").unlink()
    (row,) = json.loads(command("models", "list", "--json", "--config", folder).stdout)
    assert (row["model"], row["state"], row["required"]) == ("sample", "verified", False)
    assert row["last_used"].endswith("+00:00")
    assert row["path"] == str(required)


def test_models_verify_only_looks_where_told_to(folder: Path, required: Path) -> None:
    """verify --no-repair counts a required file that was never fetched as missing, and fetches nothing."""
    done = command("models", "verify", "--no-repair", "--config", folder)
    assert done.returncode == 1
    assert f"missing           0.0 MB  {required}" in done.stdout
    assert not required.exists()


def damage(path: Path) -> None:
    """Change the content of a file, but neither its size nor its time."""
    stat = path.stat()
    path.write_bytes(b"damaged " + WEIGHTS[8:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_models_verify_without_repair_leaves_damage_as_it_is(folder: Path, required: Path) -> None:
    """verify --no-repair names what is damaged, ends with status 1 and changes nothing."""
    command("models", "pull", "--config", folder)
    damage(required)
    ledger = (required.parents[1] / "ledger.json").read_bytes()
    done = command("models", "verify", "--no-repair", "--json", "--config", folder)
    assert done.returncode == 1
    assert [(line["path"], line["state"]) for line in json.loads(done.stdout)] == [(str(required), "damaged")]
    assert required.read_bytes().startswith(b"damaged")
    assert (required.parents[1] / "ledger.json").read_bytes() == ledger


def test_models_pull_brings_what_verify_then_finds_whole(folder: Path, required: Path) -> None:
    """models pull fetches and verifies; verify then reads everything and ends with status 0."""
    pulled = command("models", "pull", "--config", folder)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout == "1 required model(s) verified\n"
    assert required.read_bytes() == WEIGHTS
    assert (
        json.loads(command("models", "list", "--json", "--config", folder).stdout)[0]["state"] == "verified"
    )
    verified = command("models", "verify", "--config", folder)
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "1 file(s) verified")


def test_models_verify_repairs_a_damaged_file(folder: Path, required: Path) -> None:
    """verify finds damage that left size and time as they were, and fetches a required file again."""
    command("models", "pull", "--config", folder)
    damage(required)
    done = command("models", "verify", "--config", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith("repaired")
    assert required.read_bytes() == WEIGHTS


def test_models_verify_removes_a_damaged_file_that_offers_bring(folder: Path, required: Path) -> None:
    """A damaged file that the configuration does not name is removed, with the word that it comes again."""
    command("models", "pull", "--config", folder)
    damage(required)
    (folder / "models.d" / "sample.json").unlink()
    done = command("models", "verify", "--config", folder)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith("damaged")
    assert "the next job that needs it fetches it" in done.stdout
    assert not required.exists()


def test_models_verify_fetches_a_required_file_that_is_missing(folder: Path, required: Path) -> None:
    """After verify every required file is there, also one that never was before."""
    done = command("models", "verify", "--config", folder)
    assert done.returncode == 0, done.stderr
    assert required.read_bytes() == WEIGHTS


def test_models_verify_says_what_it_could_not_repair(folder: Path, required: Path, tmp_path: Path) -> None:
    """A damaged file whose source has gone ends with status 1 and the reason; the next try may succeed."""
    command("models", "pull", "--config", folder)
    damage(required)
    mirrored = tmp_path / "mirror" / "a.safetensors"
    mirrored.rename(tmp_path / "away")
    done = command("models", "verify", "--config", folder)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith("damaged")
    assert "404" in done.stdout
    (tmp_path / "away").rename(mirrored)
    assert command("models", "verify", "--config", folder).returncode == 0


def test_models_pull_writes_log_lines_into_a_pipe(folder: Path, required: Path) -> None:
    """Without a terminal pull tells its progress in log lines and draws no bar."""
    done = command("models", "pull", "--config", folder)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert "model verified" in [line["message"] for line in lines]
    assert "\x1b" not in done.stderr


def test_models_pull_shows_a_bar_for_each_file_on_a_terminal(folder: Path, required: Path) -> None:
    """On a terminal pull shows each file by its name, and says when it is verified."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "studio_worker", "models", "pull", "--config", str(folder)],
        cwd=ROOT,
        env=environment() | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal that the last process has left
            while piece := os.read(ours, 65536):
                shown += piece
        assert process.wait(60) == 0
    os.close(ours)
    assert b"a.safetensors" in shown
    assert b"verified" in shown
    assert b'"message"' not in shown


def test_models_prune_tells_what_it_removes(folder: Path, required: Path) -> None:
    """prune removes what models.d does not name; with --dry-run it only says so."""
    command("models", "pull", "--config", folder)
    assert command("models", "prune", "--config", folder).stdout.startswith("nothing to remove")
    (folder / "models.d" / "sample.json").unlink()
    stranger = required.parents[1] / "notes.txt"
    stranger.write_text("mine")

    would = command("models", "prune", "--dry-run", "--config", folder).stdout
    assert "would be removed: sample, 33 kB" in would
    assert required.exists()

    did = command("models", "prune", "--config", folder).stdout
    assert did.splitlines() == [
        "removed: sample, 33 kB",
        f"unknown, left alone: {stranger}",
        "33 kB freed",
    ]
    assert not required.exists()
    assert stranger.exists()


def test_models_pull_ends_with_74_where_the_mirror_has_not_got_it(
    folder: Path, required: Path, tmp_path: Path
) -> None:
    """A file that cannot be fetched ends with status 74 and one line that names its address."""
    (tmp_path / "mirror" / "a.safetensors").unlink()
    done = command("models", "pull", "--config", folder)
    assert done.returncode == 74
    assert "studio-worker: GET http://127.0.0.1:" in done.stderr
    assert "404" in done.stderr
    assert "Traceback" not in done.stderr
    assert not required.exists()
