"""What is in a package, as CycloneDX: the libraries that its lock file pins, and the interpreter it carries.

Run by release.py with the tools of `make release`. The same package gives the same bytes, and what is written
keeps to the standard's schema.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def field(deb: Path, name: str) -> str:
    """A field of the package's control file; empty where it has none."""
    command = ["dpkg-deb", "--field", str(deb), name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def component(kind: ComponentType, purl: PackageURL, sha256: str | None) -> Component:
    """One part, known by its package URL."""
    hashes = [] if sha256 is None else [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]
    return Component(
        type=kind, name=purl.name, version=purl.version, purl=purl, bom_ref=str(purl), hashes=hashes
    )


def parts(deb: Path, lock: Path) -> Iterator[Component]:
    """What the package carries; a library's hash is that of the wheel it came in."""
    for name, version, sha256 in re.findall(
        r"^(\S+)==(\S+) --hash=sha256:(\S+)$", lock.read_text(), re.MULTILINE
    ):
        yield component(ComponentType.LIBRARY, PackageURL("pypi", None, name, version), sha256)
    for name, version in re.findall(r"(\S+) \(= (\S+)\)", field(deb, "Built-Using")):
        source = PackageURL("deb", "debian", name, version, {"arch": "source"})
        yield component(ComponentType.PLATFORM, source, None)


def describe(deb: Path, lock: Path, epoch_s: int) -> Bom:
    """The whole of it."""
    with deb.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    itself = PackageURL(
        "deb", None, field(deb, "Package"), field(deb, "Version"), {"arch": field(deb, "Architecture")}
    )
    whole = component(ComponentType.APPLICATION, itself, sha256)
    whole.description = field(deb, "Description").splitlines()[0]
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{sha256}"),
        metadata=BomMetaData(component=whole, timestamp=datetime.fromtimestamp(epoch_s, UTC)),
        components=parts(deb, lock),
    )
    bom.register_dependency(whole, bom.components)
    return bom


def main() -> None:
    """``sbom.py DEB LOCK EPOCH OUTPUT``."""
    deb, lock, epoch, target = sys.argv[1:]
    text = JsonV1Dot6(describe(Path(deb), Path(lock), int(epoch))).output_as_string(indent=1)
    if (wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        sys.exit(f"{target} would not be CycloneDX: {wrong}")
    Path(target).write_text(text + "\n")


if __name__ == "__main__":
    main()
