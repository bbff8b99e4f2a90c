"""What a box without network can rely on: a bundle brings exactly the right bytes to the right places."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio_worker.demo.service_process import ServiceProcess
from studio_worker.errors import StoreError
from studio_worker.models import ModelFile, RequiredModel
from studio_worker.store import Store
from studio_worker.store.bundles import export_bundle, import_bundle
from studio_worker.store.terms import fixed
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, ServedFile, refused_url

QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0,))
SUFFIXES = pytest.mark.parametrize("suffix", ["", ".tar"])


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def model(*files: ServedFile, model_id: str = "sample", **changes: Any) -> RequiredModel:
    return RequiredModel(
        id=model_id,
        engine="sd-cpp",
        files=tuple(
            ModelFile(
                role="model",
                url=file.url,
                filename=file.url.rpartition("/")[2],
                **{"sha256": file.sha256, **changes},
            )
            for file in files
        ),
    )


@pytest.fixture
def required(server: FileServer) -> RequiredModel:
    """A model of two files."""
    return model(server.serve("/a.gguf", b"a" * 5000), server.serve("/b.gguf", b"b" * 300))


@pytest.fixture
def full(tmp_path: Path, required: RequiredModel) -> Store:
    """A box that has it."""
    store = Store(tmp_path / "full", fixed(QUICK, required=required.files))
    store.ensure(required.files, model=required.id)
    return store


def exported(full: Store, required: RequiredModel, dest: Path) -> Path:
    export_bundle(full, dest, [required])
    return dest


def rewrite(bundle: Path, change: Any) -> None:
    """Change the manifest of a bundle in a folder."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@SUFFIXES
def test_bundle_brings_a_model_to_another_box(
    full: Store, required: RequiredModel, tmp_path: Path, suffix: str
) -> None:
    """What one box exports another has verified after the import, without any request or reading again."""
    bundle = exported(full, required, tmp_path / f"bundle{suffix}")
    empty = Store(tmp_path / "empty", fixed(QUICK))

    manifest = import_bundle(empty, bundle)

    assert [file.filename for file in manifest.files] == ["a.gguf", "b.gguf"]
    assert all(Store(tmp_path / "empty").is_verified(file) for file in required.files)
    assert empty.path(required.files[0]).read_bytes() == b"a" * 5000
    assert {tuple(entry.models) for entry in empty.entries().values()} == {("sample",)}
    assert list((tmp_path / "empty" / ".staging").iterdir()) == []


def test_bundle_names_models_sources_and_hashes(full: Store, required: RequiredModel, tmp_path: Path) -> None:
    """The manifest holds the registry entry that models.d takes, and where each file came from."""
    bundle = exported(full, required, tmp_path / "bundle")

    manifest = json.loads((bundle / "manifest.json").read_text())

    assert RequiredModel.model_validate(manifest["models"][0]) == required
    assert [(file["url"], file["sha256"]) for file in manifest["files"]] == [
        (file.url, file.sha256) for file in required.files
    ]
    assert {path.name for path in (bundle / "files").iterdir()} == {file.sha256 for file in required.files}


@SUFFIXES
def test_bundle_carries_one_content_once(server: FileServer, tmp_path: Path, suffix: str) -> None:
    """A content under two names, and one whose source names no hash, arrive under all their names."""
    served = server.serve("/a.bin", b"a" * 5000)
    twin = server.serve("/twin.bin", b"a" * 5000)
    models = [model(served, twin), model(twin, model_id="unhashed", sha256=None)]
    full = Store(tmp_path / "full", fixed(QUICK))
    for each in models:
        full.ensure(each.files, model=each.id)
    bundle = tmp_path / f"bundle{suffix}"
    export_bundle(full, bundle, models)

    empty = Store(tmp_path / "empty", fixed(QUICK))
    import_bundle(empty, bundle)

    assert all(empty.is_verified(file) for each in models for file in each.files)
    assert len({empty.path(file).stat().st_ino for each in models for file in each.files}) == 1


def test_export_takes_on_demand_models_by_name(full: Store, required: RequiredModel, tmp_path: Path) -> None:
    """A model that only jobs have brought can be exported too; one that is not here is an error."""
    export_bundle(full, tmp_path / "bundle", [], ["sample"])
    assert len(list((tmp_path / "bundle" / "files").iterdir())) == 2

    with pytest.raises(StoreError, match="no model 'other' on this box"):
        export_bundle(full, tmp_path / "other", [], ["other"])


