"""Pictures in S3-compatible storage: one object each, below a prefix of one bucket.

Endpoint, region and credentials are found where all programs of S3 look for them (``AWS_ENDPOINT_URL_S3``,
``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, a machine's role); they are in no message and no log.
Imported by choice.py alone, where it is asked for: boto3 is an extra.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from typing import IO, Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from studio_worker.local_studio.pictures.marks import Spot, Standing, is_mark, standing
from studio_worker.local_studio.pictures.port import (
    MARK,
    CannotStore,
    PictureGone,
    Reading,
    StorageAway,
    StoredBytes,
    is_key,
    new_key,
)
from studio_worker.local_studio.pictures.ranges import is_one_range
from studio_worker.local_studio.pictures.s3_place import Place, is_public
from studio_worker.local_studio.pictures.s3_trouble import (
    ELSEWHERE,
    is_missing,
    look_once,
    misconfigured,
    not_marked,
    telling,
)

logger = logging.getLogger(__name__)

ADDRESS_S = 86_400
"""So long an input's presigned address is good: longer than any worker tries one job. S3 allows 7 days."""

PART_BYTES = 8 << 20
"""An upload holds one part of it in memory, and takes 10,000 parts at most (S3's limit): 80 GiB."""

_CONNECTIONS = 64
"""More than the threads that serve requests; each may hold one."""
_NAME = "picture"
"""Under this name an object says its key itself, by which it is known for one of ours. Makes of S3 differ in
how they write the name when they are asked.
"""
_TALKATIVE = ("boto3", "botocore", "s3transfer", "urllib3")


