"""Model families: which one a source is, told from its files' tensor names and shapes alone; one module each.

Owns what differs between families. How a picture is made is the same for all of them, and not told here.
"""

from studio_worker.engine.families.identification import FAMILIES, identify

__all__ = ["FAMILIES", "identify"]
