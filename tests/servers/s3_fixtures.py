"""Fixtures over the S3 servers; a test module asks for them by naming this file in `pytest_plugins`."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.bucket import Bucket
from engine.outputs import MediaFile
from tests.servers.buckets import bucket_at, empty_bucket, media_file
from tests.servers.fault_proxy import FaultProxy
from tests.servers.swift import Swift, running_swift

MakeFile = Callable[..., MediaFile]


@pytest.fixture(scope="session")
def swift() -> Iterator[Swift]:
    """One store for the whole run."""
    with running_swift() as store:
        yield store


@pytest.fixture(scope="session")
def one_proxy(swift: Swift) -> Iterator[FaultProxy]:
    """The same port for every test, so that they share a client."""
    with FaultProxy(swift.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(one_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """In front of the real store, breaking nothing yet."""
    one_proxy.reset()
    yield one_proxy
    one_proxy.close()
    one_proxy.open()


@pytest.fixture
def bucket(swift: Swift, proxy: FaultProxy) -> Bucket:
    """An empty bucket on the real store, reached through the proxy."""
    empty_bucket(swift, "bucket")
    return bucket_at(proxy.endpoint, "bucket", swift.access_key, swift.secret_key)


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """Write random bytes that say they are a video."""

    def make(size_bytes: int = 100_000, name: str = "video.mp4", content_type: str = "video/mp4") -> MediaFile:
        folder = tmp_path / "work" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return media_file(folder / name, os.urandom(size_bytes), content_type)

    return make
