"""torch's fellows in this process, settled once they are there: silent, and no concern of collections.

What has to be settled before they are imported is process.py's.
"""

from __future__ import annotations

import gc
from functools import cache

import diffusers
import transformers


@cache
def settle() -> None:
    """Keep prompts out of every log and progress bars off standard error, and libraries out of collections.

    The environment says the former, too, which holds only for libraries imported after it is set. Neither
    library says anything below ERROR that an operator could act on. As for the latter: they have 400,000
    objects, which stay, and every collection would look at them all, taking 0.2 s, each time that a model
    leaves the device or a job is cancelled.
    """
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
