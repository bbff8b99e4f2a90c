"""OpenStack Swift with its S3 interface, all its servers in one process, for the Python of Debian's packages.

Run by :mod:`tests.farm.s3`, never imported: ``/usr/bin/python3 swift_node.py FOLDER PORT``. Below the folder
it keeps its configuration and its disk; the line it says once it listens is the port of the S3 interface.
"""

import configparser
import sys
from pathlib import Path

import eventlet
from eventlet import wsgi
from swift.common.ring import RingBuilder
from swift.common.utils import eventlet_monkey_patch, set_swift_dir
from swift.common.wsgi import loadapp

USER, SECRET = "test:studio", "testing-secret"
REGION = "us-east-1"
_PARTITIONS = 4
"""As a power of two."""

_CLUSTER = {
    "swift-hash": {"swift_hash_path_prefix": "tests", "swift_hash_path_suffix": "tests"},
    "storage-policy:0": {"name": "one", "default": "yes"},
}
_PIPELINE = {
    "catch_errors": {},
    "listing_formats": {},
    "s3api": {"location": REGION, "check_bucket_owner": "false"},
    "tempauth": {f"user_{USER.replace(':', '_')}": f"{SECRET} .admin"},
    "slo": {},
}


def write(path, sections):
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    with path.open("w") as file:
        parser.write(file)


def main(folder):
    eventlet_monkey_patch()
    disk = folder / "disks" / "one"
    disk.mkdir(parents=True, exist_ok=True)
    write(folder / "swift.conf", _CLUSTER)
    set_swift_dir(str(folder))  # it would take its own from /etc
    defaults = {"swift_dir": str(folder), "devices": str(disk.parent), "mount_check": "false"}
    defaults |= {"fallocate_reserve": "0", "disable_fallocate": "true", "log_level": "ERROR"}
    for kind in ("object", "container", "account"):
        listener = eventlet.listen(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        ring = RingBuilder(_PARTITIONS, 1, 0)
        place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
        ring.add_dev({"region": 1, "zone": 1, "device": disk.name, "weight": 1.0, "meta": "", **place})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{kind}.ring.gz"))
        app = {"pipeline:main": {"pipeline": kind}, f"app:{kind}": {"use": f"egg:swift#{kind}"}}
        serve(folder / f"{kind}.conf", {"DEFAULT": defaults, **app}, listener)
    proxy = {"use": "egg:swift#proxy", "account_autocreate": "true", "allow_account_management": "true"}
    filters = {f"filter:{name}": {"use": f"egg:swift#{name}", **said} for name, said in _PIPELINE.items()}
    pipeline = {
        "pipeline:main": {"pipeline": " ".join([*_PIPELINE, "proxy-server"])},
        "app:proxy-server": proxy,
    }
    listener = eventlet.listen(("127.0.0.1", int(sys.argv[2])))
    serve(folder / "proxy.conf", {"DEFAULT": defaults, **pipeline, **filters}, listener)
    print(listener.getsockname()[1], flush=True)
    while True:
        eventlet.sleep(3600)


class Cache:
    """In the place of a memcached: without one each request asks for the account and the bucket anew."""

    def __init__(self):
        self._values = {}

    def get(self, key, **_named):
        return self._values.get(key)

    def set(self, key, value, **_named):
        self._values[key] = value

    def delete(self, key, **_named):
        self._values.pop(key, None)


def serve(path, sections, listener):
    write(path, sections)
    app, cache = loadapp(str(path)), Cache()

    def with_cache(environ, start_response):
        environ["swift.cache"] = cache
        return app(environ, start_response)

    eventlet.spawn(wsgi.server, listener, with_cache, log_output=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
