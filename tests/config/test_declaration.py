"""Adding a setting: its declaration is all there is to write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NEW_KEYS = """
class WorkerSection(_Section):
    rest_s: float = setting(
        2.5,
        "How long the worker rests after a job, in seconds.",
        live=True,
        ge=0,
    )
    nickname: str | None = setting(
        None,
        "What the box is called in its own log.",
        live=False,
        example="attic",
    )
"""

RELOAD = """
import sys
from pathlib import Path
from studio_worker import config
from studio_worker.appliance.reload import read_again
from studio_worker.config.current import Current
from studio_worker.transfer.policy import Policy

folder = Path(sys.argv[1])
running = config.load(folder)
(folder / "config.toml").write_text("[worker]\\nrest_s = 7\\nnickname = 'cellar'\\n")
reloaded = read_again(folder, Current(running, Policy()))
print(reloaded.applied, reloaded.needs_restart, reloaded.config.settings.worker.rest_s)
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A copy of this project, with two keys added to its declarations."""
    package = tmp_path / "studio_worker"
    package.mkdir()
    for each in (ROOT / "studio_worker").iterdir():
        if each.name not in {"config", "__pycache__"}:
            (package / each.name).symlink_to(each)
    shutil.copytree(ROOT / "studio_worker" / "config", package / "config")
    for folder in ("docs", "examples"):
        shutil.copytree(ROOT / "packaging" / folder, tmp_path / "packaging" / folder)
    declarations = package / "config" / "sections.py"
    text = declarations.read_text()
    changed = text.replace("\nclass WorkerSection(_Section):\n", NEW_KEYS)
    assert changed != text
    declarations.write_text(changed)
    return tmp_path


def run(scratch: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=scratch,
        env=os.environ | {"PYTHONPATH": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_new_setting_is_everywhere_from_its_declaration_alone(scratch: Path) -> None:
    """A key that is declared is in config.toml and man page, is checked, and is reloaded as it is marked."""
    made = run(scratch, "packaging/docs/make.py")
    assert made.returncode == 0, made.stderr
    assert (
        "[worker]\n"
        "# How long the worker rests after a job, in seconds.\n"
        "rest_s = 2.5\n"
        "# [restart] What the box is called in its own log.\n"
        '#nickname = "attic"\n'
    ) in (scratch / "packaging" / "config.toml").read_text()
    assert (
        ".SH [worker]\n"
        ".TP\n\\fBrest_s\\fR = 2.5\nHow long the worker rests after a job, in seconds.\n"
        '.TP\n\\fBnickname\\fR (for example "attic")\n[restart] What the box is called in its own log.\n'
    ) in (scratch / "packaging" / "man" / "studio-worker-config.5").read_text()

    wrong = scratch / "wrong"
    wrong.mkdir()
    (wrong / "config.toml").write_text("[worker]\nrest_s = -1\n")
    checked = run(scratch, "-m", "studio_worker", "check-config", "--config", str(wrong))
    assert f"{wrong}/config.toml:2: worker.rest_s: " in checked.stderr
    assert "(default: 2.5)" in checked.stderr

    site = scratch / "site"
    site.mkdir()
    for name in ("state", "models"):
        (site / name).mkdir()
    own = f"[state]\ndir = '{site}/state'\n[models]\nroot = '{site}/models'\n"
    (site / "conf.d").mkdir()
    (site / "conf.d" / "own.toml").write_text(own)
    (site / "config.toml").write_text("")
    reloaded = run(scratch, "-c", RELOAD, str(site))
    assert reloaded.stdout == "('worker.rest_s',) ('worker.nickname',) 7.0\n", reloaded.stderr
