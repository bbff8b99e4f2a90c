"""A libnvidia-ml.so.1 of our own: the other half of the driver that is faked, see driver.py.

It reads the file that ``FAKE_NVML`` names at every call, so that a test changes what a running service sees.
A line ``NAME NUMBER`` each:

* ``init``, ``find``, ``ask``: nvmlReturn_t of the start, of finding the GPU, of every question about it
* ``hang 1``: no call comes back
* ``temperature``, ``milliwatts``, ``percent``, ``used``, ``reasons``: the GPU's figures
* ``untold``: the one of these, counted from 1, that this GPU does not support
* ``broken``: the one of which it tells no more than an error
* ``driver``: the kernel module's version
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static char text[100];
static unsigned long long told(const char *wanted, unsigned long long otherwise) {
    char name[100], value[100]; unsigned long long found = otherwise;
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return otherwise;
    while (fscanf(file, "%99s %99s", name, value) == 2)
        if (!strcmp(name, wanted)) { strcpy(text, value); found = strtoull(value, NULL, 0); }
    fclose(file);
    return found; }
static int answer(const char *status) { while (told("hang", 0)) usleep(1000); return told(status, 0); }
static int about(int question) {
    int status = answer("ask"); if (status) return status;
    return told("untold", 0) == question ? 3 : told("broken", 0) == question ? 999 : 0; }
int nvmlInit_v2(void) { return answer("init"); }
const char *nvmlErrorString(int status) {
    return status == 15 ? "GPU is lost" : status == 999 ? "Unknown Error" : "Some Error"; }
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    told("driver", 0); strncpy(version, text, size); return answer("init"); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *place, void **gpu) {
    *gpu = (void *)place; return strcmp(place, "0000:41:00.0") ? 6 : answer("find"); }
int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned *value) {
    *value = told("temperature", 40); return about(1); }
int nvmlDeviceGetPowerUsage(void *gpu, unsigned *value) {
    *value = told("milliwatts", 15000); return about(2); }
int nvmlDeviceGetUtilizationRates(void *gpu, unsigned value[2]) {
    value[0] = told("percent", 0); value[1] = 77; return about(3); }
int nvmlDeviceGetMemoryInfo(void *gpu, unsigned long long value[3]) {
    value[0] = 24000000000; value[2] = told("used", 500000000); value[1] = value[0] - value[2];
    return about(4); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *gpu, unsigned long long *value) {
    *value = told("reasons", 1); return about(5); }
"""


def build_nvml(folder: Path) -> Path:
    """Put the library into ``folder``, which is then for ``LD_LIBRARY_PATH``; returns its file. Skips without
    a C compiler.
    """
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the fake library with")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvml.c").write_text(SOURCE)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, folder / "nvml.c"], check=True)
    return library


def tell(path: Path, **facts: int | str) -> None:
    """What the library answers from now on, by the names that the module's docstring lists."""
    temporary = path.with_suffix(".new")
    lines = (f"{name} {value}\n" for name, value in ({"driver": "580.65.06"} | facts).items())
    temporary.write_text("".join(lines))
    temporary.replace(path)
