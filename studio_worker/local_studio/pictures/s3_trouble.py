"""What S3 says no with, as errors of this program: at the start with a cure, later as what may pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from studio_worker.errors import ConfigError, ProtocolError, StateUnavailable
from studio_worker.local_studio.pictures.port import PictureGone, RangeRefused, StorageAway, StorageFull
from studio_worker.local_studio.pictures.s3_place import OPTION, Place

ELSEWHERE = "something else answers in the place of the studio's S3 storage"

_OTHER_REGION = {"PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"}


@contextmanager
def telling() -> Iterator[None]:
    """What S3 says while the studio runs: an object is not there, or nothing can be had for now.

    A key that has expired is among the latter: its operator is told by the log, and no picture is lost.
    """
    try:
        yield
    except ClientError as error:
        raise _told(error) from error
    except ResponseParserError as error:
        raise StorageAway(ELSEWHERE) from error
    except BotoCoreError as error:
        raise StorageAway(f"the studio's S3 storage does not answer ({_reason(error)})") from error


def _told(error: ClientError) -> ProtocolError:
    if is_missing(error):
        return PictureGone("the picture is not in the studio's storage any more")
    if _code(error) == "InvalidRange":
        return RangeRefused("the picture has no such range")
    if _is_full(error):
        return StorageFull(f"the studio's S3 storage is full ({_reason(error)})")
    if _is_of_another(error):
        return StorageAway(f"{ELSEWHERE} ({_reason(error)})")
    return StorageAway(f"the studio's S3 storage refuses ({_reason(error)})")


def misconfigured(error: Exception, place: Place | None = None) -> ConfigError:
    """What is wrong at the start, with its cure."""
    if isinstance(error, SSLError):
        return ConfigError(
            f"the S3 storage shows a certificate that is not believed ({_reason(error)})",
            cure="name its authority in AWS_CA_BUNDLE, and see to the clock of this machine",
            key=OPTION,
        )
    if isinstance(error, HTTPClientError | ConnectionError | IncompleteReadError):
        return _away(error)
    if isinstance(error, ResponseParserError):
        return _no_storage(error)
    if isinstance(error, ClientError) and place is not None:
        return _refused(error, place)
    return ConfigError(
        f"the S3 storage cannot be used ({_reason(error)})",
        cure="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; and AWS_REGION and "
        "AWS_ENDPOINT_URL_S3, where they are needed",
        key=OPTION,
    )


def _refused(error: ClientError, place: Place) -> ConfigError:
    reason, status = _reason(error), _status(error)
    if _is_full(error):
        cure = "make room there, or raise its quota"
        return StateUnavailable(f"the S3 storage is full ({reason})", cure=cure, key=OPTION)
    if status >= 500 or status == 429:
        return _away(error)
    if _code(error) == "RequestTimeTooSkewed":
        return StateUnavailable(
            f"the clocks of this machine and of the S3 storage are too far apart ({reason})",
            cure="set the clock of this machine, or that of the storage",
            key=OPTION,
        )
    if _code(error) in _OTHER_REGION:
        return ConfigError(
            f"the bucket {place.bucket!r} is in another region ({reason})",
            cure="name its region in AWS_REGION; AWS_ENDPOINT_URL_S3, where it is set, must lead there too",
            key=OPTION,
        )
    if _is_of_another(error):
        return _no_storage(error)
    if status == 404:
        cure = "make it, or name another one"
        return ConfigError(f"there is no bucket {place.bucket!r} ({reason})", cure=cure, key=OPTION)
    below = f"{place.bucket}/{place.prefix}"
    return ConfigError(
        f"the S3 storage refuses these credentials or this region ({reason})",
        cure=f"they must be valid and allow to list, read, write and delete below {below}; a region is named "
        "in AWS_REGION",
        key=OPTION,
    )


def not_marked(key: str) -> ConfigError:
    """What lies where a studio's mark should be is none."""
    return ConfigError(
        f"what answers there is no S3 storage, or the object {key} is another program's",
        cure="see where AWS_ENDPOINT_URL_S3 leads (a proxy, a portal?), or choose another prefix",
        key=OPTION,
    )


def _away(error: Exception) -> ConfigError:
    return StateUnavailable(
        f"the S3 storage does not answer ({_reason(error)})",
        cure="see to it and to the network; AWS_ENDPOINT_URL_S3 names it where it is not AWS's",
        key=OPTION,
    )


def _no_storage(error: Exception) -> ConfigError:
    return ConfigError(
        f"what answers there is no S3 storage ({_reason(error)})",
        cure="see where AWS_ENDPOINT_URL_S3 leads, and whether a proxy or a portal is in between",
        key=OPTION,
    )


def look_once(response: tuple[Any, Mapping[str, Any]] | None, **_: object) -> None:
    """For the event ``needs-retry.s3.HeadBucket``: by that request botocore finds the region of a bucket that
    redirects, and, where it is itself redirected, would ask again without end.
    """
    if response is not None and 300 <= response[0].status_code < 400:
        raise ClientError(dict(response[1]), "HeadBucket")


def is_missing(error: ClientError) -> bool:
    """Whether S3 says that there is no such object. Some makes of S3 say so of a bucket, to other requests.
    Of HEAD's answers the status is all there is; what has no more to say to GET is no S3.
    """
    if error.operation_name == "HeadObject":
        return _status(error) == 404
    return _code(error) == "NoSuchKey" and error.operation_name in ("GetObject", "DeleteObject")


def _is_full(error: ClientError) -> bool:
    # Makes of S3 have different names for it: QuotaExceeded, XMinioAdminBucketQuotaExceeded, …
    return _status(error) == 507 or _code(error).endswith("QuotaExceeded")


def _is_of_another(error: ClientError) -> bool:
    """Whether a page says it: with no code of S3's, which botocore then makes of the status. Not of a server
    that is in trouble, nor where a proxy before the storage refuses.
    """
    status = _status(error)
    return _code(error) in ("", str(status)) and 300 <= status < 500 and status not in (401, 403, 429)


def _reason(error: Exception) -> str:
    # Never the text itself: some hold addresses with signatures.
    if isinstance(error, ClientError):
        return f"{error.operation_name}: {_code(error)}"
    return type(error).__name__


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