def test_export_of_nothing_is_refused(full: Store, tmp_path: Path) -> None:
    """Where models.d requires nothing, an empty bundle is not carried to another box."""
    with pytest.raises(StoreError, match="say which ones"):
        export_bundle(full, tmp_path / "bundle.tar", [])
    assert not (tmp_path / "bundle.tar").exists()


def test_export_refuses_what_is_not_verified(required: RequiredModel, tmp_path: Path) -> None:
    """A required model that is not here is not exported; the text says how to get it."""
    with pytest.raises(StoreError, match="models pull"):
        export_bundle(Store(tmp_path / "empty"), tmp_path / "bundle", [required])


@SUFFIXES
def test_export_finds_damage_before_it_travels(
    full: Store, required: RequiredModel, tmp_path: Path, suffix: str
) -> None:
    """A file that rotted on this box is named, and no bundle is left that looks whole."""
    path = full.path(required.files[0])
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(StoreError, match=r"a\.gguf is damaged"):
        export_bundle(full, tmp_path / f"bundle{suffix}", [required])

    assert not (tmp_path / "bundle" / "manifest.json").exists()
    assert not (tmp_path / "bundle.tar").exists()


def test_export_leaves_other_folders_alone(full: Store, required: RequiredModel, tmp_path: Path) -> None:
    """A folder that holds something else is no place for a bundle."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")

    with pytest.raises(StoreError, match="is not empty"):
        export_bundle(full, tmp_path / "home", [required])

    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


@SUFFIXES
def test_import_refuses_a_damaged_file_by_name(
    full: Store, required: RequiredModel, tmp_path: Path, suffix: str
) -> None:
    """One flipped byte is found, the file named, and none of it stays; a sound bundle then completes it."""
    bundle = exported(full, required, tmp_path / f"bundle{suffix}")
    damaged = bundle if suffix else bundle / "files" / str(required.files[1].sha256)
    content = bytearray(damaged.read_bytes())
    content[content.rindex(b"b" * 300)] ^= 1
    damaged.unlink()  # it may share its inode with the box it came from
    damaged.write_bytes(content)
    empty = Store(tmp_path / "empty", fixed(QUICK))

    with pytest.raises(StoreError, match=r"\(b\.gguf\) is damaged"):
        import_bundle(empty, bundle)
    assert not empty.path(required.files[1]).exists()
    assert empty.is_verified(required.files[0])
    inode = empty.path(required.files[0]).stat().st_ino

    import_bundle(empty, exported(full, required, tmp_path / f"again{suffix}"))
    assert all(empty.is_verified(file) for file in required.files)
    assert empty.path(required.files[0]).stat().st_ino == inode


def test_import_refuses_a_cut_tar(full: Store, required: RequiredModel, tmp_path: Path) -> None:
    """A tar file whose copy was broken off is refused by its name."""
    bundle = exported(full, required, tmp_path / "bundle.tar")
    os.truncate(bundle, bundle.stat().st_size // 2)

    with pytest.raises(StoreError, match=r"bundle\.tar"):
        import_bundle(Store(tmp_path / "empty"), bundle)


def test_fault_of_a_manifest_is_said_in_an_operators_words(tmp_path: Path) -> None:
    """What is wrong in a manifest is said without the library's words."""
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "manifest.json").write_text('{"format": 1, "files": 3}')
    with pytest.raises(StoreError, match=r"manifest\.json: files: must be a list"):
        import_bundle(Store(tmp_path / "models"), tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["nothing", "text", "folder", "manifest"])
def test_import_refuses_what_is_no_bundle(tmp_path: Path, kind: str) -> None:
    """A wrong path is one sentence that names it."""
    source = tmp_path / "wrong"
    if kind == "text":
        source.write_text("hello")
    elif kind != "nothing":
        source.mkdir()
    if kind == "manifest":
        (source / "manifest.json").write_text('{"format": 2, "files": []}')

    with pytest.raises(StoreError, match=r"/wrong: (No such file|is no bundle|manifest\.json: format: )"):
        import_bundle(Store(tmp_path / "empty"), source)


