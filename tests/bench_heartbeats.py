"""Heartbeats while everything else happens: models of several GB arrive, are loaded and run on every core.

Three models in the shape of Stable Diffusion 1.5 with random weights, more than memory keeps at once, so that
jobs that ask for them in turn make the worker load one again and again. Measured where it counts: at the
studio, between one heartbeat's arrival and the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import struct
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from studio_worker.demo import write_configuration
from studio_worker.download import hash_file
from studio_worker.local_studio import LocalStudio
from studio_worker.models import CliDefaults, ModelFile, ModelSource
from studio_worker.service_process import ServiceProcess
from tests.engine_lab import sd1_shapes

MODELS = 3
LIMIT_S = 7.0
"""The protocol's interval is 5 s; a studio that hears nothing for 30 s closes the session."""
