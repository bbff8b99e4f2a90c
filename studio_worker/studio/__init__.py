"""Everything that knows the studio's wire: frames, session rules, the socket, the HTTP calls.

Owns the conversation with the studio; makes no picture and keeps no file.
"""
