"""Everything at once for somebody who has just arrived: a local studio, the real service, a dozen pictures.

Owns the demo's jobs and its small world; whatever is tested or measured against a whole service
uses them too.
"""

from studio_worker.demo.demo import MODEL_ID, run_demo, sample_source, write_configuration

__all__ = ["MODEL_ID", "run_demo", "sample_source", "write_configuration"]
