"""studio-worker: takes image jobs from a studio, makes the pictures with torch, delivers them."""

__version__ = "0.5.0"
"""This worker's own version. It speaks the wire of the upstream worker 0.4.7 and later."""
