"""Where the bytes of results and input pictures lie: a port, and what it is made of."""

from studio_worker.local_studio.pictures.choice import pictures_at
from studio_worker.local_studio.pictures.folder import Folder
from studio_worker.local_studio.pictures.port import (
    CannotStore,
    PictureGone,
    Pictures,
    RangeRefused,
    Reading,
    StorageAway,
    StorageFull,
    StoredBytes,
)

__all__ = [
    "CannotStore",
    "Folder",
    "PictureGone",
    "Pictures",
    "RangeRefused",
    "Reading",
    "StorageAway",
    "StorageFull",
    "StoredBytes",
    "pictures_at",
]
