"""What joins the rooms while the service runs: its parts, the way to READY, what the box can do, news of it,
reloads, pauses, signals, the watchdog, the end.

Owns no wire, and on disk nothing but the note of a pause; only ``service.py`` and the commands use it.
"""
