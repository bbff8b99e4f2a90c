"""One job after another: the loop that takes it, has it made and hands it over, and when that should pause.

Owns the order of the steps. Of studio, files and outbox it knows what ``ports.py`` asks of them.
"""
