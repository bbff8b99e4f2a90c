"""The studio's HTTP calls: becoming known to it, and bringing finished pictures to it.

Owns identity, registration and delivery; each call is one attempt, repeated by who has the reason to.
"""
