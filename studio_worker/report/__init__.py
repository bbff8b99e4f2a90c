"""What the service says of itself: log lines, the journal, systemd, status, metrics, the control socket.

Owns the words and where they go. Everybody may report; nothing here knows what is done about it.
"""
