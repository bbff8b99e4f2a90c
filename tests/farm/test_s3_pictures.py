"""Pictures in S3 storage, against a real server: what is kept, what workers get, what an outage costs."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.local_studio.pictures import PictureGone, RangeRefused, StorageAway
from studio_worker.local_studio.pictures.s3 import ADDRESS_S, PART_BYTES, S3
from studio_worker.local_studio.places import owner_of
from tests.farm.s3 import SECRET, USER, S3Server
from tests.farm.s3_proxy import S3Proxy

WAIT_S = 30.0
CONTENT = bytes(range(256)) * 40


def content_of(pictures: S3, key: str, asked: str | None = None) -> tuple[bytes, str | None]:
    reading = pictures.open(key, asked)
    with reading.content as content:
        found = content.read()
    assert len(found) == reading.size_bytes
    return found, reading.content_range


def test_pictures_keep_to_their_prefix(s3_server: S3Server, bucket: str) -> None:
    """A picture is one object below the prefix, comes back byte for byte, and goes when it is deleted."""
    pictures = S3(f"s3://{bucket}/studio/pictures/")
    pictures.claim(owner_of("mine"), None, is_first=True)
    stored = pictures.put(io.BytesIO(CONTENT), "job", "png")
    assert s3_server.keys(bucket) == [f"studio/pictures/{stored.key}", "studio/pictures/studio"]
    assert (stored.size_bytes, stored.key[:4], stored.key[-4:]) == (len(CONTENT), "job-", ".png")
    assert content_of(pictures, stored.key) == (CONTENT, None)
    pictures.delete(stored.key)
    pictures.delete(stored.key)
    with pytest.raises(PictureGone):
        pictures.open(stored.key)
    assert s3_server.keys(bucket) == ["studio/pictures/studio"]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=8-11", 8, 11), ("bytes=10000-", 10000, 10239), ("bytes=-5", 10235, 10239)],
)
def test_pictures_are_read_in_parts(bucket: str, asked: str, first: int, last: int) -> None:
    """A range gets its bytes alone; one that begins behind the end is refused."""
    pictures = S3(f"s3://{bucket}")
    key = pictures.put(io.BytesIO(CONTENT), "job", "png").key
    assert content_of(pictures, key, asked) == (CONTENT[first : last + 1], f"bytes {first}-{last}/10240")
    with pytest.raises(RangeRefused):
        pictures.open(key, "bytes=10240-")


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "lines=1-2", "bytes=", "bytes=5"])
def test_ranges_that_s3_does_not_know_get_the_whole(bucket: str, asked: str) -> None:
    """Whoever asks for more than one range, or for something else, gets everything, which HTTP allows."""
    pictures = S3(f"s3://{bucket}")
    key = pictures.put(io.BytesIO(CONTENT), "job", "png").key
    assert content_of(pictures, key, asked) == (CONTENT, None)


def test_upload_begins_where_the_content_stands(bucket: str) -> None:
    """What was read of the content before is not part of the picture."""
    pictures = S3(f"s3://{bucket}/p")
    content = io.BytesIO(b"head" + CONTENT)
    content.seek(4)
    stored = pictures.put(content, "job", "png")
    assert (stored.size_bytes, content_of(pictures, stored.key)[0]) == (len(CONTENT), CONTENT)


_LARGE = """
import io, resource, sys
from studio_worker.local_studio.pictures.s3 import S3

class Zeros(io.RawIOBase):
    def __init__(self, size): self.size, self.at = size, 0
    def readable(self): return True
    def seekable(self): return True
    def tell(self): return self.at
    def seek(self, to, whence=0):
        self.at = to + (0, self.at, self.size)[whence]
        return self.at
    def readinto(self, buffer):
        count = min(len(buffer), self.size - self.at)
        buffer[:count] = bytes(count)
        self.at += count
        return count

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

pictures = S3(sys.argv[1])
pictures.put(io.BufferedReader(Zeros(9 << 20)), "small", "bin")  # two parts: all that is loaded late is there
pictures.open(pictures.put(io.BytesIO(bytes(1000)), "small", "bin").key).content.read()
before = peak_bytes()
stored = pictures.put(io.BufferedReader(Zeros(200 << 20)), "large", "bin")
with pictures.open(stored.key).content as content:
    read = sum(len(piece) for piece in iter(lambda: content.read(1 << 16), b""))
