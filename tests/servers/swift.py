"""A real S3 server: OpenStack Swift with its s3api, all four of its services in one child process.

It checks signatures, expiry, digests, conditions and clock skew as AWS does, which in-memory imitations do
not. The object service is Swift's in-memory one, so that a file system without extended attributes will do.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ACCESS_KEY = "test:tester"  # tempauth: account and user
SECRET_KEY = "testing"

FILTERS = (
    "catch_errors", "gatekeeper", "listing_formats", "s3api", "tempauth", "bulk", "slo", "dlo", "symlink",
    "versioned_writes",
)  # fmt: skip
OPTIONS = {
    "s3api": "location = us-east-1\nallow_no_owner = true",
    "tempauth": f"user_test_tester = {SECRET_KEY} .admin",
}
PROXY = f"""
[DEFAULT]
swift_dir = {{folder}}
[pipeline:main]
pipeline = {" ".join(FILTERS)} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
""" + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{OPTIONS.get(name, '')}\n" for name in FILTERS)
BACKEND = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
[app:main]
use = {app}
replication_server = false
"""
APPS = {
    "account": "egg:swift#account",
    "container": "egg:swift#container",
    "object": "call:swift.obj.mem_server:app_factory",
}


@dataclass(frozen=True)
class Swift:
    """A running store and the one user it knows."""

    port: int
    pid: int
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def running_swift(clock_offset_s: float = 0.0) -> Iterator[Swift]:
    """Run a store in a temporary folder. Its clock may be off by `clock_offset_s`."""
    with tempfile.TemporaryDirectory(prefix="swift-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.servers.swift", folder, str(clock_offset_s)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"Swift did not start: {log.read_text()[-2000:]}")
            yield Swift(port=json.loads(line)["port"], pid=process.pid)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def serve(folder: Path, clock_offset_s: float) -> None:
    """Run the four services for ever; the port of the S3 side goes to stdout once all of them listen."""
    shift_clock(clock_offset_s)
    import eventlet
    from swift.common import utils
    from swift.common.wsgi import ConfigString, SwiftHttpProtocol, loadapp

    utils.eventlet_monkey_patch()
    utils.HASH_PATH_SUFFIX = utils.HASH_PATH_PREFIX = b"tests"
    sockets = {name: eventlet.listen(("127.0.0.1", 0), backlog=512) for name in (*APPS, "proxy")}
    for name in APPS:
        write_ring(folder, name, sockets[name].getsockname()[1])
    (folder / "devices" / "d1").mkdir(parents=True)
    for name, listener in sockets.items():
        text = PROXY if name == "proxy" else BACKEND
        config = ConfigString(text.format(folder=folder, app=APPS.get(name)))
        app = loadapp(config, global_conf={"log_name": name, "log_level": "WARNING"})
        options = {"protocol": SwiftHttpProtocol, "capitalize_response_headers": False, "max_size": 512}
        eventlet.spawn(eventlet.wsgi.server, listener, app, utils.NullLogger(), **options)
    sys.stdout.write(json.dumps({"port": sockets["proxy"].getsockname()[1]}) + "\n")
    sys.stdout.flush()
    while True:
        eventlet.sleep(3600)


def write_ring(folder: Path, service: str, port: int) -> None:
    """One device, one replica, sixteen partitions."""
    from swift.common.ring import RingBuilder

    builder = RingBuilder(4, 1, 0)
    builder.add_dev({
        "id": 0, "region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": port, "device": "d1",
        "replication_ip": "127.0.0.1", "replication_port": port,
    })  # fmt: skip
    builder.rebalance()
    builder.get_ring().save(str(folder / f"{service}.ring.gz"))


def shift_clock(offset_s: float) -> None:
    """Put this process's wall clock off, before anything has taken `time.time` by name."""
    import time

    if offset_s:
        true_time = time.time
        true_gmtime = time.gmtime
        time.time = lambda: true_time() + offset_s
        time.gmtime = lambda seconds=None: true_gmtime(time.time() if seconds is None else seconds)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]))
