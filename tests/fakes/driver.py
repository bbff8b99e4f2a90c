"""A libcuda.so.1 of our own that the dynamic linker finds first: the one thing about a GPU that is faked.

``python tests/fakes/driver.py FOLDER [VERSION]`` builds it, too. The environment says what it answers, so one
library plays every box:

* ``FAKE_INIT``: CUresult of cuInit, e.g. 100 no device, 802 no fabric manager
* ``FAKE_HANG``: cuInit never comes back, as on a GPU that hangs
* ``FAKE_CUDA``: the driver's CUDA version as cuDriverGetVersion says it, e.g. 12020; 13000 by default
* ``FAKE_COUNT``: how many GPUs there are; as with the real one they come by their places on the bus only
  where ``CUDA_DEVICE_ORDER`` says ``PCI_BUS_ID``, else the other way round, and ``CUDA_VISIBLE_DEVICES`` may
  leave one
* ``FAKE_CAPABILITY``: ``major * 10 + minor``; 89 by default
* ``FAKE_GET``: CUresult of cuDeviceGet
* ``FAKE_MODE``: the compute mode, 2 prohibited, 3 exclusive
* ``FAKE_CONTEXT``: CUresult of making a context, e.g. 46 for a GPU that another process has for itself
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int number(const char *name, int otherwise) {
    const char *v = getenv(name); return v ? atoi(v) : otherwise; }
int cuInit(unsigned flags) { while (getenv("FAKE_HANG")) pause(); return number("FAKE_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA", 13000); return 0; }
int cuDeviceGetCount(int *count) {
    *count = getenv("CUDA_VISIBLE_DEVICES") ? 1 : number("FAKE_COUNT", 0); return 0; }
int cuDeviceGet(int *handle, int index) {
    const char *order = getenv("CUDA_DEVICE_ORDER");
    index = number("CUDA_VISIBLE_DEVICES", index);
    if (!order || strcmp(order, "PCI_BUS_ID")) index = number("FAKE_COUNT", 0) - 1 - index;
    *handle = 40 + index;
    return number("FAKE_GET", 0); }
int cuDeviceGetPCIBusId(char *id, int size, int handle) {
    snprintf(id, size, "0000:%02X:00.0", handle == 41 ? 0xc1 : 0x41); return 0; }
int cuDeviceGetName(char *name, int size, int handle) {
    strncpy(name, handle == 41 ? "Fake GPU B" : "Fake GPU A", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int handle) {
    *bytes = handle == 41 ? 48000000000 : 24000000000; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int handle) {
    int capability = number("FAKE_CAPABILITY", 89);
    switch (attribute) {
    case 20: *value = number("FAKE_MODE", 0); return 0;
    case 75: *value = capability / 10; return 0;
    case 76: *value = capability % 10; return 0;
    default: return 1; } }
int cuDevicePrimaryCtxRetain(void **context, int handle) {
    *context = context; return number("FAKE_CONTEXT", 0); }
int cuDevicePrimaryCtxRelease_v2(int handle) { return 0; }
int cuGetErrorName(int status, const char **text) {
    *text = status == 777 ? NULL : "CUDA_ERROR_FAKE"; return status == 777; }
int cuGetErrorString(int status, const char **text) { return cuGetErrorName(status, text); }
/* torch's CUDA runtime takes everything else from here; what is not above it does not get (NOT_FOUND). */
int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long flags) {
    *function = dlsym(RTLD_DEFAULT, symbol); return *function ? 0 : 500; }
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long flags, int *how) {
    if (how) *how = 0;
    return cuGetProcAddress(symbol, function, version, flags); }
int cuGetExportTable(const void **table, const void *id) { *table = NULL; return 500; }
"""


def build_driver(folder: Path, version: str = "") -> Path:
    """Put the library into ``folder``, which is then for ``LD_LIBRARY_PATH``; skips without a C compiler.

    Args:
        version: the driver's own, e.g. ``535.309.01``; told by the file's name, as with the real one.
    """
    if shutil.which("cc") is None:
        import pytest

        pytest.skip("no C compiler to build the fake driver with")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cuda.c").write_text(SOURCE)
    library = folder / f"libcuda.so.{version or 1}"
    # No soname: loaded by its path in one test, it would answer to that name in the next.
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, folder / "cuda.c"], check=True)
    if version:
        (folder / "libcuda.so.1").symlink_to(library.name)
    return folder


if __name__ == "__main__":
    print(build_driver(Path(sys.argv[1]), *sys.argv[2:]))
