"""Which checks there are, in the order they are told."""

from __future__ import annotations

from studio_worker.doctor.box import (
    PROBE_LIMIT_S,
    check_compute,
    check_configuration,
    check_disk_space,
    check_disk_speed,
    check_driver,
    check_memory,
    check_nodes,
    check_permissions,
)
from studio_worker.doctor.fit import check_torch
from studio_worker.doctor.network import check_clock, check_dns, check_proxy, check_studio, check_tls
from studio_worker.doctor.results import Check
from studio_worker.doctor.worker import (
    check_last_errors,
    check_models,
    check_registration,
    check_service,
)

CHECKS = (
    Check("configuration", check_configuration, needs_config=False),
    Check("permissions", check_permissions),
    Check("device nodes", check_nodes),
    Check("driver", check_driver),
    Check("torch", check_torch),
    Check("compute", check_compute, limit_s=PROBE_LIMIT_S),
    Check("memory", check_memory, needs_config=False),
    Check("disk space", check_disk_space),
    Check("disk speed", check_disk_speed, limit_s=30.0),
    Check("models", check_models),
    Check("dns", check_dns),
    Check("proxy", check_proxy),
    Check("tls", check_tls),
    Check("studio", check_studio),
    Check("clock", check_clock),
    Check("registration", check_registration),
    Check("service", check_service),
    Check("last errors", check_last_errors),
)
