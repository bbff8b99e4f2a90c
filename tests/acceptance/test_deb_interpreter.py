"""The Python that the package brings: it is the only one that runs, and it does without the system's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from studio_worker.local_studio import LocalStudio
from studio_worker.sample_model import WEIGHTS
from tests.acceptance import figures
from tests.acceptance.box import Box
from tests.acceptance.conftest import Debs
from tests.acceptance.machine import Machine

FOLDER = "/usr/lib/studio-worker"
PYTHON = f"{FOLDER}/bin/python3"

WHERE = """
import json, site, sys, sysconfig
import bz2, ctypes, hashlib, lzma, sqlite3, ssl, uuid, zlib, pyexpat, torch, studio_worker
print(json.dumps({
    "path": sys.path,
    "site": site.getsitepackages(),
    "prefixes": [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, sys.executable],
    "modules": [m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)],
    "include": sysconfig.get_path("include"),
    "user": site.ENABLE_USER_SITE,
}))
"""

TRAP = "open('/root/trapped', 'a').write(__file__ + '\\n')\n"
TRAPS = (
    "/etc/python3.11/sitecustomize.py",
    "/usr/lib/python3/dist-packages/usercustomize.py",
    "/usr/lib/python3/dist-packages/sitecustomize.py",
    "/usr/local/lib/python3.11/dist-packages/sitecustomize.py",
    "/usr/local/lib/python3.11/site-packages/sitecustomize.py",
    "/root/.local/lib/python3.11/site-packages/usercustomize.py",
    "/root/caller/sitecustomize.py",
    "/root/caller/json.py",
)


def test_nothing_of_the_systems_python_is_ever_run(box: Box) -> None:
    """Not its library, not what pip or the administrator put beside it, not what the caller's shell says."""
    machine = box.machine
    for path in TRAPS:
        machine.write(path, TRAP)
    outside = "cd /root/caller && PYTHONPATH=/root/caller PYTHONHOME=/usr PYTHONSTARTUP=/root/caller/json.py"
    machine.shell(f"{outside} studio-worker version")
    told = json.loads(machine.shell(f"{outside} {PYTHON} -IB - <<'END'\n{WHERE}\nEND"))
    # As the service starts its children, in an environment that is the unit's.
    child = json.loads(machine.shell(f"cd /root && {PYTHON} -PsB -c '{WHERE}'"))
    for seen in (told, child):
        found = [*seen["path"], *seen["site"], *seen["prefixes"], *seen["modules"], seen["include"]]
        assert [path for path in found if not path.startswith(FOLDER)] == []
        assert seen["user"] is False or seen["user"] is None
    box.start()
    job_id = box.queue_picture()
    box.await_job(job_id, "done")
    mapped = Path(f"/proc/{box.host_pid()}/maps").read_text()
    assert f"{FOLDER}/python/bin/python3.11" in mapped
    assert "/usr/lib/python3" not in mapped
    assert "/usr/local" not in mapped
    assert not machine.path("/root/trapped").exists()


def test_every_file_is_dpkgs_also_the_byte_code(box: Box) -> None:
    """Every module has its byte code from the package, none is written at run time, none checks time stamps."""
    box.start()
    job_id = box.queue_picture()
    box.await_job(job_id, "done")
    there = set(box.machine.shell(f"find {FOLDER} ! -type d").split("\n")) - {""}
    owned = box.machine.run("dpkg", "--listfiles", "studio-worker", "studio-worker-torch-cpu").stdout
    assert there - set(owned.splitlines()) == set()
    library = box.machine.path(f"{FOLDER}/python/lib/python3.11")
    modules = [path for path in library.rglob("*.py") if not path.is_symlink()]
    assert len(modules) > 500
    for module in modules:
        byte_code = module.parent / "__pycache__" / f"{module.stem}.cpython-311.pyc"
        # PEP 552: magic, then flags; 1 is "by hash, never checked".
        assert byte_code.read_bytes()[4:8] == b"\x01\0\0\0", module


def test_headers_are_there_for_a_compiler(box: Box) -> None:
    """What torch.compile has built finds Python.h in the package, and all that it includes beside it."""
    include = box.machine.path(f"{FOLDER}/python/include/python3.11")
    done = subprocess.run(
        ["gcc", "-M", "-nostdinc", "-I", str(include), "-isystem", _compilers_own(), "-isystem", "/usr/include",
         "-isystem", "/usr/include/x86_64-linux-gnu", "-x", "c", "-"],
        input="#include <Python.h>\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{include}/pyconfig.h" in done.stdout
    assert "/usr/include/python3" not in done.stdout
    assert "/usr/include/x86_64-linux-gnu/python3" not in done.stdout


def _compilers_own() -> str:
    """The folder with stddef.h and the like."""
    return subprocess.run(
        ["gcc", "-print-file-name=include"], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_box_without_any_python_makes_pictures(base: Path, debs: Debs, work: Path, tmp_path: Path) -> None:
    """On a system with no python3, and none of the libraries that came with it, apt brings all that is needed."""
    with (
        LocalStudio(tmp_path / "studio.sqlite3", models_dir=WEIGHTS.parent, auto_approve=True) as studio,
        Machine([base], work / "without-python") as machine,
    ):
        machine.run("apt-get", "purge", "--yes", "python3*", "libpython3*")
        machine.run("apt-get", "autoremove", "--purge", "--yes")
        assert machine.run("which", "python3", "python3.11", check=False).stdout == ""
        assert not machine.path("/usr/lib/python3.11").exists()
        for deb in (debs.worker, debs.torch):
            machine.copy_in(deb, "/root/debs")
        machine.run("apt-get", "--quiet", "update")
        done = machine.shell("apt-get install --yes --no-install-recommends /root/debs/*.deb")
        new = [line.split()[1] for line in done.splitlines() if line.startswith("Setting up ")]
        assert [name for name in new if "python" in name] == []
        assert machine.run("which", "python3", check=False).stdout == ""
        box = Box(machine, studio)
        box.configure()
        machine.run("studio-worker", "check-config")
        box.start()
        job_id = box.queue_picture()
        box.await_job(job_id, "done")
        figures.note("installed on a box without Python", f"with {len(new) - 2} libraries of the system")
