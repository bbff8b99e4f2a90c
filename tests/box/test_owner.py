"""Root among the service's folders: what that user may not do, root's commands do not do for him either."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from studio_worker import sample_model
from tests.fakes.servers import FileServer, refused_url

ROOT = Path(__file__).parents[2]
SERVICE = 65534
WEIGHTS = b"weights " * 4096
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


_MAY_READ = (
    f"import os; os.setgroups([]); os.setgid({SERVICE}); os.setuid({SERVICE}); open(os.__file__).close()"
)


def _python() -> str:
    """A Python that everybody may read: this one, or the system's with this one's libraries."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if (
            Path(python).exists()
            and not subprocess.run([python, "-c", _MAY_READ], stderr=subprocess.DEVNULL).returncode
        ):
            return python
    pytest.skip("no Python here can be read by another user", allow_module_level=True)


LIBRARIES = [path for path in sys.path if path.endswith("site-packages")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *LIBRARIES])}
PYTHON = _python() if os.geteuid() == 0 else sys.executable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to lose")


class Box(NamedTuple):
    """A box whose ``state`` and ``models`` are the service's user's; ``secret`` is root's alone."""

    etc: Path
    state: Path
    models: Path
    secret: Path

    def run(self, *words: str | Path, **rights: Any) -> subprocess.CompletedProcess[str]:
        """A command as root, or as ``rights`` say."""
        return subprocess.run(
            [PYTHON, "-m", "studio_worker", *map(str, words), "--config", str(self.etc)],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **rights,
        )

    def secrets(self) -> dict[str, tuple[int, str]]:
        """Everything in the folder of root's: owner and content."""
        return {each.name: (each.stat().st_uid, each.read_text()) for each in self.secret.iterdir()}

    def owners(self) -> set[int]:
        """Who owns what lies in the service's folders."""
        found = [path for folder in (self.state, self.models) for path in (folder, *folder.rglob("*"))]
        return {path.lstat().st_uid for path in found}


@pytest.fixture
def mirror() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def box(mirror: FileServer) -> Iterator[Box]:
    """A box with one required model. pytest's own folders are root's alone, and so not for this."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        box = Box(folder / "etc", folder / "state", folder / "models", folder / "secret")
        (box.etc / "models.d").mkdir(parents=True)
        box.secret.mkdir(mode=0o700)
        (box.secret / "shadow").write_text("the real one")
        for own in (box.state, box.models):
            own.mkdir(mode=0o700)
            os.chown(own, SERVICE, SERVICE)
        mirror.serve("/a.safetensors", WEIGHTS)
        (box.etc / "config.toml").write_text(
            f'[worker]\ndevice = "cpu"\n[models]\nroot = "{box.models}"\n'
            f'[state]\ndir = "{box.state}"\nruntime_dir = "{folder}/run"\n'
        )
        file = {
            "role": "model",
            "url": f"http://127.0.0.1:{mirror.port}/a.safetensors",
            "filename": "a.safetensors",
            "sha256": SHA256,
        }
        required = {"id": "required", "engine": "sd-cpp", "files": [file]}
        (box.etc / "models.d" / "required.json").write_text(json.dumps(required))
        yield box


def by_service(path: Path, *, link: Path | None = None, text: str | None = None) -> Path:
    """Something that the service's user has laid at ``path``: a link, a file, or else a pipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if link is not None:
        path.symlink_to(link)
    elif text is not None:
        path.write_text(text)
    else:
        os.mkfifo(path)
    for each in (path, path.parent):
        os.chown(each, SERVICE, SERVICE, follow_symlinks=False)
    return path


