"""What S3 says no with, as errors of this program: at the start with a cure, later as what may pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, SSLError

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio.pictures.port import PictureGone, RangeRefused, StorageAway
from studio_worker.local_studio.pictures.s3_place import OPTION, Place

MISSING = {"NoSuchKey", "404"}


@contextmanager
def telling() -> Iterator[None]:
    """What S3 says while the studio runs: an object is not there, or nothing can be had for now.

    A key that has expired is among the latter: its operator is told by the log, and no picture is lost.
    """
    try:
        yield
    except ClientError as error:
        if code_of(error) in MISSING:
            raise PictureGone("the picture is not in the studio's storage any more") from error
        if code_of(error) == "InvalidRange":
            raise RangeRefused("the picture has no such range") from error
        raise StorageAway(f"the studio's S3 storage refuses ({_reason(error)})") from error
    except BotoCoreError as error:
        raise StorageAway(f"the studio's S3 storage does not answer ({_reason(error)})") from error


def misconfigured(error: Exception, place: Place | None = None) -> ConfigError:
    """What is wrong at the start, with its cure."""
    status = _status(error) if isinstance(error, ClientError) else 0
    if isinstance(error, SSLError):
        return ConfigError(
            f"the S3 storage shows a certificate that is not believed ({_reason(error)})",
            cure="name its authority in AWS_CA_BUNDLE, and see to the clock of this machine",
            key=OPTION,
        )
    if isinstance(error, HTTPClientError | ConnectionError) or status >= 500 or status == 429:
        return StateUnavailable(
            f"the S3 storage does not answer ({_reason(error)})",
            cure="see to it and to the network; AWS_ENDPOINT_URL_S3 names it where it is not AWS's",
            key=OPTION,
        )
    reason = _reason(error)
    if place is None or status == 0:
        cure = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and AWS_ENDPOINT_URL_S3"
        return ConfigError(f"the S3 storage cannot be used ({reason})", cure=cure, key=OPTION)
    if status == 404:
        cure = "make it, or name another one"
        return ConfigError(f"there is no bucket {place.bucket!r} ({reason})", cure=cure, key=OPTION)
    below = f"{place.bucket}/{place.prefix}"
    return ConfigError(
        f"the S3 storage refuses these credentials or this region ({reason})",
        cure=f"they must be valid and allow to list, read, write and delete below {below}",
        key=OPTION,
    )


def _reason(error: Exception) -> str:
    # Never the text itself: some hold addresses with signatures.
    if isinstance(error, ClientError):
        return f"{error.operation_name}: {code_of(error)}"
    return type(error).__name__


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
