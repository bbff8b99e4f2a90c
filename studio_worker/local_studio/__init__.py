"""A small studio of one's own: queue, approval and gallery behind the studio's worker protocol.

It serves workers exactly as the real studio does, keeps everything in one SQLite file and a folder of
pictures, and brings a page for people. It is for whoever has no studio, and for demos and tests. It never
imports torch and never runs a job itself.
"""

from __future__ import annotations

from studio_worker.local_studio.carrying import carry_studio
from studio_worker.local_studio.door import Door
from studio_worker.local_studio.housekeeping import Retention
from studio_worker.local_studio.limits import Limits
from studio_worker.local_studio.naming import places_of
from studio_worker.local_studio.pictures import pictures_at
from studio_worker.local_studio.places import DATABASE_NAME, Places
from studio_worker.local_studio.server import MODELS_FOLDER, LocalStudio, run_local_studio
from studio_worker.local_studio.tls import Tls

__all__ = [
    "DATABASE_NAME",
    "MODELS_FOLDER",
    "Door",
    "Limits",
    "LocalStudio",
    "Places",
    "Retention",
    "Tls",
    "carry_studio",
    "pictures_at",
    "places_of",
    "run_local_studio",
]
