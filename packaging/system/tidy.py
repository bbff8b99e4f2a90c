"""Take out of a site-packages folder what the packages do not need: ``tidy.py FOLDER``.

Whatever is removed here is neither imported by the libraries themselves nor by the service; the tests that
run against the installed packages would tell.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TESTS_OF = ("mpmath", "networkx", "numpy", "sympy")
"""Their own test suites are large, and import nothing that is not imported without them."""

REMOVED = (
    "bin",  # commands of the libraries, for the interpreter that built the package
    "boto3/examples",
    "share",  # their manuals
    # Half of it: the module for Python brings the runtime itself; the others convert and quantise graphs.
    "onnxruntime/capi/libonnxruntime.so.*",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "torch/include",  # for compiling against torch
    "torch/share",
    "torch/test",
    "tqdm/completion.sh",  # for a command of its own
)

SERVICES = {"s3", "signin", "sso", "sso-oidc", "sts"}
"""Of the 400 that botocore describes in 26 MB: storage, and where its credentials come from."""

KEPT_COMMANDS = {"torch_shm_manager"}
"""Of ``torch/bin``, which holds torch's own tests beside it: what ``import torch`` looks for."""


def main(folder: Path) -> None:
    """Tidy ``folder``."""
    for removed in [path for name in REMOVED for path in sorted(folder.glob(name))]:
        if removed.is_file():
            removed.unlink()
        else:
            shutil.rmtree(removed, ignore_errors=True)
    for command in (folder / "torch" / "bin").glob("*"):
        if command.is_dir():
            shutil.rmtree(command)
        elif command.name not in KEPT_COMMANDS:
            command.unlink()
    for service in (folder / "botocore" / "data").glob("*"):
        if service.is_dir() and service.name not in SERVICES:
            shutil.rmtree(service)
    for library in TESTS_OF:
        for tests in sorted((folder / library).rglob("tests")):
            shutil.rmtree(tests, ignore_errors=True)
    for path in folder.rglob("*"):  # some wheels mark texts and modules as commands
        if (
            path.is_file()
            and ".so" not in path.name
            and path.name not in KEPT_COMMANDS
            and not _is_program(path)
        ):
            path.chmod(0o644)
    for record in folder.glob("*.dist-info/direct_url.json"):  # names the folder the wheel lay in
        record.unlink()
    for record in folder.glob("*.dist-info/RECORD"):
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if (folder / line.split(",")[0]).exists()))


def _is_program(path: Path) -> bool:
    """Whether it is machine code, such as what torch's compilers call."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
