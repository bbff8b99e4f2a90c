"""``python -m studio_worker`` is the command ``studio-worker``."""

from studio_worker.cli import main

main()
