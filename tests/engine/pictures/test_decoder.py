"""Pictures from outside are decoded in a process of their own, within limits of memory and time."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio_worker.engine import Inputs, images
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.pictures.decoder import Decoder
from studio_worker.errors import JobCancelled, JobError, JobImpossible
from studio_worker.jobs import Cancel
from tests.lab.engine import encoded, request, scene

WHOLE = encoded(scene())


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    """One with little of both."""
    tight = Decoder(memory_bytes=100_000_000, cpu_s=1)
    yield tight
    tight.close()


@cache
def scan_bomb() -> bytes:
    """A progressive JPEG of 400 kB, in which one empty scan over 9 million pixels comes again and again."""
    out = io.BytesIO()
    Image.new("L", (3000, 3000), 128).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:end] + data[last:end] * 5000 + data[end:]


def children() -> list[int]:
    """The processes that this one has started, without those of other tests."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"decoder_child" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


def go_on() -> None:
    pass


def test_picture_that_takes_too_long_is_refused_for_good() -> None:
    """A file that would be decoded for minutes is stopped, and told as the job's fault; the next is read."""
    quick = Decoder(cpu_s=1)
    with pytest.raises(JobImpossible, match="the mask takes more than 1 s to decode"):
        quick.decode(scan_bomb(), "mask", "white", go_on)
    assert quick.decode(WHOLE, "mask", "white", go_on).tobytes() == scene().tobytes()
    quick.close()


def test_picture_that_takes_too_much_memory_is_refused_for_good(decoder: Decoder) -> None:
    """A small file that unpacks to more than a picture may take is told as the job's fault; the next goes."""
    large = encoded(Image.new("RGB", (7000, 7000)))
    with pytest.raises(JobImpossible, match=r"the mask takes more than 0\.1 GB of memory to decode"):
        decoder.decode(large, "mask", "white", go_on)
    assert decoder.decode(WHOLE, "mask", "white", go_on).size == (64, 64)


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_largest_pictures_are_decoded(mode: str) -> None:
    """Whatever its numbers, a picture of 64 million pixels fits into the limits."""
    picture = (
        Image.fromarray(np.zeros((8000, 8000), dtype=np.uint16))
        if mode == "I;16"
        else Image.new(mode, (8000, 8000))
    )
    data = encoded(picture, compress_level=1)
    del picture
    assert images.decode_reference(data).size == (8000, 8000)


@pytest.mark.parametrize("use", ["decode_picture", "decode_mask", "decode_reference"])
def test_large_picture_is_here_once(use: str) -> None:
    """Beside the process that decodes it, a picture of 25 million pixels takes what it is and little more."""
    script = """
import io, json, re, sys
from pathlib import Path
from PIL import Image
from studio_worker.engine import images
def highest_mb():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
def taken(side):
    data = io.BytesIO()
    Image.new("1", (side, side), 1).save(data, "PNG")
    use = getattr(images, sys.argv[1])
    use(*{"decode_picture": (data.getvalue(), "picture", 64, 48), "decode_mask": (data.getvalue(), 64, 48),
        "decode_reference": (data.getvalue(),)}[sys.argv[1]])
    return highest_mb()
taken(64)
before, after = highest_mb(), taken(5000)
images.close()
print(after - before)
"""
    done = subprocess.run([sys.executable, "-c", script, use], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 6 * 25  # Pillow has four bytes for each pixel of RGB, and one of grey


def test_decoding_ends_when_the_job_is_cancelled() -> None:
    """A worker that stops does not wait for a picture that is decoded for a long time."""
    cancel = Cancel()
    cancel.set("the worker is stopping")
    decoder = Decoder()
    with pytest.raises(JobCancelled, match="stopping"):
        decoder.decode(scan_bomb(), "mask", "white", cancel.check)
    assert decoder.decode(WHOLE, "mask", "white", go_on).size == (64, 64)
    decoder.close()


def test_decoder_that_is_killed_costs_one_try() -> None:
    """Where the system ends the process, the job may be tried again, here too; an idle one is replaced."""

    def kill() -> None:
        for child in children():
            os.kill(child, signal.SIGKILL)

    images.close()
    decoder = Decoder()
    with pytest.raises(JobError, match=r"the process for it ended \(SIGKILL\)") as caught:
        decoder.decode(scan_bomb(), "mask", "white", kill)
    assert caught.value.retryable
    assert decoder.decode(WHOLE, "mask", "white", go_on).size == (64, 64)
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert decoder.decode(WHOLE, "mask", "white", go_on).size == (64, 64)
    decoder.close()


def test_decoder_holds_no_secret(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What decodes foreign pictures has no token in its environment, no open file of the worker, no torch."""
    monkeypatch.setenv("STUDIO_WORKER_TOKEN", "hunter2")
    images.close()
    with (tmp_path / "open").open("w"):
        decoder.decode(WHOLE, "mask", "white", go_on)
        (child,) = children()
        folder = Path(f"/proc/{child}")
        assert b"hunter2" not in (folder / "environ").read_bytes()
        assert {entry.name for entry in (folder / "fd").iterdir()} == {"0", "1", "2"}
        assert "libtorch" not in (folder / "maps").read_text()


def test_job_with_such_a_picture_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine refuses the job, and the studio is told that no worker can do it."""
    monkeypatch.setattr(images, "_DECODER", Decoder(cpu_s=1))
    asked = request(init_image_url="https://example.org/p.jpg", inputs=Inputs(init_image=scan_bomb()))
    with pytest.raises(JobImpossible, match="the initial picture takes more than 1 s") as caught:
        DiffusionEngine("cpu").generate(asked, lambda done, total: None, Cancel())
    assert not caught.value.retryable
    images.close()


def test_pictures_are_decoded_where_the_package_is_no_installed_one(tmp_path: Path) -> None:
    """The process finds the package of the one that starts it, from a source tree that nothing else names."""
    (tmp_path / "studio_worker").symlink_to(Path(images.__file__).parents[1])
    (tmp_path / "picture").write_bytes(WHOLE)
    # Python imports it at its start from wherever it looks for packages.
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'looked')!r}, 'w').close()")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from studio_worker.engine import images; "
        "print(images.decode_reference(open('picture', 'rb').read()).size, images.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == f"{scene().size} {tmp_path}/studio_worker/engine/images.py\n"
    assert (tmp_path / "looked").exists()
