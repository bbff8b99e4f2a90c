"""The models on disk: fetched, verified, remembered, shared, removed for room, carried to other boxes.

Owns the models folder and its ledger. Knows no job and no studio.
"""

from studio_worker.store.checking import Checked
from studio_worker.store.store import Store, store_errors

__all__ = ["Checked", "Store", "store_errors"]
