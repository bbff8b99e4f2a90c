"""What disks do to a download."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from studio_worker.download import download_file
from studio_worker.errors import DownloadError
from tests.fakes.servers import FileServer
from tests.lab.downloads import (
    BIG,
    BODY,
    QUICK,
    files_in,
    staged,
    warnings,
)

FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from studio_worker.transfer.policy import Policy
from studio_worker.download import download_file
from studio_worker.errors import DownloadError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    download_file(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3] or None, policy=Policy(delays_s=(0.0,)))
except DownloadError as error:
    print(error.reason, "|", error)
"""


@pytest.mark.parametrize("is_kept", [True, False])
def test_download_tells_when_the_disk_takes_no_more(
    server: FileServer, tmp_path: Path, is_kept: bool
) -> None:
    """A disk that refuses bytes is an error with the disk's reason; what cannot be resumed is removed."""
    file = server.serve("/model.bin", BIG, etag=None)
    arguments = [file.url, str(tmp_path / "m"), file.sha256 if is_kept else ""]

    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=True
    )

    assert child.stdout.startswith("store | ")
    assert "File too large" in child.stdout
    assert "[models] root" in child.stdout
    assert len(file.requests) == 1
    assert not (tmp_path / "m").exists()
    assert len(list(tmp_path.rglob("*.part"))) == is_kept


def test_download_ends_well_where_the_staging_folder_is_a_disk_of_its_own(
    server: FileServer, tmp_path: Path
) -> None:
    """What cannot be renamed into its place, because another file system lies between, is copied there."""
    staging = tmp_path / ".staging"
    staging.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(staging)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        file = server.serve("/model.bin", BIG)
        download_file(file.url, tmp_path / "m", sha256=file.sha256, policy=QUICK)
        assert (tmp_path / "m").read_bytes() == BIG
        assert files_in(tmp_path) == {"m"}
    finally:
        subprocess.run(["umount", str(staging)], check=True)


def test_download_tells_when_the_disk_is_full(server: FileServer, tmp_path: Path) -> None:
    """A full disk is an error that says so and names the folder; what has come is kept."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("a file system of half a megabyte cannot be mounted here")
    try:
        file = server.serve("/model.bin", BIG, chunked=True)  # its length is not told before
        with pytest.raises(DownloadError, match="no space left on the disk of") as failure:
            download_file(file.url, mounted / "m", sha256=file.sha256, policy=QUICK)
        assert str(mounted) in str(failure.value)
        assert len(file.requests) == 1
        assert not (mounted / "m").exists()
        assert staged(mounted).stat().st_size > 100_000
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_download_tells_when_its_folder_cannot_be_made(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be made is an error of the download like any other."""
    (tmp_path / "file").write_bytes(b"")
    file = server.serve("/model.bin", BODY)

    with pytest.raises(DownloadError, match="Not a directory"):
        download_file(file.url, tmp_path / "file" / "models" / "m")

    assert len(warnings(logged)) == 1
    assert file.requests == []