COMMANDS = (
    ("models", "list"),
    ("models", "pull"),
    ("models", "verify"),
    ("models", "prune"),
    ("doctor",),
    ("register",),
    ("register", "--reset"),
    ("check-config",),
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_root_writes_nothing_through_links_of_the_service_user(box: Box, words: tuple[str, ...]) -> None:
    """Links in the service's folders lead no command of root's to a file of root's: none is made, emptied,
    changed or given away.
    """
    by_service(box.models / ".staging" / f"{SHA256}.part", link=box.secret / "shadow")
    by_service(box.models / ".staging" / f"{SHA256}.json.tmp", link=box.secret / "made-a")
    by_service(box.models / ".ledger.lock", link=box.secret / "made-b")
    by_service(box.state / "lock", link=box.secret / "made-c")
    by_service(box.state / "identity.json", link=box.secret / "made-d")
    by_service(box.models / "folder", link=box.secret)
    before = box.secrets()

    box.run(*words)

    assert box.secrets() == before
    assert before == {"shadow": (0, "the real one")}


def test_verify_fetches_nothing_to_where_a_forged_ledger_says(box: Box, mirror: FileServer) -> None:
    """A ledger that the service's user has forged brings no file of his choice into a folder of root's, and
    no address in it is asked.
    """
    payload = b"* * * * * root id\n"
    sha256 = hashlib.sha256(payload).hexdigest()
    forged = mirror.serve("/cron", payload)
    by_service(box.models / sha256, link=box.secret)
    entry = {"size": 1, "mtime_ns": 1, "inode": 1, "sha256": sha256, "models": {}}
    entry["url"] = f"http://127.0.0.1:{mirror.port}/cron"
    by_service(box.models / "ledger.json", text=json.dumps({f"{sha256}/owned": entry}))

    done = box.run("models", "verify")

    assert set(box.secrets()) == {"shadow"}
    assert forged.requests == []
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [".staging/x.part", ".ledger.lock", "ledger.json"])
@pytest.mark.parametrize("words", [("models", "prune"), ("models", "list")], ids=" ".join)
def test_pipe_in_the_models_folder_hangs_no_command(box: Box, name: str, words: tuple[str, ...]) -> None:
    """A named pipe where a file is looked for ends no command of root's in an endless wait."""
    by_service(box.models / name)
    assert "Traceback" not in box.run(*words).stderr  # run() has a time limit


