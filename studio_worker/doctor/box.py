"""Checks of the machine: configuration, permissions, GPU, memory, disk."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from studio_worker import config
from studio_worker.appliance.provisioning import show_bytes
from studio_worker.box.compatibility import show
from studio_worker.box.device import find_device, probe
from studio_worker.box.driver import gpu_index, require_driver
from studio_worker.box.nodes import driver_problem, has_nvidia_gpu, missing_nodes, module_version, no_gpu
from studio_worker.config.downloads import policy_from
from studio_worker.doctor.results import Box, Result, failure, ok, warning
from studio_worker.errors import ConfigError
from studio_worker.network.urls import safe_url
from studio_worker.store.ledger import content_key
from studio_worker.studio.http.identity import identity_name, lane_identities

PROBE_LIMIT_S = 90.0
_LITTLE_MEMORY_BYTES = 4e9
_LITTLE_DISK_BYTES = 10e9
_SAMPLE_BYTES = 64 * 1024 * 1024
_SAMPLE_LIMIT_S = 5.0
_SLOW_BYTES_PER_S = 50e6
"""A model of 7 GB takes longer than two minutes from such a disk."""


def check_configuration(box: Box) -> Result:
    """All files, and what they name: tokens and certificates."""
    loaded = config.load(box.directory)
    policy_from(loaded.settings)
    studio = safe_url(loaded.settings.studio.api_base_url)
    return ok(f"{box.directory} is valid; {len(loaded.required)} required model(s); studio {studio}")


def check_permissions(box: Box) -> Result:
    """Whether the service's user can use its folders, whoever asks."""
    settings = box.config.settings
    state = settings.state.dir
    if not state.is_dir():
        return warning(f"{state} is not there yet", "the service makes it at its first start")
    owner = state.stat()
    who = _name(owner.st_uid)
    if owner.st_mode & 0o077:
        return failure(f"others may look into {state}", f"chmod 700 {state}")
    for path in _below(state, settings.models.root):
        try:
            found = path.lstat()
        except OSError:  # gone meanwhile, or hidden from us
            continue
        if found.st_uid != owner.st_uid:
            return failure(
                f"{path} belongs to {_name(found.st_uid)} and not to the service's user {who}",
                f"chown -R {who}: {path}",
            )
    for identity in (state / identity_name(1), *lane_identities(state)):
        if os.access(state, os.X_OK) and identity.exists() and identity.stat().st_mode & 0o077:
            return failure(f"others may read {identity}", f"chmod 600 {identity}")
    folders = [box.directory / name for name in ("", "conf.d", "models.d")]
    for path in (each for folder in folders for each in (folder, *sorted(folder.glob("*")))):
        if not _may_read(path, owner.st_uid):
            return failure(f"the service's user {who} may not read {path}", f"chmod a+rX {path}")
    if os.geteuid() in {0, owner.st_uid}:
        config.check_folders(settings, make=False)
    return ok(f"user {who} can use {state} and {settings.models.root}")


def check_nodes(box: Box) -> Result:
    if box.config.settings.worker.device == "cpu":
        return ok('not needed: device = "cpu"')
    if not has_nvidia_gpu(box.root):
        problem, _, cure = no_gpu(box.root).partition("; ")
        return failure(problem, f"look with lspci; {cure}")
    if missing := missing_nodes(box.root):
        problem, _, cure = (driver_problem(box.root) or "").partition("; ")
        return failure(
            problem or f"{', '.join(missing)} missing", cure or "reinstall the driver, then reboot"
        )
    return ok("the GPU's device nodes are there")


def check_driver(box: Box) -> Result:
    """The kernel module, its library, and whether they run the torch that is installed."""
    device = box.config.settings.worker.device
    if device == "cpu":
        return ok('not needed: device = "cpu"')
    driver = require_driver(box.root)
    driver.start()
    driver.check_torch(driver.gpu(gpu_index(device)).capability)
    module, library = (each or "of unknown version" for each in (module_version(box.root), driver.version))
    return ok(f"kernel module {module}, library {library}, CUDA {show(driver.cuda())}")


def check_compute(box: Box) -> Result:
    """torch computes something on the device, in a process of its own that may hang or crash."""
    if box.service is not None and box.service.device.used_bytes is not None:
        device = box.service.device
        return ok(f"the running service uses {device.name}, {show_bytes(device.used_bytes or 0)} in use")
    device_found = find_device(box.config.settings.worker.device)
    compiles = box.config.settings.worker.compile
    facts = probe(device_found.name, compiles=compiles, timeout_s=PROBE_LIMIT_S - 5)
    if not facts["ok"]:
        problem, _, cure = str(facts["error"]).rpartition("; ")
        return failure(problem or cure, cure)
    text = f"torch {facts['torch']} computes on {device_found.name} ({device_found.description})"
    if "memory_free_gb" in facts:
        text += f", {facts['memory_free_gb']:g} of {facts['memory_gb']:g} GB free"
    return ok(text)