class S3:
    """One prefix of one bucket. See :class:`port.Pictures` for its methods.

    A request waits 5 s for a connection and 30 s for the next bytes, and is tried three times with growing
    pauses (botocore's standard mode): a storage that does not answer is given up after two minutes.

    Raises:
        ConfigError: no address of S3, or no credentials.
    """

    is_shared = True

    def __init__(self, address: str) -> None:
        self._place = Place.of(address)
        self._spot = Spot("prefix", f"s3://{self._place.bucket}/{self._place.prefix}")
        for name in _TALKATIVE:  # at debug they tell of signatures
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            session = boto3.Session()
            self._client = session.client("s3", region_name=_region(session), config=_configuration())
        except (BotoCoreError, ValueError) as error:
            raise misconfigured(error) from error
        self._client.meta.events.register_first("needs-retry.s3.HeadBucket", look_once)
        self._has_addresses = False

    def mark(self) -> str | None:
        with self._telling_of_the_start():
            return self._mark()

    def check(self, owner: str) -> bool:
        key = self._place.prefix + MARK
        with self._telling_of_the_start():
            is_own = self._spot.is_own(self._mark(), owner)
            if is_own:  # written at each start: no other way tells whether writing is allowed
                self._put_mark(owner)
            self._client.list_objects_v2(Bucket=self._place.bucket, Prefix=key, MaxKeys=1)
            url = self._presigned(key)
        self._has_addresses = self._place.inputs == "presigned" or (
            self._place.inputs == "auto" and is_public(url)
        )
        return is_own

    def claim(self, owner: str, newest_key: str | None, *, is_first: bool) -> None:
        with self._telling_of_the_start():
            mark = self._mark()
            if self._spot.is_own(mark, owner):
                return
            if standing(mark, owner) is Standing.FREE:
                self._spot.require_unclaimed(newest_key, self._has, self._is_unused, is_first)
            self._put_mark(owner)

    def _mark(self) -> str | None:
        key = self._place.prefix + MARK
        try:
            answer = self._client.get_object(Bucket=self._place.bucket, Key=key)
        except ClientError as error:
            if not is_missing(error):
                raise
            return None
        with closing(answer["Body"]) as body:  # its own block would have the bare stream
            # One that was cut short is found out by asking for more.
            mark: str = (body.read(1024) + body.read(1)).decode(errors="replace")
        if not is_mark(mark):
            raise not_marked(key)
        return mark

    def _put_mark(self, owner: str) -> None:
        key = self._place.prefix + MARK
        self._client.put_object(Bucket=self._place.bucket, Key=key, Body=owner.encode())

    def _has(self, key: str) -> bool:
        try:
            self._client.head_object(Bucket=self._place.bucket, Key=self._place.prefix + key)
        except ClientError as error:
            if not is_missing(error):
                raise
            return False
        return True

    def _is_unused(self) -> bool:
        return next(self._listed("list_objects_v2", "Contents"), None) is None

    @contextmanager
    def _telling_of_the_start(self) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            raise misconfigured(error, self._place) from error

    def put(self, content: IO[bytes], name: str, ext: str) -> StoredBytes:
        key = new_key(name, ext)
        start = content.tell()
        size_bytes = content.seek(0, os.SEEK_END) - start
        content.seek(start)
        where = {"Bucket": self._place.bucket, "Key": self._place.prefix + key}
        try:
            with telling():
                named = {"Metadata": {_NAME: key}}
                self._client.upload_fileobj(content, *where.values(), ExtraArgs=named, Config=_one_part())
                found = self._client.head_object(**where)
        except PictureGone as error:
            raise StorageAway("the studio's S3 storage does not keep what it takes") from error
        except KeyError as error:  # an upload in parts, to which a page has nothing to say
            raise StorageAway(ELSEWHERE) from error
        # Whoever sits in its place (a portal, a proxy's welcome) says yes to everything, and knows no names.
        if key not in found["Metadata"].values() or found.get("ContentLength") != size_bytes:
            raise StorageAway(ELSEWHERE)
        return StoredBytes(key, size_bytes)

    def open(self, key: str, asked: str | None = None) -> Reading:
        # S3 answers other requests with the whole, too; makes of it differ in what they take for one.
        part = {"Range": asked} if asked is not None and is_one_range(asked) else {}
        with telling():
            answer = self._client.get_object(Bucket=self._place.bucket, Key=self._place.prefix + key, **part)
            try:
                if not self._is_of_s3(key, answer):
                    raise StorageAway(ELSEWHERE)
            except BaseException:
                answer["Body"].close()
                raise
        content = io.BufferedReader(_Body(answer["Body"]))
        return Reading(content, answer["ContentLength"], answer.get("ContentRange"))

    def _is_of_s3(self, key: str, answer: Mapping[str, Any]) -> bool:
        """Whether it is the picture. A page in its place has a status, a length and a tag as well."""
        if "ContentLength" not in answer:
            return False
        if key in answer["Metadata"].values():
            return True
        # Programs that copy objects, from a backup say, may leave out the name; then the list must have it.
        name = self._place.prefix + key
        size = answer.get("ContentRange", "").rpartition("/")[2] or str(answer["ContentLength"])
        found = self._client.list_objects_v2(Bucket=self._place.bucket, Prefix=name, MaxKeys=1)
        return any(entry["Key"] == name and str(entry["Size"]) == size for entry in found.get("Contents", ()))

    def has(self, key: str) -> bool:
        with telling():
            return self._has(key)

    def address(self, key: str) -> str | None:
        return self._presigned(self._place.prefix + key) if self._has_addresses else None

    def delete(self, key: str) -> None:
        try:
            self._remove(self._place.prefix + key)
        except CannotStore as error:  # no row names it any more: it goes with what crashes leave
            logger.warning("picture not removed", extra={"key": key, "error": str(error)})

    def clear_unfinished(self) -> None:
        """Nothing: an upload becomes an object when it is whole. What it began is ended in
        :meth:`remove_unnamed`.
        """

    def remove_unnamed(self, named: Collection[str], since: float, until: float = float("inf")) -> int:
        removed = 0
        with telling():
            for entry in self._listed("list_objects_v2", "Contents"):
                key = entry["Key"].removeprefix(self._place.prefix)
                if key not in named and _is_between(entry["LastModified"], since, until):
                    self._remove(entry["Key"])
                    removed += 1
            for entry in self._listed("list_multipart_uploads", "Uploads"):
                if _is_between(entry["Initiated"], since, until):
                    self._client.abort_multipart_upload(
                        Bucket=self._place.bucket, Key=entry["Key"], UploadId=entry["UploadId"]
                    )
        return removed

    def _remove(self, name: str) -> None:
        with suppress(PictureGone), telling():  # some makes of S3 say so
            self._client.delete_object(Bucket=self._place.bucket, Key=name)

    def _listed(self, operation: str, what: str) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator(operation)
        for page in pages.paginate(Bucket=self._place.bucket, Prefix=self._place.prefix):
            for entry in page.get(what, ()):
                # What lies below a longer prefix is another studio's.
                name = entry["Key"].removeprefix(self._place.prefix)
                if "/" not in name and is_key(name):
                    yield entry

    def _presigned(self, key: str) -> str:
        return str(
            self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._place.bucket, "Key": key}, ExpiresIn=ADDRESS_S
            )
        )


class _Body(io.RawIOBase):
    """An object on its way; what goes wrong is told as everywhere here."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with telling(), memoryview(buffer) as view:
            piece: bytes = self._body.read(len(view))
            view[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._body.close()
        super().close()


def _configuration() -> Config:
    return Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=_CONNECTIONS,
        signature_version="s3v4",  # presigned addresses would have an older form in some regions
        # Checksums in trailers, boto3's default, are AWS's own: other makes of S3 refuse them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _region(session: Any) -> str:
    # AWS_REGION is the newer name, which boto3 does not know. Without any, storage that has no regions is
    # signed for as the first.
    return str(os.environ.get("AWS_REGION") or session.region_name or "us-east-1")


def _one_part() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=1, use_threads=False
    )


def _is_between(when: datetime, since: float, until: float) -> bool:
    return since < when.timestamp() < until
