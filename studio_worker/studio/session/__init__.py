"""One session with the studio: its rules without socket and clock, and the socket around them.

Owns offers, answers and heartbeats. Uploads are the HTTP calls' business.
"""
