"""The machine that this runs on: its GPU and driver, torch's build, memory, processes, locks and owners.

Owns what is asked of the system itself, in plain facts; judges nothing that a job
wants, and imports no torch.
"""
