"""The question at start: would this store take a result, and would anybody be able to open it?"""

import logging
import re
from dataclasses import replace

import pytest

from engine import store_check
from engine.bucket import Bucket
from engine.s3 import Patience, connect
from engine.settings import Settings
from engine.store_check import check_store
from engine.upload import upload
from schemas.errors import DeliveryFailed, SettingsError
from tests.servers.buckets import bucket_at, client_of, contents, settings_for
from tests.servers.plain_store import PlainStore
from tests.servers.swift import running_swift

pytest_plugins = ["tests.servers.s3_fixtures"]


def test_check_store_passes_again_and_again_and_leaves_one_object(swift, bucket: Bucket, tmp_path) -> None:
    settings = settings_for(bucket, tmp_path)
    check_store(settings)
    check_store(settings)
    assert list(contents(swift, bucket)) == ["worker/check.txt"]
    assert (tmp_path / "outbox").is_dir()


def test_check_store_asks_nothing_without_s3(tmp_path) -> None:
    check_store(Settings(outbox_dir=tmp_path / "outbox"))
    assert not (tmp_path / "outbox").exists()


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("BUCKET_SECRET_ACCESS_KEY", "wrong",
         "the store says that the secret key is wrong; check BUCKET_SECRET_ACCESS_KEY"),
        ("BUCKET_REGION", "eu-west-1", "the region is not the bucket's; check BUCKET_REGION"),
        ("BUCKET_PREFIX", "x" * 1200, "the store refused the file (KeyTooLongError)"),
    ],
)  # fmt: skip
def test_check_store_names_the_setting(bucket, tmp_path, variable, value, sentence) -> None:
    with pytest.raises(SettingsError) as caught:
        check_store(settings_for(bucket, tmp_path, **{variable: value}))
    assert caught.value.sentence == sentence


def test_check_store_names_a_bucket_that_does_not_exist(bucket, tmp_path) -> None:
    with pytest.raises(SettingsError, match="the bucket does not exist; check BUCKET_NAME"):
        check_store(settings_for(replace(bucket, name="missing-bucket"), tmp_path))


def test_check_store_names_an_outbox_that_cannot_be_written(bucket, tmp_path) -> None:
    (tmp_path / "outbox").write_bytes(b"")
    with pytest.raises(SettingsError, match="WORKER_OUTBOX_DIR"):
        check_store(settings_for(bucket, tmp_path))


def test_check_store_calls_an_outage_an_outage(proxy, bucket, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store_check, "CHECK_S", 0.1)
    proxy.close()
    with pytest.raises(DeliveryFailed, match="the store did not answer"):
        check_store(settings_for(bucket, tmp_path))


def test_check_store_survives_a_fault_on_its_way(proxy, bucket, tmp_path) -> None:
    proxy.inject("503", 2)
    proxy.inject("500", 1, matching="X-Amz-Signature")
    proxy.inject("cut", 2, matching="GET ")
    check_store(settings_for(bucket, tmp_path))
    assert proxy.pending_faults == 0


@pytest.mark.parametrize(
    ("quirk", "sentence"),
    [
        ("no-metadata", "the store keeps no metadata of worker/check.txt"),
        ("no-signed-urls", "the store opens no signed URLs, so nobody could fetch a result"),
        ("flip", "the store does not give back what it took as worker/check.txt"),
    ],
)
def test_check_store_refuses_a_store_that_would_fail_a_job(tmp_path, quirk, sentence) -> None:
    with PlainStore(quirk) as store, pytest.raises(SettingsError, match=sentence):
        check_store(settings_for(bucket_at(store.endpoint), tmp_path))


@pytest.mark.parametrize(
    ("offset_min", "sentence"),
    [
        (16, "this worker's clock is 16 min behind the store's"),
        (-16, "this worker's clock is 16 min ahead of the store's"),
    ],
)
def test_check_store_refuses_a_clock_that_the_store_would_refuse(tmp_path, offset_min, sentence) -> None:
    with running_swift(clock_offset_s=60 * offset_min) as store:
        far = bucket_at(store.endpoint, "bucket", store.access_key, store.secret_key)
        with pytest.raises(SettingsError) as caught:
            check_store(settings_for(far, tmp_path))
        assert caught.value.sentence == f"{sentence}; the store refuses more than 15"
        with pytest.raises(DeliveryFailed, match="this worker's clock is wrong"):  # the control: it does refuse
            connect(far).create("a.txt", b"x", "text/plain", "0", Patience.lasting(0))


def test_check_store_warns_of_a_clock_that_still_works(tmp_path, make_file, caplog) -> None:
    with running_swift(clock_offset_s=600) as store, caplog.at_level(logging.WARNING):
        near = bucket_at(store.endpoint, "bucket", store.access_key, store.secret_key)
        client_of(store).create_bucket(Bucket="bucket")
        check_store(settings_for(near, tmp_path))
        file = make_file()
        upload(connect(near), file, "worker/ab/video.mp4", Patience.lasting(10))
        assert contents(store, near)["worker/ab/video.mp4"] == file.path.read_bytes()
    assert re.search("clock is 10 min behind the store's; from 15 on the store refuses", caplog.text)
