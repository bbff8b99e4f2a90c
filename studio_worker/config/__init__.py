"""What the operator wants: settings, required models and the ways of downloads, read and checked as a whole.

Owns the files under the configuration folder. Hands out values; a reload changes some of them.
A command that only reads it gets no HTTP library with it: who downloads imports downloads.py and current.py.
"""

from studio_worker.config.loading import DEFAULT_DIR, Config, check_folders, load

__all__ = ["DEFAULT_DIR", "Config", "check_folders", "load"]
