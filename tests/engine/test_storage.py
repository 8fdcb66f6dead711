"""Which way a file goes, and the two ways without S3: the machine's own disk and the response itself."""

import base64
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.delivery import job_key
from engine.outputs import MediaFile
from engine.s3_store import GuestStore, S3Store
from engine.settings import Secret, Settings
from engine.storage import InlineStore, LocalStore, open_store, sweep
from schemas.errors import DeliveryFailed, EncodingFailed, InvalidInput, OutputTooLarge, SettingsError
from tests.servers.buckets import media_file

PREFIX = len("data:video/mp4;base64,")
S3_CONFIG = {
    "accessId": "AKID",
    "accessSecret": "CANARY",
    "bucketName": "mine",
    "endpointUrl": "https://1.1.1.1",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(output_dir=tmp_path / "output", outbox_dir=tmp_path / "outbox")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "output")


def with_bucket(settings: Settings) -> Settings:
    return replace(
        settings,
        bucket_endpoint_url="https://store.example/pics",
        bucket_access_key_id=Secret("AKID"),
        bucket_secret_access_key=Secret("CANARY"),
    )


def video(folder: Path, body: bytes) -> MediaFile:
    folder.mkdir()
    return media_file(folder / "video.mp4", body)


def test_open_store_is_the_disk_outside_the_cloud(settings: Settings) -> None:
    assert open_store(settings) == LocalStore(settings.output_dir)


def test_open_store_is_the_response_in_the_cloud(settings: Settings) -> None:
    assert open_store(replace(settings, in_cloud=True)) == InlineStore(9_500_000)


@pytest.mark.parametrize("in_cloud", [True, False])
def test_open_store_is_the_operators_bucket_when_it_is_set(settings: Settings, in_cloud: bool) -> None:
    store = open_store(replace(with_bucket(settings), in_cloud=in_cloud))
    assert isinstance(store, S3Store)
    assert (store.bucket.name, store.outbox_dir, store.terms.retry_s) == ("pics", settings.outbox_dir, 180.0)


def test_open_store_puts_a_requests_bucket_before_the_operators(settings: Settings) -> None:
    store = open_store(with_bucket(settings), S3_CONFIG)
    assert isinstance(store, GuestStore)
    assert (store.bucket.name, store.bucket.secret_access_key) == ("mine", "CANARY")
    assert "CANARY" not in repr(store)


@pytest.mark.parametrize("s3_config", [{}, "", [], False, 0])
def test_open_store_does_not_take_an_empty_config_for_none(settings: Settings, s3_config: object) -> None:
    with pytest.raises(InvalidInput, match="s3Config"):
        open_store(with_bucket(settings), s3_config)


def test_open_store_refuses_an_endpoint_without_a_bucket(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="BUCKET_ENDPOINT_URL: names no bucket"):
        open_store(replace(with_bucket(settings), bucket_endpoint_url="https://store.example"))


def test_local_delivers_an_absolute_path_that_outlives_the_work_folder(local: LocalStore, tmp_path: Path) -> None:
    file = media_file(tmp_path / "video.mp4", b"frames")
    [delivered] = local.deliver([file], "job-7")
    file.path.unlink()
    assert delivered.url == str(tmp_path / "output/c37bd1a8462d7ad637654ed3043935aa/video.mp4")
    assert (delivered.kind, Path(delivered.url).read_bytes()) == ("local", b"frames")
    assert Path(delivered.url).stat().st_mode & 0o777 == 0o644


def test_local_replaces_no_other_video_of_the_same_job(local: LocalStore, tmp_path: Path) -> None:
    [first] = local.deliver([video(tmp_path / "1", b"first")], "local_test")
    [second] = local.deliver([video(tmp_path / "2", b"second")], "local_test")
    [again] = local.deliver([video(tmp_path / "3", b"first")], "local_test")
    assert (Path(first.url).name, Path(second.url).name) == ("video.mp4", "video-16367aac.mp4")
    assert again.url == first.url
    assert (Path(first.url).read_bytes(), Path(second.url).read_bytes()) == (b"first", b"second")