def check_memory(box: Box) -> Result:
    lines = (box.root / "proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    available, total = kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    text = f"{show_bytes(available)} of {show_bytes(total)} available"
    if available < _LITTLE_MEMORY_BYTES:
        return warning(
            text, "models are loaded by way of memory: end what uses it, or give the machine more or swap"
        )
    return ok(text)


def check_disk_space(box: Box) -> Result:
    """Whether what is still to come fits, by the sizes that the models declare."""
    root = _existing(box.config.settings.models.root)
    free = shutil.disk_usage(root).free
    files = {content_key(file): file for model in box.config.required for file in model.files}
    coming = sum(
        file.approx_bytes or 0
        for file in files.values()
        if not (box.config.settings.models.root / content_key(file) / file.filename).exists()
    )
    text = f"{show_bytes(free)} free in {root}"
    if coming > free:
        return failure(
            f"{text}, and the required models need {show_bytes(coming)} more",
            "free some space, or name a folder on a larger disk as [models] root",
        )
    inodes = os.statvfs(root)
    if inodes.f_files and inodes.f_favail < 1000:
        return failure(f"{root} has no room for more files (inodes)", "remove files there")
    if free - coming < _LITTLE_DISK_BYTES:
        return warning(
            text, "`studio-worker models prune` removes on-demand models; or set [models] budget_gb"
        )
    return ok(text)


def check_disk_speed(box: Box) -> Result:
    """Write and read a sample in the models folder; nothing stays."""
    root = box.config.settings.models.root
    if not root.is_dir():
        return warning(f"{root} is not there yet", "the service makes it at its first start")
    if not os.access(root, os.W_OK):
        return warning(f"{root} cannot be written by this user", "run this as root or as the service's user")
    # Hidden, like what downloads leave, and without a name as soon as it is open.
    with tempfile.TemporaryFile(dir=root) as file:
        wrote = _per_second(_write(file.fileno()))
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read = _per_second(_read(file.fileno()))
    text = f"writes {show_bytes(wrote)}/s, reads {show_bytes(read)}/s in {root}"
    if min(wrote, read) < _SLOW_BYTES_PER_S:
        return warning(text, "models take minutes to load from such a disk: name another as [models] root")
    return ok(text)


def _write(file: int) -> Iterator[int]:
    piece = os.urandom(1 << 20)
    for _ in range(_SAMPLE_BYTES // len(piece)):
        count = os.write(file, piece)
        os.fdatasync(file)
        yield count


def _read(file: int) -> Iterator[int]:
    os.lseek(file, 0, os.SEEK_SET)
    while piece := os.read(file, 1 << 20):
        yield len(piece)


def _per_second(counts: Iterator[int]) -> float:
    began = time.monotonic()
    done = 0
    for count in counts:
        done += count
        if time.monotonic() - began > _SAMPLE_LIMIT_S:
            break
    return done / max(1e-6, time.monotonic() - began)


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _below(state: Path, models: Path) -> Iterator[Path]:
    """The service's own files, as far as we may look; of the models no more than their folders' entries."""
    for folder, folders, names in os.walk(state):
        if Path(folder) == models:
            folders.clear()
        yield from (Path(folder, name) for name in (*folders, *names))
    if models.is_dir() and os.access(models, os.R_OK):
        yield from models.iterdir()


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _may_read(path: Path, uid: int) -> bool:
    """Whether user ``uid`` may read ``path`` by its mode. Raises ConfigError where we may not even look."""
    try:
        found = path.stat()
    except FileNotFoundError:  # a dangling link is the configuration's own complaint
        return True
    except OSError as error:
        if os.geteuid() == uid:  # we are that user, and may not even look
            return False
        raise ConfigError(
            f"{path}: {error.strerror}", cure="run this as root or as the service's user"
        ) from error
    wanted = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
    if uid == 0:
        return True
    if found.st_uid == uid:
        return found.st_mode >> 6 & wanted == wanted
    if found.st_gid in _groups(uid):
        return found.st_mode >> 3 & wanted == wanted
    return found.st_mode & wanted == wanted


def _groups(uid: int) -> set[int]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return set()
    return {user.pw_gid, *(group.gr_gid for group in grp.getgrall() if user.pw_name in group.gr_mem)}