def tar_header(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """A header of a tar file, its size in binary as GNU tar has large ones, and what follows it."""
    header = bytearray(512)
    header[:1], header[156:157], header[257:265] = b"a", kind, b"ustar\x0000"
    header[124:136] = (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * ord(" "))
    return bytes(header) + content + bytes(-len(content) % 512)


ODD_TARS = {
    "a size below zero": tar_header(b"0", 0) + tar_header(b"0", -512),
    "a size below zero in its notes": tar_header(b"x", 14, b"14 size=-2048\n") + tar_header(b"0", 0),
    "a size beyond any disk": tar_header(b"0", 2**80),
    "a name beyond memory": tar_header(b"L", 2**45),
    "a name of 2 MB": tar_header(b"L", 2 * 2**20, b"x" * 2 * 2**20) + tar_header(b"0", 0),
    "names of names": 2000 * tar_header(b"L", 2, b"bc") + tar_header(b"0", 0),
    "holes that are no numbers": tar_header(b"x", 20, b"20 GNU.sparse.map=x\n") + tar_header(b"0", 0),
    "30,000 members": 30_000 * tar_header(b"0", 0),
}


@pytest.mark.parametrize("kind", ODD_TARS)
def test_import_refuses_a_tar_that_would_lead_its_reader_astray(kind: str, tmp_path: Path) -> None:
    """Headers with which Python's own reader never ends, takes all memory or fails are a damaged bundle."""
    path = tmp_path / "bundle.tar"
    path.write_bytes(ODD_TARS[kind] + bytes(1024))
    # For a mended Python (CVE-2025-8194) a tar file ends before such a header.
    with pytest.raises(
        StoreError, match=r"bundle\.tar: (is no bundle, or a damaged one|manifest\.json is miss)"
    ):
        import_bundle(Store(tmp_path / "empty"), path)


@SUFFIXES
def test_import_takes_no_more_than_was_announced(
    full: Store, required: RequiredModel, tmp_path: Path, suffix: str
) -> None:
    """A file that is longer than the manifest says, for which no room was made, is not even read."""
    bundle = exported(full, required, tmp_path / "bundle")
    rewrite(bundle, lambda manifest: manifest["files"][0].update(size=1))
    if suffix:
        with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
            tar.add(bundle, "")
    read: list[object] = []

    with pytest.raises(StoreError, match="is damaged"):
        import_bundle(
            Store(tmp_path / "empty"), tmp_path / f"bundle{suffix}", lambda *said: read.append(said)
        )

    assert not read
    assert not list((tmp_path / "empty").rglob("*.gguf"))


def test_import_follows_no_link_out_of_the_bundle(
    full: Store, required: RequiredModel, tmp_path: Path
) -> None:
    """A bundle cannot make root read another file by a symbolic link."""
    bundle = exported(full, required, tmp_path / "bundle")
    member = bundle / "files" / str(required.files[0].sha256)
    member.rename(tmp_path / "outside")
    member.symlink_to(tmp_path / "outside")

    with pytest.raises(StoreError):
        import_bundle(Store(tmp_path / "empty"), bundle)

    assert not list((tmp_path / "empty").rglob("*.gguf"))


def test_import_refuses_a_tar_member_that_is_no_file(required: RequiredModel, tmp_path: Path) -> None:
    """A link inside a tar file is refused by its name."""
    file = required.files[0]
    manifest = json.dumps(
        {
            "files": [
                {
                    "content": file.sha256,
                    "filename": "a",
                    "sha256": file.sha256,
                    "size": 1,
                    "url": file.url,
                }
            ]
        }
    )
    (tmp_path / "manifest.json").write_text(manifest)
    with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
        tar.add(tmp_path / "manifest.json", "manifest.json")
        link = tarfile.TarInfo(f"files/{file.sha256}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)

    with pytest.raises(StoreError, match=f"files/{file.sha256} is not a plain file"):
        import_bundle(Store(tmp_path / "empty"), tmp_path / "bundle.tar")


LEAVING = st.one_of(
    st.sampled_from(["..", ".", "", "../x", "/etc/x", "a/b", "a\\b", "a\0b", "a\nb", "x" * 256]),
    st.tuples(st.text(), st.sampled_from(["/", "\\", "\0", "\n"]), st.text()).map("".join),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=LEAVING, field=st.sampled_from(["filename", "content", "sha256"]))
def test_import_refuses_names_that_leave_the_folder(tmp_path: Path, name: str, field: str) -> None:
    """Whatever a manifest calls its files, none goes anywhere but below the models folder."""
    bundle = tmp_path / "bundle"
    (bundle / "files").mkdir(parents=True, exist_ok=True)
    entry = {"content": "0" * 64, "filename": "a", "sha256": "0" * 64, "size": 1, "url": "", field: name}
    (bundle / "manifest.json").write_text(json.dumps({"files": [entry]}))

    with pytest.raises(StoreError, match=r"manifest\.json: files\.0"):
        import_bundle(Store(tmp_path / "models"), bundle)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "models"]


def test_import_respects_the_budget(full: Store, required: RequiredModel, tmp_path: Path) -> None:
    """A bundle that the budget cannot hold is refused before anything is copied."""
    bundle = exported(full, required, tmp_path / "bundle")

    with pytest.raises(StoreError, match="budget_gb"):
        import_bundle(Store(tmp_path / "empty", fixed(budget_bytes=5100)), bundle)

    assert not list((tmp_path / "empty").rglob("*.gguf"))


def test_import_to_a_full_disk_says_so(
    full: Store, required: RequiredModel, tmp_path: Path, small_disk: Path
) -> None:
    """A disk that fills during the copy is named, keeps what is whole, and the import can be repeated."""
    bundle = exported(full, required, tmp_path / "bundle.tar")
    ballast = small_disk / "ballast"
    empty = Store(small_disk / "models", spare_bytes=0)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass

    with pytest.raises(StoreError, match=f"{small_disk}/models.*(space|fetch|missing)"):
        import_bundle(empty, bundle)

    ballast.unlink()
    import_bundle(empty, bundle)
    assert all(empty.is_verified(file) for file in required.files)


@SUFFIXES
def test_box_without_network_reaches_ready_from_a_bundle(
    full: Store, required: RequiredModel, tmp_path: Path, suffix: str
) -> None:
    """The real service starts with a required model from a bundle, though no server can be reached."""
    bundle = exported(full, required, tmp_path / f"bundle{suffix}")
    config = tmp_path / "etc"
    (config / "models.d").mkdir(parents=True)
    (config / "config.toml").write_text(
        f'[studio]\napi_base_url = "{refused_url()}"\n[worker]\ndevice = "cpu"\n'
        f'[models]\nroot = "{tmp_path}/models"\n[state]\ndir = "{tmp_path}/state"\n'
        f'runtime_dir = "{tmp_path}/run"\n'
    )
    (manifest,) = import_bundle(Store(tmp_path / "models"), bundle).models
    for file in manifest["files"]:
        file["url"] = refused_url()
    (config / "models.d" / "sample.json").write_text(json.dumps(manifest))

    with ServiceProcess(config, tmp_path / "log") as running:
        running.await_message("READY=1", 60)
        assert running.stop() == 0


@SUFFIXES
def test_bundle_holds_no_secret_of_an_address(server: FileServer, tmp_path: Path, suffix: str) -> None:
    """A bundle goes to other people: what an address holds for this box alone stays here."""
    file = server.serve("/a.gguf", b"a" * 500)
    plain = model(file).files[0]
    secret = RequiredModel(
        id="sample",
        engine="sd-cpp",
        files=(replace(plain, url=f"{file.url}?token=TOPSECRET"),),
    )
    store = Store(tmp_path / "full", fixed(QUICK, required=secret.files))
    store.ensure(secret.files, model=secret.id)

    bundle = exported(store, secret, tmp_path / f"bundle{suffix}")

    files = [bundle] if bundle.is_file() else [path for path in bundle.rglob("*") if path.is_file()]
    assert not any(b"TOPSECRET" in path.read_bytes() for path in files)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_bundle_that_was_packed_again_is_taken(
    full: Store, required: RequiredModel, tmp_path: Path, mode: str
) -> None:
    """Who packs a bundle's folder with tar, compressed or with its names from ``./`` on, has a bundle."""
    folder = exported(full, required, tmp_path / "bundle")
    packed = tmp_path / "bundle.tar"
    with tarfile.open(packed, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, ".")
    box = Store(tmp_path / "box", fixed(QUICK, required=required.files))

    import_bundle(box, packed)

    assert all(box.is_verified(file) for file in required.files)
