"""The commands. Each is a thin shell over the room that does the work; none imports torch by itself."""

from studio_worker.cli.app import app, main

__all__ = ["app", "main"]
