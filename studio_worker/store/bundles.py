"""Bundles: models carried to a box without network, as a folder or a tar file.

A bundle holds ``files/<sha256>`` and ``manifest.json``, which says what each of them is. What comes in is
believed only when its hash is right, and goes to no name that the manifest could choose freely. Every file
is placed by itself, so that an import that was broken off is simply run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from studio_worker.box.owner import written_by_caller
from studio_worker.errors import StoreError
from studio_worker.files import fsync_directory, open_plain, write_atomic
from studio_worker.models import FileName, ModelFile, RequiredModel, Sha256
from studio_worker.network.urls import safe_url
from studio_worker.store.copying import HashingReader, bring, copy, is_ours, temporary
from studio_worker.store.ledger import file_name, is_file_name
from studio_worker.store.store import Store, store_errors
from studio_worker.store.tars import open_tar
from studio_worker.wording import fault

Told = Callable[["BundledFile", int], None]
"""Called as bytes of a file are read: (file, bytes so far)."""

_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024


class BundledFile(BaseModel):
    """One file of a bundle; ``content`` is its folder in a models folder."""

    model_config = ConfigDict(frozen=True)

    content: str
    filename: FileName
    sha256: Sha256
    size: int = Field(ge=0)
    url: str
    models: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_its_own_place(self) -> BundledFile:
        is_by_url = self.content.startswith("url-")
        if not is_file_name(self.name) or not (is_by_url or self.content == self.sha256):
            raise ValueError("its content is neither its sha256 nor the key of a URL")
        return self

    @property
    def name(self) -> str:
        return f"{self.content}/{self.filename}"

    @property
    def member(self) -> str:
        """Where its bytes are in the bundle."""
        return f"files/{self.sha256}"


class Manifest(BaseModel):
    """What a bundle holds. ``models`` are the registry entries of its required models, as in ``models.d``."""

    format: Literal[1] = 1
    models: tuple[dict[str, Any], ...] = ()
    files: tuple[BundledFile, ...]


def export_bundle(
    store: Store,
    dest: Path,
    required: Sequence[RequiredModel],
    models: Sequence[str] = (),
    told: Told | None = None,
    *,
    tar: IO[bytes] | None = None,
) -> Manifest:
    """Write a bundle of ``models``, or of every required model, to ``dest`` (a tar file if it ends so).

    Args:
        tar: the tar file, opened by the caller, in place of ``dest``.

    Raises:
        StoreError: a file is not here or damaged, or ``dest`` cannot be written.
    """
    manifest = _chosen(store, required, models)
    with store_errors(dest), store.holding(file.name for file in manifest.files):
        if tar is not None:
            _write_tar(store, tar, manifest, told)
        elif dest.suffix == ".tar":
            with written_by_caller(dest, None) as file:
                _write_tar(store, file, manifest, told)
        else:
            _write_folder(store, dest, manifest, told)
    return manifest


def import_bundle(
    store: Store, source: Path, told: Told | None = None, *, tar: IO[bytes] | None = None
) -> Manifest:
    """Verify and place every file of the bundle ``source``; what is here already is not read.

    Args:
        tar: the tar file ``source``, opened by the caller.

    Raises:
        StoreError: the bundle is damaged or no bundle, or there is no room for it.
    """
    with store_errors(source), _opened(source, tar) as bundle:
        manifest = _read_manifest(source, bundle)
        coming = [file for file in manifest.files if not store.holds(file.name, file.sha256)]
        store.make_room(
            ModelFile(
                role="model",
                url=file.url,
                filename=file.filename,
                approx_bytes=file.size,
                sha256=file.sha256,
            )
            for file in coming
        )
        for file in coming:  # room was made for what the manifest says
            if _size(source, bundle, file.member) != file.size:
                raise _damaged_bundle(source, file)
        placed: dict[str, Path] = {}
        for file in coming:
            with temporary(store.root / ".staging") as path:
                twin = placed.get(file.sha256)
                here = twin or (source / file.member if bundle is None else None)
                if here is not None:
                    digest = bring(here, path, _of(file, told), may_link=is_ours(here, store.root))
                else:
                    assert bundle is not None
                    digest = copy(_member(source, bundle, file.member), path, _of(file, told))
                if digest != file.sha256:
                    raise _damaged_bundle(source, file)
                store.adopt(file.name, path, file.sha256, file.url, file.models)
            placed[file.sha256] = store.root / file.name
    return manifest


# --- out ---


def _chosen(store: Store, required: Sequence[RequiredModel], models: Sequence[str]) -> Manifest:
    entries = store.entries()
    by_id = {model.id: model for model in required}
    if not models and not by_id:
        raise StoreError("models.d requires none; say which ones: studio-worker models export DEST MODEL…")
    owners: dict[str, list[str]] = {}
    for model in models or by_id:
        names = [file_name(file) for file in by_id[model].files] if model in by_id else []
        names = names or [name for name, entry in entries.items() if model in entry.models]
        if not names and model not in by_id:
            raise StoreError(
                f"no model {model!r} on this box; `studio-worker models list` shows what is here"
            )
        for name in names:
            owners.setdefault(name, []).append(model)
    files = []
    for name, ids in owners.items():
        entry = entries.get(name)
        if entry is None or not store.holds(name, entry.sha256):
            raise StoreError(f"{store.root / name} is not verified; run `studio-worker models pull` first")
        content, _, filename = name.partition("/")
        files.append(
            BundledFile(
                content=content,
                filename=filename,
                sha256=entry.sha256,
                size=entry.size,
                url=entry.url,
                models=tuple(ids),
            )
        )
    chosen = [by_id[model] for model in (models or by_id) if model in by_id]
    return Manifest(models=tuple(_public(model) for model in chosen), files=tuple(files))


def _public(model: RequiredModel) -> dict[str, Any]:
    """As models.d has it, but for what its addresses hold for this box alone: a token, a user, a query."""
    source = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    for file in source["files"]:
        file["url"] = safe_url(file["url"])
    return source


def _text(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode()


def _contents(manifest: Manifest) -> list[BundledFile]:
    """One file for each content."""
    return list({file.sha256: file for file in manifest.files}.values())


def _write_folder(store: Store, dest: Path, manifest: Manifest, told: Told | None) -> None:
    if dest.exists() and any(dest.iterdir()) and not (dest / _MANIFEST).exists():
        raise StoreError(f"{dest} is not empty and holds no bundle; name another folder")
    (dest / "files").mkdir(parents=True, exist_ok=True)
    for file in _contents(manifest):
        with temporary(dest / "files") as path:
            digest = bring(store.root / file.name, path, _of(file, told), may_link=True)
            if digest != file.sha256:
                raise _damaged(store, file)
            path.replace(dest / file.member)
    fsync_directory(dest / "files")
    write_atomic(dest / _MANIFEST, _text(manifest), mode=0o644)


def _write_tar(store: Store, file: IO[bytes], manifest: Manifest, told: Told | None) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        text = _text(manifest)
        tar.addfile(_header(_MANIFEST, len(text)), io.BytesIO(text))
        for each in _contents(manifest):
            with os.fdopen(open_plain(store.root / each.name, os.O_RDONLY), "rb") as opened:
                reader = HashingReader(opened, _of(each, told))
                tar.addfile(_header(each.member, each.size), reader)
            if reader.digest.hexdigest() != each.sha256:
                raise _damaged(store, each)


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header


def _damaged(store: Store, file: BundledFile) -> StoreError:
    return StoreError(f"{store.root / file.name} is damaged; run `studio-worker models verify` first")


# --- in ---


@contextlib.contextmanager
def _opened(source: Path, file: IO[bytes] | None) -> Iterator[tarfile.TarFile | None]:
    """The tar file ``source``, or ``None`` where it is a folder."""
    if file is None and source.is_dir():
        if not (source / _MANIFEST).exists():
            raise StoreError(f"{source}: is no bundle: it holds no {_MANIFEST}")
        yield None
        return
    with open_tar(source, file) as tar:
        yield tar


def _size(source: Path, bundle: tarfile.TarFile | None, name: str) -> int:
    """How long a member is, before anything of it is read."""
    return (source / name).lstat().st_size if bundle is None else _header_of(source, bundle, name).size


def _damaged_bundle(source: Path, file: BundledFile) -> StoreError:
    return StoreError(f"{source}: {file.member} ({file.filename}) is damaged; copy it again")


def _read_manifest(source: Path, bundle: tarfile.TarFile | None) -> Manifest:
    opened = (source / _MANIFEST).open("rb") if bundle is None else _member(source, bundle, _MANIFEST)
    with opened as file:
        text = file.read(_MAX_MANIFEST_BYTES)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{source}: {_MANIFEST}: {where}: {fault(first)}") from error


def _header_of(source: Path, bundle: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    header = None
    for spelling in (name, f"./{name}"):  # the second as `tar -C folder .` has it
        with contextlib.suppress(KeyError):
            header = header or bundle.getmember(spelling)
    if header is None:
        raise StoreError(f"{source}: {name} is missing")
    if not header.isreg():
        raise StoreError(f"{source}: {name} is not a plain file")
    return header


def _member(source: Path, bundle: tarfile.TarFile, name: str) -> IO[bytes]:
    file = bundle.extractfile(_header_of(source, bundle, name))
    assert file is not None  # it is a plain file
    return file


def _of(file: BundledFile, told: Told | None) -> Callable[[int], None] | None:
    return None if told is None else partial(told, file)
