"""Every exception of the worker; one module for each family.

* :exc:`StudioWorkerError`

  * :exc:`ConfigError` — the configuration cannot be used; exit status 78

    * :exc:`StateUnavailable` — the state folder, or a disk, cannot be used for now; exit status 75

  * :exc:`DeviceError` — the device asked for cannot be used; exit status 69
  * :exc:`DownloadError` — a file could not be fetched or verified; exit status 74 while provisioning

    * :exc:`DownloadRefused` — another try here would end the same
    * :exc:`PageInPlace` — a web page came in the place of the file
    * :exc:`DownloadCancelled` — the caller asked the download to stop
    * :exc:`StoreError` — the models folder cannot hold or give what is asked

  * :exc:`ProtocolError` — the studio and this worker do not understand each other

    * :exc:`FrameError` — one frame is unreadable; it is dropped
    * :exc:`StudioUnavailable` — the studio could not be reached or answered with a passing error; exit
      status 75
    * :exc:`OrderRefused` — a studio of one's own will not take a person's job; exit status 1
    * :exc:`UnknownRegistration` — the studio does not know our registration request; start over
    * :exc:`DeliveryRefused` — the studio will never take this result
    * :exc:`ReconnectExhausted` — the allowed number of attempts in a row failed; exit status 75
    * :exc:`IdentityRefused` — the studio does not take this identity

      * :exc:`DuplicateWorker` — another process uses this worker's identity; exit status 76
      * :exc:`RefusedByStudio` — token refused, worker deleted, registration rejected; exit status 77

  * :exc:`JobError` — one job could not be done; the worker goes on

    * :exc:`JobCancelled` — the job was stopped before its end
    * :exc:`JobImpossible` — no worker can do it
    * :exc:`FileDamaged` — a model's file cannot be understood; whether it is the right one is not known yet
    * :exc:`NotServed` — this worker lacks what it needs, another one may have it

  * :exc:`ControlError` — the running service could not be asked

    * :exc:`ServiceNotRunning` — there is none; exit status 3
    * :exc:`ControlDenied` — this user may not ask it; exit status 4

Exceptions carry their facts as attributes; ``str()`` makes the sentence an operator reads. Two are on
every error, since they are two questions: ``is_final_here`` (does another try on this box end the same?) and
``is_jobs_fault`` (can no worker do the job?). Only the second may make a studio give a job up: a wrong clock,
a certificate that is not known here, a captive portal's page, a full disk are this box's faults.

Exit statuses follow sysexits(3); those of asking the service are the LSB's for init scripts.
"""

from studio_worker.errors.base import StudioWorkerError
from studio_worker.errors.control import ControlDenied, ControlError, ServiceNotRunning
from studio_worker.errors.download import (
    DownloadCancelled,
    DownloadError,
    DownloadRefused,
    PageInPlace,
    StoreError,
)
from studio_worker.errors.job import FileDamaged, JobCancelled, JobError, JobImpossible, NotServed
from studio_worker.errors.protocol import (
    DeliveryRefused,
    DuplicateWorker,
    FrameError,
    IdentityRefused,
    OrderRefused,
    ProtocolError,
    ReconnectExhausted,
    RefusedByStudio,
    StudioUnavailable,
    UnknownRegistration,
)
from studio_worker.errors.setup import ConfigError, DeviceError, StateUnavailable

__all__ = [
    "ConfigError",
    "ControlDenied",
    "ControlError",
    "DeliveryRefused",
    "DeviceError",
    "DownloadCancelled",
    "DownloadError",
    "DownloadRefused",
    "DuplicateWorker",
    "FileDamaged",
    "FrameError",
    "IdentityRefused",
    "JobCancelled",
    "JobError",
    "JobImpossible",
    "NotServed",
    "OrderRefused",
    "PageInPlace",
    "ProtocolError",
    "ReconnectExhausted",
    "RefusedByStudio",
    "ServiceNotRunning",
    "StateUnavailable",
    "StoreError",
    "StudioUnavailable",
    "StudioWorkerError",
    "UnknownRegistration",
]
