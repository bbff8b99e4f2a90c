"""``studio-worker gpu-check``: everything that only a GPU can prove, proven on the box it is run on.

Each thing that is looked at is a row of its own, with figures; one that fails, crashes or hangs does not keep
the others from being looked at. Nothing here is used by the service.
"""