print(stored.size_bytes, read, peak_bytes() - before)
"""


def test_large_picture_takes_one_part_of_memory(bucket: str) -> None:
    """200 MiB go up and come down with at most one part of 8 MiB more in memory than a small one needs."""
    done = subprocess.run(
        [sys.executable, "-c", _LARGE, f"s3://{bucket}/p"], capture_output=True, text=True, check=True
    )
    size_bytes, read_bytes, more_bytes = map(int, done.stdout.split())
    assert size_bytes == read_bytes == 200 << 20
    assert more_bytes <= PART_BYTES


def test_presigned_address_needs_no_credentials_and_ends(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker fetches an input, by Range too, with its address alone; a day later it is refused."""
    pictures = S3(f"s3://{bucket}/p?inputs=presigned")
    pictures.check(owner_of("mine"))
    key = pictures.put(io.BytesIO(CONTENT), "input", "png").key
    url = pictures.address(key)
    assert url is not None
    assert requests.get(url, timeout=WAIT_S).content == CONTENT
    part = requests.get(url, headers={"Range": "bytes=8-11"}, timeout=WAIT_S)
    assert (part.status_code, part.content) == (206, CONTENT[8:12])
    said = parse_qs(urlsplit(url).query)
    assert (said["X-Amz-Expires"], ADDRESS_S) == (["86400"], 86_400)
    assert SECRET not in url
    assert requests.get(url.replace(key, "studio"), timeout=WAIT_S).status_code == 403, "for one object alone"
    yesterday = datetime.now(UTC) - timedelta(seconds=ADDRESS_S + 60)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: yesterday.replace(tzinfo=None))
    old = pictures.address(key)
    assert old is not None
    assert requests.get(old, timeout=WAIT_S).status_code == 403


@pytest.mark.parametrize(
    ("said", "has_address"), [("", False), ("?inputs=studio", False), ("?inputs=presigned", True)]
)
def test_workers_are_not_sent_where_they_refuse_to_go(bucket: str, said: str, has_address: bool) -> None:
    """Storage without a public https address gives no addresses of its own, unless it is told to."""
    pictures = S3(f"s3://{bucket}/p{said}")
    pictures.check(owner_of("mine"))
    assert (pictures.address("input-0123456789abcdef.png") is not None) == has_address


def test_sweep_removes_only_what_is_old_and_unnamed(s3_server: S3Server, bucket: str) -> None:
    """What a crash left without a row goes; what has one, is new, or is not the studio's stays."""
    pictures = S3(f"s3://{bucket}/p")
    pictures.claim(owner_of("mine"), None, is_first=True)
    named, unnamed = (pictures.put(io.BytesIO(CONTENT), name, "png").key for name in ("a", "b"))
    neighbour = S3(f"s3://{bucket}/p/deeper").put(io.BytesIO(CONTENT), "c", "png").key
    s3_server.client().put_object(Bucket=bucket, Key="p/notes.txt", Body=b"of a person")
    s3_server.client().create_multipart_upload(Bucket=bucket, Key=f"p/{unnamed}")
    now = time.time()
    assert pictures.remove_unnamed({named}, 0.0, now - 86_400) == 0
    assert pictures.remove_unnamed({named}, 0.0, now + 60) == 1
    assert sorted(s3_server.keys(bucket)) == [
        f"p/{named}",
        f"p/deeper/{neighbour}",
        "p/notes.txt",
        "p/studio",
    ]
    assert not s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_prefix_of_another_studio_is_refused(bucket: str) -> None:
    """Two databases never share a prefix, where each would remove the other's pictures."""
    for _ in range(2):
        S3(f"s3://{bucket}/p").claim(owner_of("mine"), None, is_first=True)
    with pytest.raises(ConfigError, match="another studio's database; choose another prefix"):
        S3(f"s3://{bucket}/p").check(owner_of("another"))


