"""What is right and wrong with this box: checks that each stand alone, and the line each comes to.

Owns the checks and their words; mends nothing.
"""

from studio_worker.doctor.results import Box, Check, Finding, Result, examine, failure, ok, warning

__all__ = ["Box", "Check", "Finding", "Result", "examine", "failure", "ok", "warning"]
