"""The engines: from one image task and its model's files to one encoded picture.

Owns everything between a model's files and a picture's bytes, and is offline: no address, no studio, no state
folder. Importing it loads no torch; an engine's own module does that when its first job comes, so that a
configuration error, ``status`` and the way to READY never pay for it.
"""

from studio_worker.engine.contract import (
    Engine,
    Inputs,
    KeepsModels,
    Made,
    Preparer,
    Request,
    Resident,
    StepProgress,
)
from studio_worker.engine.router import Router, default_router

__all__ = [
    "Engine",
    "Inputs",
    "KeepsModels",
    "Made",
    "Preparer",
    "Request",
    "Resident",
    "Router",
    "StepProgress",
    "default_router",
]
