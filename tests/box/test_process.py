"""What a process that runs torch is made ready with, and that nothing happens before."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "ORT_DISABLE_TELEMETRY": "1",
}
CHOSEN = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

DOORS = {
    "probe": "from studio_worker.engine.probe import main; sys.argv = ['', 'cpu']; main()",
    "service": "from studio_worker.cli import main; sys.argv = ['', 'run', '--config', '/no']; main()",
    "generate": "from studio_worker.cli import main; sys.argv = ['', 'generate', 'a', '-o', '/no/a']; main()",
}


def said(script: str, **environment: str) -> Any:
    """The last line of what ``script`` prints, as JSON; run by an interpreter that nobody has prepared."""
    names = (
        "HF_",
        "TRANSFORMERS_",
        "DIFFUSERS_",
        "DO_NOT_",
        "ORT_",
        "TOKENIZERS_",
        "TORCH",
        "PYTORCH_",
        "CUDA_",
        "OMP_W",
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    words = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(words, env=clean | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def environment_after(statements: str, **environment: str) -> dict[str, str]:
    """A process's environment once it has come through ``statements``, or left them by an exit."""
    script = f"""
import json, os, sys
try:
    {statements}
except SystemExit:
    pass
print(json.dumps(dict(os.environ)))
"""
    found: dict[str, str] = said(script, **environment)
    return found


@pytest.mark.parametrize("door", DOORS)
def test_whatever_runs_torch_is_prepared_first(door: str) -> None:
    """The service, generate and the probe never ask a hub, never log a prompt, count GPUs as nvidia-smi
    does, and let torch's memory segments grow, whether systemd's unit starts them or a shell.
    """
    found = environment_after(DOORS[door])
    assert {name: found.get(name) for name in OFFLINE | CHOSEN} == OFFLINE | CHOSEN


def test_operators_choice_holds_but_for_the_offline_lock() -> None:
    """What an operator has set for torch's threads and memory holds; that no hub is asked always does."""
    own = {"OMP_WAIT_POLICY": "ACTIVE", "CUDA_DEVICE_ORDER": "FASTEST_FIRST", "PYTORCH_ALLOC_CONF": "x:1"}
    found = environment_after(
        "from studio_worker.box.process import prepare; prepare()", HF_HUB_OFFLINE="0", **own
    )
    assert {name: found[name] for name in own} == own
    assert found["HF_HUB_OFFLINE"] == "1"


def test_torch_does_without_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    """In a container that may write nowhere but to /tmp and its volume, torch keeps what it compiles in /tmp;
    else each job would fail, for torch makes that folder when it is imported.
    """
    (tmp_path / "file").touch()
    found = environment_after(
        "from studio_worker.box.process import prepare; prepare(); import torch._dynamo",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "compiled"),
        TMPDIR=str(tmp_path),
    )
    assert Path(found["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path


def test_importing_changes_nothing() -> None:
    """Importing any module of the package leaves the environment, and what collections look at, alone."""
    script = """
import gc, json, importlib, os, pkgutil, sys
import studio_worker
for library in ("torch", "diffusers", "transformers"):
    importlib.import_module(library)
before = dict(os.environ)
for found in pkgutil.walk_packages(studio_worker.__path__, "studio_worker."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
print(json.dumps([sorted(changed), gc.get_freeze_count(), gc.isenabled()]))
"""
    assert said(script) == [[], 0, True]


PAGES = """
import json, resource
from studio_worker.box import process
import torch
torch.set_num_threads(1)

def rss_mib():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) // 1024
"""


def test_memory_comes_from_what_is_kept() -> None:
    """Tensors that come and go, as in a denoising step on a CPU, get their memory page by page from the
    system once, not each time.
    """
    script = """
process.prepare()
for time in range(40):
    if time == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 18)  # 64 MiB
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""
    all_of_them = 20 * 64 * 2**20 // resource.getpagesize()
    assert said(PAGES + script) < all_of_them / 4


def test_memory_is_given_back_between_jobs() -> None:
    """Between jobs the system has all of the memory that a picture took while it was made, for whatever else
    runs on the machine.
    """
    script = """
process.prepare()
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.jobs import Cancel
from tests.lab.engine import request
engine = DiffusionEngine("cpu")
found = []
for side in (64, 512, 64):
    engine.generate(request(width=side, height=side, steps=1), lambda done, total: None, Cancel())
    found.append(rss_mib())
highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps([*found, highest]))
"""
    small, large, small_again, highest = said(PAGES + script)
    assert highest > large + 300  # it took that much
    assert large < small + 32
    assert small_again < small + 32
