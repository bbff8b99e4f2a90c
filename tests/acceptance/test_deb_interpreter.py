"""The Python that the package brings: it is the only one that runs, and it does without the system's."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.box import SOME, STATE, UNIT, Box
from tests.acceptance.conftest import Debs

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
    assert machine.run("which", "python3", check=False).stdout == ""  # it is not needed
    for path in TRAPS:  # and where it is, it is not asked
        machine.write(path, TRAP)
    outside = "cd /root/caller && PYTHONPATH=/root/caller PYTHONHOME=/usr PYTHONSTARTUP=/root/caller/json.py"
    machine.shell(f"{outside} studio-worker version")
    told = json.loads(machine.shell(f"{outside} {PYTHON} -IB - <<'END'\n{WHERE}\nEND"))
    # As the service starts its children, in an environment that is the unit's.
    child = json.loads(machine.shell(f"cd /root && {PYTHON} -PsB -c '{WHERE}'"))
    for seen in (told, child):
        modules = [path for path in seen["modules"] if path.startswith("/")]  # torch makes up some
        assert len(modules) > 500
        found = [*seen["path"], *seen["site"], *seen["prefixes"], *modules, seen["include"]]
        assert [path for path in found if not path.startswith(FOLDER)] == []
        assert not seen["user"]
    box.start()
    job_id = box.queue_picture()
    box.await_job(job_id, "done")
    mapped = Path(f"/proc/{box.host_pid()}/maps").read_text()
    assert f"{FOLDER}/python/bin/python3.11" in mapped
    assert "/usr/lib/python3" not in mapped
    assert "/usr/local" not in mapped
    assert not machine.path("/root/trapped").exists()


def test_every_file_is_dpkgs_also_the_byte_code(box: Box) -> None:
    """Every module has its byte code from the package; none is written at run time, or checks time stamps."""
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
    told = box.machine.run(PYTHON, "-IBc", "import sysconfig; print(sysconfig.get_path('include'))").stdout
    assert told.strip() == f"{FOLDER}/python/include/python3.11"
    done = subprocess.run(
        ["gcc", "-M", "-I", str(include), "-x", "c", "-"],
        input="#include <Python.h>\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{include}/pyconfig.h" in done.stdout
    assert "/usr/include/python3" not in done.stdout
    assert "/usr/include/x86_64-linux-gnu/python3" not in done.stdout


@pytest.mark.skipif(SUITE != BUILT_ON, reason="before, the packages were for Debian 12 alone")
def test_upgrade_from_the_systems_python_keeps_everything(box: Box, debs: Debs, tmp_path: Path) -> None:
    """A box whose packages ran on Debian 12's own python3 gets those that bring it, with a job in hand."""
    machine = box.machine
    _as_before(box)
    box.configure(require_sample=True, log={"level": "debug"})
    machine.run("systemctl", "enable", "--now", UNIT, limit_s=120)
    worker_id = box.await_online()
    assert "/usr/bin/python3.11" in Path(f"/proc/{box.host_pid()}/maps").read_text()
    kept = _kept(box)
    job_id = box.queue_picture(SOME)
    box.await_in_engine(job_id)
    for deb in (debs.worker, debs.torch):
        machine.copy_in(deb, "/opt/debs")
        (tmp_path / deb.name).symlink_to(deb)
    index = subprocess.run(
        ["dpkg-scanpackages", "."], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    machine.write("/opt/debs/Packages", index.stdout)
    machine.write("/opt/ours.list", "deb [trusted=yes] file:/opt/debs ./\n")
    apt = ("apt-get", "-o", "Dir::Etc::SourceList=/opt/ours.list", "-o", "Dir::Etc::SourceParts=-")
    machine.run(*apt, "update")
    told = machine.run(*apt, "upgrade", "--yes", limit_s=600).stdout
    assert "2 upgraded, 0 newly installed, 0 to remove" in told
    job = box.studio.job(job_id)
    assert (job.status, job.completions, job.attempts) == ("done", 1, 1)
    machine.await_that("the service is back", lambda: box.show("ActiveState") == "active")
    assert box.await_online() == worker_id
    assert _kept(box) == kept
    assert f"{FOLDER}/python/bin/python3.11" in Path(f"/proc/{box.host_pid()}/maps").read_text()
    after = box.queue_picture()
    box.await_job(after, "done")
    # And the system's may go, or be another: 13's for one.
    plan = machine.run("apt-get", "purge", "--simulate", "python3", "python3.11", "python3.11-minimal").stdout
    assert "Purg python3.11-minimal" in plan
    assert "studio-worker" not in plan


def _kept(box: Box) -> dict[str, str]:
    """What an operator would miss: identity, models, site files, and whether it starts with the box."""
    files = box.machine.shell(
        f"find {STATE}/identity.json {STATE}/models /etc/studio-worker -type f -exec sha256sum {{}} +"
    )
    enabled = box.machine.run("systemctl", "is-enabled", UNIT, check=False).stdout
    return {"files": "".join(sorted(files.splitlines(keepends=True))), "enabled": enabled}


def _as_before(box: Box) -> None:
    """The packages as they were when they ran on the system's python3: for dpkg, and on the disk."""
    machine = box.machine
    machine.run("apt-get", "--quiet", "update")
    machine.run("apt-get", "install", "--yes", "--no-install-recommends", "python3")
    machine.shell(f"rm -r {FOLDER}/python; ln -sf /usr/bin/python3.11 {PYTHON}")
    machine.shell(f"sed -i 's,^home = .*,home = /usr/bin,' {FOLDER}/pyvenv.cfg")
    listed = machine.path("/var/lib/dpkg/info/studio-worker.list")
    lines = listed.read_text().splitlines(keepends=True)
    listed.write_text("".join(line for line in lines if not line.startswith(f"{FOLDER}/python")))
    status = machine.path("/var/lib/dpkg/status")
    stanzas = status.read_text().split("\n\n")
    python = "python3 (>= 3.11~), python3 (<< 3.12~)"
    libraries = "libc6 (>= 2.28), libgcc-s1, libstdc++6, zlib1g"
    for number, stanza in enumerate(stanzas):
        fields = {}
        if stanza.startswith("Package: studio-worker\n"):
            torch = "studio-worker-torch (>= 2.13.0~), studio-worker-torch (<< 2.14~)"
            fields = {
                "Version": "0.5.0~before",
                "Depends": f"ca-certificates, {python}, {libraries}, {torch}",
            }
        elif stanza.startswith("Package: studio-worker-torch-cpu\n"):
            fields = {"Version": "2.13.0-1", "Depends": f"{python}, {libraries}"}
            fields["Provides"] = "studio-worker-torch (= 2.13.0)"
        for name, value in fields.items():
            stanza = re.sub(rf"^{name}: .*$", f"{name}: {value}", stanza, flags=re.MULTILINE)
        stanzas[number] = stanza
    status.write_text("\n\n".join(stanzas))
    assert machine.run("dpkg-query", "-W", "-f", "${Version}", "studio-worker").stdout == "0.5.0~before"
