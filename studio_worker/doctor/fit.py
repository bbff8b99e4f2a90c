"""The check of torch: whether the installed one is the package for this GPU and driver, and which one is.

By the table of what our packages hold, without importing torch; what another build holds only torch itself
can say, and the check of compute asks it.
"""

from __future__ import annotations

from studio_worker.box.compatibility import (
    PACKAGES,
    called,
    misfit,
    no_code,
    no_cuda,
    package_to_install,
    show,
)
from studio_worker.box.driver import gpu_index, require_driver, surroundings
from studio_worker.box.torch_build import installed_torch
from studio_worker.doctor.results import Box, Result, failure, ok


def check_torch(box: Box) -> Result:
    """Names the package of torch that fits this box, where the installed one does not."""
    device = box.config.settings.worker.device
    build = installed_torch()
    if device == "cpu":
        return ok('any fits: device = "cpu"')
    driver = require_driver(box.root)
    driver.start()
    gpu, cuda, here = driver.gpu(gpu_index(device)), driver.cuda(), surroundings(box.root)
    if build is None:
        return failure("torch is not installed", package_to_install(gpu.capability, cuda, here))
    problem = no_cuda(build, gpu.capability, cuda, here) or misfit(
        cuda, driver.version, gpu.capability, build, here
    )
    package = next((each for each in PACKAGES if build.version.endswith(f"+{each.build}")), None)
    if problem is None and package is not None:
        problem = no_code(
            gpu.name, gpu.capability, package.architectures, torch=build.version, cuda=cuda, here=here
        )
    if problem is not None:
        text, _, cure = problem.partition("; ")
        return failure(text, cure)
    name = "" if package is None else f" ({package.name})"
    fits = f"{called(gpu.name, gpu.capability)} and a driver with CUDA {show(cuda)}"
    return ok(f"torch {build.version}{name} fits {fits}")