def test_killed_pull_leaves_nothing_of_roots(box: Box, mirror: FileServer) -> None:
    """Whatever `sudo studio-worker models pull` has made when it is killed belongs to the service's user, who
    goes on with it.
    """
    file = mirror.serve("/a.safetensors", WEIGHTS, hold_after=len(WEIGHTS) // 2)
    with subprocess.Popen(
        [PYTHON, "-m", "studio_worker", "models", "pull", "--config", str(box.etc)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    ) as pull:
        assert file.held.wait(60)
        pull.kill()
    file.release()
    assert box.owners() == {SERVICE}


@pytest.mark.parametrize("words", [*COMMANDS, ("models", "import", "BUNDLE")], ids=" ".join)
def test_what_root_makes_is_the_service_users(box: Box, words: tuple[str, ...]) -> None:
    """After any command of root's everything in the service's folders belongs to the service's user."""
    if "import" in words:
        bundle = box.secret / "bundle.tar"
        assert box.run("models", "pull").returncode == 0
        assert box.run("models", "export", bundle).returncode == 0
        shutil.rmtree(box.models / SHA256)
        words = (*words[:2], str(bundle))
    done = box.run(*words)
    assert box.owners() == {SERVICE}
    assert "Traceback" not in done.stderr
    if "models" in words:
        assert done.returncode == 0, done.stderr


def test_export_goes_where_root_may_write(box: Box) -> None:
    """`sudo studio-worker models export` writes into a folder that the service's user may not even see; where
    that fails, nothing is left there.
    """
    assert box.run("models", "export", box.secret / "early.tar").returncode != 0
    assert set(box.secrets()) == {"shadow"}
    assert box.run("models", "pull").returncode == 0
    assert box.run("models", "export", box.secret / "bundle.tar").returncode == 0
    assert {path.name for path in box.secret.iterdir()} == {"shadow", "bundle.tar"}
    assert (box.secret / "bundle.tar").stat().st_uid == 0


def test_generate_uses_the_models_as_their_owner_and_writes_as_root(box: Box, mirror: FileServer) -> None:
    """`sudo studio-worker generate` fetches a model as the service's user, and puts the picture where only
    root may write.
    """
    mirror.serve("/a.safetensors", sample_model.WEIGHTS.read_bytes())
    entry = json.loads((box.etc / "models.d" / "required.json").read_text())
    entry["files"][0]["sha256"] = sample_model.SHA256
    entry["cliDefaults"] = {**sample_model.DEFAULTS, "steps": 1}
    (box.etc / "models.d" / "required.json").write_text(json.dumps(entry))

    done = box.run("generate", "a red potion", "--model", "required", "-o", box.secret / "picture.png")

    assert done.returncode == 0, done.stderr
    assert (box.secret / "picture.png").stat().st_uid == 0
    assert box.owners() == {SERVICE}


def test_generate_that_is_killed_leaves_no_file(box: Box, mirror: FileServer) -> None:
    """A killed `sudo studio-worker generate` leaves nothing in root's folder."""
    file = mirror.serve("/a.safetensors", WEIGHTS, hold_after=len(WEIGHTS) // 2)
    words = [
        "generate",
        "x",
        "--model",
        "required",
        "-o",
        str(box.secret / "a.png"),
        "--config",
        str(box.etc),
    ]
    with subprocess.Popen(
        [PYTHON, "-m", "studio_worker", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as making:
        assert file.held.wait(60)
        making.kill()
        # The process that would have named the picture holds standard output open until it is done.
        assert making.stdout is not None
        making.stdout.read()
    file.release()
    assert set(box.secrets()) == {"shadow"}


def test_token_that_only_root_may_read_is_used(box: Box, mirror: FileServer) -> None:
    """A download token that is root's alone serves root's commands."""
    tokens = box.secret / "tokens"
    tokens.mkdir(mode=0o700)
    (tokens / "download-token.127.0.0.1").write_text("token")
    (tokens / "download-token.127.0.0.1").chmod(0o600)
    text = (box.etc / "config.toml").read_text()
    text = text.replace("[models]\n", f'[models]\ntoken_dir = "{tokens}"\n')
    (box.etc / "config.toml").write_text(text)
    file = mirror.serve("/a.safetensors", WEIGHTS)
    assert box.run("models", "pull").returncode == 0
    assert file.requests[0].headers["authorization"] == "Bearer token"


STRANGER = 54321


@pytest.mark.parametrize("words", [("check-config",), ("models", "list"), ("register",), ("status",)])
def test_configuration_that_this_user_may_not_enter_is_one_line(box: Box, words: tuple[str, ...]) -> None:
    """A command of somebody else's, whose configuration is closed to them, says so in one line, with 78."""
    box.etc.chmod(0o700)
    done = box.run(*words, user=STRANGER, group=STRANGER, extra_groups=[])
    assert done.returncode == 78
    assert "config.toml: cannot be read: Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_user_whom_the_system_does_not_know_is_served(box: Box) -> None:
    """A service whose user is in no passwd file and has no home, as in many containers, works like any."""
    sockets = box.etc.parent / "run"
    sockets.mkdir()
    for own in (box.state, box.models, sockets):
        os.chown(own, STRANGER, STRANGER)
    with (box.etc / "config.toml").open("a") as config:
        config.write(f'[studio]\napi_base_url = "{refused_url("/")}"\n')
    known = {"USER", "LOGNAME", "LNAME", "USERNAME"}
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in known}
    rights: dict[str, Any] = {"user": STRANGER, "group": STRANGER, "extra_groups": []}

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PYTHON, "-m", "studio_worker", *words, "--config", str(box.etc)],
            cwd=ROOT,
            env={**environment, "HOME": "/nonexistent"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **rights,
        )

    for words, status in (
        (["check-config"], 0),
        (["models", "pull"], 0),
        (["models", "list"], 0),
        (["doctor"], 1),
    ):
        with start(*words) as command:
            said, _ = command.communicate(timeout=120)
        assert (command.returncode, "Traceback" in said) == (status, False), said
    with start("run") as service:
        assert service.stdout is not None
        said = ""
        while "registration has to wait" not in said:  # READY, and the studio is not there
            line = service.stdout.readline()
            assert line, said
            said += line
        service.terminate()
        rest, _ = service.communicate(timeout=120)
    assert service.returncode == 0
    assert "service ready" in said
    assert "Traceback" not in said + rest
