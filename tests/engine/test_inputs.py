"""From a parsed request to decoded media: what is read, what it is called when it fails, what is kept of it."""

import base64
import threading
from hashlib import sha256

import numpy as np
import pytest

from engine import inputs, log
from engine.pictures import decode_picture
from engine.settings import Settings
from schemas.errors import Cancelled, FetchFailed, InvalidMedia
from schemas.input_schema import parse_request
from schemas.request import Request
from tests.engine.test_clips import clip, level
from tests.servers.http_peer import Peer, serve
from tests.zoo import photo, save

PNG = save(photo(), "PNG")
OTHER = save(photo(32, 32), "PNG")


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def svi(**fields: object) -> Request:
    both = {"image_start": data_uri(PNG), "image_end": data_uri(OTHER)}
    return parse_request({"mode": "svi_endframe", "prompt": "x"} | both | fields)


def go_on() -> None:
    """What is asked between two files of a job that nobody stops."""


def test_load_decodes_every_picture_and_hashes_its_file():
    request = svi(image_refs=[data_uri(PNG)])
    media = inputs.load(request, Settings(), go_on)
    assert media.pictures["image_start"].tobytes() == photo().tobytes()
    assert media.pictures["image_end"].size == (32, 32)
    assert [picture.size for picture in media.pictures["image_refs"]] == [(64, 48)]
    png, other = sha256(PNG).hexdigest(), sha256(OTHER).hexdigest()
    assert media.hashes == {"image_start": png, "image_end": other, "image_refs": [png]}


def test_load_decodes_two_pictures_at_a_time(monkeypatch):
    """Each waits until the other has begun."""
    both = threading.Barrier(2)

    def decode(data: bytes) -> object:
        both.wait(10)
        return decode_picture(data)

    monkeypatch.setattr(inputs, "decode_picture", decode)
    assert list(inputs.load(svi(), Settings(), go_on).pictures) == ["image_start", "image_end"]


def test_load_decodes_under_the_name_of_the_job(monkeypatch):
    """Else what the log says of a decoder belongs to nobody."""
    seen: list[str] = []
    monkeypatch.setattr(inputs, "decode_picture", lambda _: seen.append(log._job_id.get()))
    with log.for_job("job-7"):
        inputs.load(svi(), Settings(), go_on)
    assert seen == ["job-7", "job-7"]


def test_load_begins_no_decoding_of_a_job_that_was_stopped_while_it_read(monkeypatch):
    looks: list[None] = []

    def check() -> None:
        looks.append(None)
        if len(looks) == 3:  # two files are read
            raise Cancelled("the job was cancelled")

    begun: list[bytes] = []
    monkeypatch.setattr(inputs, "decode_picture", begun.append)
    with pytest.raises(Cancelled):
        inputs.load(svi(), Settings(), check)
    assert begun == []


def test_load_leaves_no_decoding_behind_when_a_picture_is_wrong():
    with pytest.raises(InvalidMedia, match=r"^image_start: "):
        inputs.load(svi(image_start=data_uri(b"no picture"), image_refs=[data_uri(PNG)]), Settings(), go_on)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


def test_load_takes_as_many_frames_of_a_video_as_its_motion_is_encoded_from():
    request = svi(prefix_video=data_uri(clip(24), "video/mp4"), overlap=8)
    frames = inputs.load(request, Settings(), go_on).pictures["prefix_video"]
    greys = [np.asarray(frame).mean() for frame in frames]
    assert np.abs(np.array(greys) - [level(index) for index in range(11, 24)]).max() <= 2


def test_load_reads_urls_of_hosts_on_the_list_only():
    with Peer(serve(PNG)) as peer:
        request = parse_request({"mode": "video", "prompt": "x", "image_url": peer.url()})
        assert inputs.load(request, Settings(fetch_allow=peer.allow), go_on).pictures["image_url"].size == (64, 48)
        with pytest.raises(FetchFailed, match=r"^image_url: the URL could not be read"):
            inputs.load(request, Settings(), go_on)
    assert peer.hits == 1


@pytest.mark.parametrize(("looks", "read"), [(0, 0), (2, 2), (3, 3), (4, 3)])
def test_load_stops_between_two_files_and_before_each_decode(looks: int, read: int):
    """Three files are read, then three fields decoded."""

    def check() -> None:
        seen.append(None)
        if len(seen) > looks:
            raise Cancelled("the job was cancelled")

    seen: list[None] = []
    with Peer(serve(PNG)) as peer:
        request = svi(image_start=peer.url(), image_end=peer.url(), image_refs=[peer.url()])
        with pytest.raises(Cancelled):
            inputs.load(request, Settings(fetch_allow=peer.allow), check)
    assert peer.hits == read


def test_load_gives_all_urls_of_a_job_one_budget():
    with Peer(serve(PNG)) as peer:
        settings = Settings(fetch_allow=peer.allow, fetch_max_mib=1.4 * len(PNG) / inputs.MIB)
        with pytest.raises(FetchFailed, match=r"^image_refs: the URL's body is larger than"):
            inputs.load(svi(image_start=peer.url(), image_end=peer.url(), image_refs=[peer.url()]), settings, go_on)
    assert peer.hits == 3


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_end": data_uri(b"hello")}, "image_end: not a PNG, JPEG or WebP picture"),
        ({"image_refs": [data_uri(PNG[:99])]}, "image_refs: the picture is damaged or cut short"),
        ({"image_end": data_uri(PNG, "video/mp4")}, "image_end: the data URI must be of type image/*"),
        (
            {"prefix_video": data_uri(PNG, "video/mp4")},
            "prefix_video: not an MP4, MOV, WebM or Matroska video",
        ),
    ],
)
def test_load_names_the_field_that_is_wrong(fields, sentence):
    with pytest.raises(InvalidMedia) as caught:
        inputs.load(svi(**fields), Settings(), go_on)
    assert caught.value.sentence == sentence


def test_load_refuses_more_bytes_than_the_setting():
    with pytest.raises(InvalidMedia, match=r"^image_start: holds more than 104 bytes$"):
        inputs.load(svi(), Settings(fetch_max_mib=0.0001), go_on)


def test_fingerprint_is_the_same_for_the_same_fields_in_another_order():
    assert inputs.fingerprint({"a": 1, "b": "\ud800"}) == inputs.fingerprint({"b": "\ud800", "a": 1})
    others = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": ["1"]}, {"a": inputs.fingerprint("1")}, {"a": "1", "b": None}, "1"]
    assert len({inputs.fingerprint(other) for other in others}) == len(others)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_draw_seed_takes_the_requests(seed):
    assert inputs.draw_seed(parse_request({"prompt": "x", "seed": seed})) == seed


@pytest.mark.parametrize("seed", [None, -1])
def test_draw_seed_draws_anew_each_time_when_the_choice_is_ours(seed):
    drawn = {inputs.draw_seed(parse_request({"prompt": "x", "seed": seed})) for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= one < 2**32 for one in drawn)