def test_prefix_is_one_databases_by_the_rule_of_folders(s3_server: S3Server, bucket: str) -> None:
    """A database has one prefix: a second one is refused and stays as it was, and so is one with pictures
    that it does not know. One with its newest picture is taken.
    """
    first = S3(f"s3://{bucket}/first")
    key = first.put(io.BytesIO(CONTENT), "job", "png").key
    with pytest.raises(
        ConfigError, match="has pictures that this database does not know; choose another prefix"
    ):
        first.claim(owner_of("mine"), None, is_first=True)
    first.claim(owner_of("mine"), key, is_first=False)
    with pytest.raises(ConfigError, match="this database's pictures are in another place; name the prefix"):
        S3(f"s3://{bucket}/second").claim(owner_of("mine"), key, is_first=False)
    with pytest.raises(ConfigError, match="this database's pictures are in another place"):
        S3(f"s3://{bucket}/second").claim(owner_of("mine"), None, is_first=False)
    assert sorted(s3_server.keys(bucket)) == [f"first/{key}", "first/studio"]


@pytest.mark.parametrize(
    ("address", "variables", "said"),
    [
        ("s3://no-such-bucket/p", {}, "there is no bucket 'no-such-bucket'"),
        ("s3://{bucket}/p", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses these credentials"),
        ("s3://{bucket}/p", {"AWS_ACCESS_KEY_ID": "test:nobody"}, "refuses these credentials"),
        ("s3://{bucket}/p", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "set AWS_ACCESS_KEY_ID"),
        ("s3://{bucket}/p", {"AWS_ENDPOINT_URL_S3": "somewhere"}, "AWS_ENDPOINT_URL_S3"),
        ("s3://{bucket}/p", {"AWS_REGION": "eu central 1"}, "AWS_REGION"),
        ("s3://{bucket}/p?inputs=maybe", {}, "write s3://BUCKET/PREFIX"),
        ("s3:///p", {}, "write s3://BUCKET/PREFIX"),
    ],
    ids=["bucket", "secret", "user", "nothing", "endpoint", "region", "query", "form"],
)
def test_wrong_storage_is_told_at_the_start(
    bucket: str, address: str, variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the storage's address or credentials ends the start, and its cure names no secret."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        S3(address.format(bucket=bucket)).check(owner_of("mine"))
    assert (caught.value.exit_status, caught.value.key) == (78, "--pictures")
    assert said in str(caught.value)
    assert USER not in str(caught.value)


def test_storage_that_is_away_is_told_as_what_may_pass(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Storage that refuses or is silent for a while costs one step, after three tries, and nothing is logged
    of how it is reached.
    """
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the pauses between tries
    caplog.set_level(logging.DEBUG)
    with S3Proxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        pictures = S3(f"s3://{bucket}/p")
        pictures.check(owner_of("mine"))
        key = pictures.put(io.BytesIO(CONTENT), "job", "png").key
        proxy.faults.refused = 1.0
        with pytest.raises(StorageAway, match="SlowDown"):
            pictures.put(io.BytesIO(CONTENT), "job", "png")
        assert proxy.counts["refused"] == 3
        with pytest.raises(StorageAway):
            pictures.open(key)
        pictures.delete(key)
        with pytest.raises(StateUnavailable, match="does not answer") as caught:
            S3(f"s3://{bucket}/p").check(owner_of("mine"))
        assert caught.value.exit_status == 75
        proxy.faults.refused, proxy.faults.is_down = 0.0, True
        with pytest.raises(StorageAway, match="does not answer"):
            pictures.put(io.BytesIO(CONTENT), "job", "png")
        proxy.faults.is_down = False
        assert content_of(pictures, key) == (CONTENT, None)
    assert "picture not removed" in caplog.messages
    assert not [text for text in caplog.messages if "Signature" in text or SECRET in text]


def test_connections_that_break_now_and_then_cost_nothing(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of several parts arrives whole although one request in five is refused or cut."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    large = CONTENT * 2000
    with S3Proxy(s3_server.port, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        pictures = S3(f"s3://{bucket}/p")
        proxy.faults.refused = proxy.faults.cut = 0.1
        stored = pictures.put(io.BytesIO(large), "job", "png")
        proxy.faults.refused = proxy.faults.cut = 0.0
        assert (stored.size_bytes, content_of(pictures, stored.key)[0]) == (len(large), large)
