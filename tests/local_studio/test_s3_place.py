"""The address of S3 storage, and whether workers are sent there."""

from __future__ import annotations

import pytest

from studio_worker.errors import ConfigError
from studio_worker.local_studio.pictures.s3_place import Place, is_public


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("s3://pictures", Place("pictures", "")),
        ("s3://pictures/", Place("pictures", "")),
        ("s3://pictures/studio/one/", Place("pictures", "studio/one/")),
        ("s3://my.bucket-1/p?inputs=studio", Place("my.bucket-1", "p/", "studio")),
    ],
)
def test_address_says_bucket_and_prefix(address: str, place: Place) -> None:
    """A prefix is a folder, with a slash at its end or without."""
    assert Place.of(address) == place


@pytest.mark.parametrize(
    "address",
    ["s3:pictures", "s3://a", "s3://key:secret@pictures/p", "s3://pictures/p?x=1", "s3://pictures#p"],
)
def test_address_that_is_none_is_told_and_not_repeated(address: str) -> None:
    """A mistake in the address names the right form, and never what was given: it may hold a secret."""
    with pytest.raises(ConfigError, match="write s3://BUCKET/PREFIX") as caught:
        Place.of(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "goes"),
    [
        ("https://1.1.1.1/b/k", True),
        ("https://[2606:4700::1111]/b/k", True),
        ("http://1.1.1.1/b/k", False),
        ("https://10.0.0.7:9000/b/k", False),
        ("https://127.0.0.1/b/k", False),
        ("https://[fd00::7]/b/k", False),
        ("https://169.254.169.254/b/k", False),
    ],
)
def test_workers_are_sent_to_public_https_addresses_alone(url: str, goes: bool) -> None:
    """Elsewhere a worker refuses to go, and the job would fail."""
    assert is_public(url) == goes