def test_local_replaces_no_video_of_a_run_at_the_same_time(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = video(tmp_path / "1", b"first"), video(tmp_path / "2", b"second")
    fsync, placed = os.fsync, []

    def other_run_first(descriptor: int) -> None:
        if not placed:
            placed.append(descriptor)
            local.deliver([first], "local_test")
        fsync(descriptor)

    monkeypatch.setattr("engine.storage.os.fsync", other_run_first)
    path = Path(local.deliver([second], "local_test")[0].url)
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == {
        "video.mp4": b"first",
        "video-16367aac.mp4": b"second",
    }


def test_local_delivers_where_there_are_no_hard_links(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Path, _target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = Path(local.deliver([media_file(tmp_path / "video.mp4", b"frames")], "job-7")[0].url)
    assert [each.read_bytes() for each in path.parent.iterdir()] == [b"frames"]


def test_local_delivers_pictures_as_data_uris(local: LocalStore, tmp_path: Path) -> None:
    [delivered] = local.deliver([media_file(tmp_path / "image-0.png", b"\x89PNG", "image/png")], "job-7")
    assert (delivered.url, delivered.kind) == ("data:image/png;base64,iVBORw==", "inline")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("job_id", ["../../evil", "/evil", "", ".", "\x00", "x" * 5000, "\ud800", "usr"])
def test_local_writes_nothing_outside_its_folder_whatever_the_job_id(
    local: LocalStore, tmp_path: Path, job_id: str
) -> None:
    file = media_file(tmp_path / "video.mp4", b"frames")
    before = set(tmp_path.rglob("*"))
    path = Path(local.deliver([file], job_id)[0].url)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "output", path.parent, path}
    assert path.parent.parent == tmp_path / "output"


@pytest.mark.parametrize("name", ["../video.mp4", "video", ".mp4", "a/b.mp4", "", "Video.mp4", "video.mp4\n"])
def test_a_file_name_is_a_plain_one(name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain file name"):
        job_key("job-7", name)


def test_local_names_its_setting_when_the_disk_does_not_take_the_file(tmp_path: Path) -> None:
    (tmp_path / "output").write_bytes(b"a file, where a folder should be")
    with pytest.raises(DeliveryFailed) as caught:
        LocalStore(tmp_path / "output").deliver([media_file(tmp_path / "video.mp4", b"x")], "job-7")
    assert caught.value.sentence == (
        "WORKER_OUTPUT_DIR did not take c37bd1a8462d7ad637654ed3043935aa/video.mp4 (Not a directory)"
    )


def test_local_leaves_nothing_half_written_when_the_disk_fails(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.storage.os.fsync", fail)
    with pytest.raises(DeliveryFailed, match=r"\(No space left on device\)"):
        local.deliver([media_file(tmp_path / "video.mp4", b"x")], "job-7")
    assert [path for path in (tmp_path / "output").rglob("*") if path.is_file()] == []


def test_local_remembers_no_response(local: LocalStore) -> None:
    response = {"seed": 5}
    assert local.record("job-7", "1" * 64, response, []) is response
    assert local.recall("job-7", "1" * 64) is None


def test_inline_delivers_a_data_uri(tmp_path: Path) -> None:
    [delivered] = InlineStore(1000).deliver([media_file(tmp_path / "video.mp4", b"frames")], "job-7")
    assert delivered.url == "data:video/mp4;base64,ZnJhbWVz"
    assert (delivered.kind, delivered.size_bytes) == ("inline", 6)


@pytest.mark.parametrize(("size", "fits"), [(738, True), (739, False)])
def test_inline_measures_the_file_as_base64(tmp_path: Path, size: int, fits: bool) -> None:
    file = media_file(tmp_path / "video.mp4", b"x" * size)
    store = InlineStore(PREFIX + 984)  # 738 bytes are 984 characters of base64, 739 are 988
    if fits:
        url = store.deliver([file], "job-7")[0].url
        assert len(url) == PREFIX + 984
        assert base64.b64decode(url[PREFIX:]) == b"x" * size
    else:
        with pytest.raises(OutputTooLarge):
            store.deliver([file], "job-7")


def test_inline_names_the_way_out_when_the_file_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(OutputTooLarge) as caught:
        InlineStore(9_500_000).deliver([media_file(tmp_path / "video.mp4", b"\0" * 12_000_000)], "job-7")
    assert caught.value.sentence == (
        "the video.mp4 as base64 is 16.0 MB, over the 9.5 MB that a response may have; to have it in S3, set"
        " BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY, or send s3Config"
    )


def test_inline_says_that_the_file_is_gone_when_it_is(tmp_path: Path) -> None:
    file = media_file(tmp_path / "video.mp4", b"frames")
    file.path.unlink()
    with pytest.raises(EncodingFailed, match="the finished file cannot be read from the worker's disk"):
        InlineStore(1000).deliver([file], "job-7")


def test_sweep_does_nothing_without_a_bucket(settings: Settings) -> None:
    assert sweep(settings) == 0
