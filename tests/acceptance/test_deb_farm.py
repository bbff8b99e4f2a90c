"""The package for a studio of one's own on PostgreSQL and S3: its drivers, in the worker's own Python."""

from __future__ import annotations

import pytest

from tests.acceptance import figures
from tests.acceptance.box import Box
from tests.acceptance.conftest import Debs

PYTHON = "/usr/lib/studio-worker/bin/python3"
DRIVERS = """
import boto3, psycopg
assert psycopg.pq.__impl__ == "binary", psycopg.pq.__impl__
assert psycopg.pq.version() >= 170000
for service in ("s3", "sts", "sso", "sso-oidc", "signin"):
    client = boto3.client(
        service, region_name="eu-central-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    assert client.meta.service_model.service_name == service
storage = boto3.client(
    "s3", endpoint_url="http://127.0.0.1:9", region_name="x", aws_access_key_id="k", aws_secret_access_key="s"
)
assert "Signature=" in storage.generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"})
try:
    psycopg.connect("postgresql://nobody@127.0.0.1:9/none")
except psycopg.OperationalError as error:
    print(error)
"""


@pytest.mark.short
def test_farm_package_brings_the_drivers(box: Box, debs: Debs) -> None:
    """Without the package S3 is refused with the command that helps; with it, installed without network, the
    drivers work in the worker's own Python; removed, it leaves nothing, and the worker as it was.
    """
    machine = box.machine
    storage = ("--data", "/tmp/studio", "--pictures", "s3://pictures/of-ours")
    refused = machine.run("studio-worker", "local-studio", *storage, check=False)
    assert refused.returncode == 78, refused.stderr
    assert "apt install studio-worker-farm" in refused.stderr
    machine.copy_in(debs.farm, "/root/debs")
    machine.run("unshare", "--net", "sh", "-c", "apt-get install -y /root/debs/*.deb")
    assert (
        "refused" in machine.run(PYTHON, "-c", DRIVERS).stdout
    )  # by nobody's database, and not by a library
    owned = machine.run("dpkg", "--listfiles", "studio-worker-farm").stdout.splitlines()
    strays = [path for path in owned if not path.startswith(("/usr/lib/studio-worker/lib", "/usr/share"))]
    assert strays == ["/.", "/usr", "/usr/lib", "/usr/lib/studio-worker"]
    assert machine.run("dpkg", "--verify", "studio-worker-farm").stdout == ""
    machine.run("apt-get", "purge", "-y", "studio-worker-farm")
    assert machine.run(PYTHON, "-c", "import psycopg", check=False).returncode == 1
    assert machine.run("dpkg", "--verify", "studio-worker").stdout == ""
    assert machine.run("studio-worker", "version").returncode == 0
    figures.note("studio-worker-farm", "installed and removed in a booted machine")
