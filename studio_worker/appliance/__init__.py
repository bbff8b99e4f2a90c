"""What joins the rooms while the service runs: the way to READY, what the box can do, reloads, answers.

Owns no disk format and no wire; only ``service.py`` and the commands use it.
"""
