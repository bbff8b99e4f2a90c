"""What keeps the pictures, by the name that an operator gives it."""

from __future__ import annotations

import importlib
from pathlib import Path

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures.folder import Folder
from studio_worker.local_studio.pictures.port import Pictures


def pictures_at(place: str) -> Pictures:
    """S3 storage for ``s3://BUCKET/PREFIX``, else a folder. Raises ConfigError."""
    if not place.strip():
        raise ConfigError(
            "names no place", cure="write a folder, or s3://BUCKET/PREFIX, or leave it out", key="--pictures"
        )
    if "://" not in place:
        return Folder(Path(place))
    try:
        # Only here: boto3 is an extra, and takes a while to load.
        s3 = importlib.import_module("studio_worker.local_studio.pictures.s3")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"S3 storage needs what is not installed ({error.name})",
            cure="pip install 'studio-worker[farm]', or apt install studio-worker-farm",
            key="--pictures",
        ) from error
    pictures: Pictures = s3.S3(place)
    return pictures
