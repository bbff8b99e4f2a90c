"""Whether torch can use a device, tried out in a process of its own: ``python -m studio_worker.engine.probe
cuda:0``.

The service must know before READY, and must neither import torch for it nor hang with a GPU that hangs; so
:func:`studio_worker.box.device.probe` starts this and gives it a time limit.

Prints one line of JSON on stdout, an object, whatever becomes of it, and exits with 0 or 69:

* ``device`` (string): the name that was asked for
* ``ok`` (bool)
* ``error`` (string): one sentence with its cure; empty where ``ok``
* ``torch`` (string): torch's version; empty where it cannot be imported

and for a CUDA device, as far as it got:

* ``cuda`` (string): the CUDA version torch was built for, e.g. ``13.0``
* ``driver_cuda`` (string): the newest CUDA version that the driver knows
* ``name`` (string), ``capability`` (string, e.g. ``8.9``), ``memory_gb``, ``memory_free_gb`` (numbers, 1e9
  bytes)
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from studio_worker.box.compatibility import show
from studio_worker.box.driver import find_driver
from studio_worker.box.process import prepare
from studio_worker.engine.memory.precision import numbers
from studio_worker.errors import DeviceError

if TYPE_CHECKING:
    import torch

MIN_FREE_BYTES = 1 << 30
"""Less than this and not even the CUDA context, its libraries and the smallest model fit."""


def probe(name: str, *, compiles: bool = False) -> dict[str, Any]:
    """The facts that the module's docstring lists, found by using ``name`` (``cpu``, ``cuda:0``); with
    ``compiles`` torch must be able to compile for it.
    """
    facts: dict[str, Any] = {"device": name, "ok": False, "error": "", "torch": ""}
    try:
        _try_out(name, facts, compiles=compiles)
    except DeviceError as error:
        facts["error"] = " ".join(str(error).split())
    # A library that is half installed, or a driver that is half gone, fails in ways that nobody has listed.
    except Exception as error:
        facts["error"] = (
            f"torch failed on {name} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "reinstall the studio-worker-torch package, or reboot after a driver upgrade"
        )
    facts["ok"] = not facts["error"]
    return facts


def _try_out(name: str, facts: dict[str, Any], *, compiles: bool) -> None:
    if name.startswith("cuda") and (driver := find_driver()):
        facts["driver_cuda"] = show(driver.cuda())
    import torch

    from studio_worker.engine.faults import usable_device

    facts["torch"] = str(torch.__version__)
    if name.startswith("cuda") and torch.version.cuda is not None:
        facts["cuda"] = torch.version.cuda
    device = usable_device(name)
    if device.type == "cuda":
        _look_at_memory(device, facts)
    # Through cuDNN and cuBLAS on a GPU, the two that a half-done upgrade breaks; every term is exact in fp16.
    ones = torch.ones(1, 4, 4, 4, device=device, dtype=_narrowest(device))
    convolved = torch.nn.functional.conv2d(ones, ones)
    computed = float((convolved.reshape(1, 1) @ convolved.reshape(1, 1)).cpu())
    if computed != 64.0 * 64.0:
        raise DeviceError(f"{name} computes wrong numbers ({computed:g} for 4096); test it, it may be broken")
    if compiles:
        from studio_worker.engine.rendering.compiling import try_out

        try_out(device)


def _narrowest(device: torch.device) -> torch.dtype:
    """What the device computes right: a GTX 16 is no broken card, though its float16 is."""
    import torch

    if device.type == "cpu":
        return torch.float32
    card = torch.cuda.get_device_properties(device)
    dtype: torch.dtype = getattr(torch, numbers(("float16",), (card.major, card.minor), card.name))
    return dtype


def _look_at_memory(device: torch.device, facts: dict[str, Any]) -> None:
    import torch

    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    facts |= {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(total / 1e9, 2),
        "memory_free_gb": round(free / 1e9, 2),
    }
    if free < MIN_FREE_BYTES:
        raise DeviceError(
            f"{device} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free; another process uses it: "
            "nvidia-smi shows which, end it"
        )


def main() -> int:
    prepare()
    words = sys.argv[1:]
    facts = probe(words[0] if words else "", compiles="--compile" in words)
    print(json.dumps(facts), flush=True)
    return os.EX_OK if facts["ok"] else DeviceError.exit_status


if __name__ == "__main__":
    sys.exit(main())
