import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.media import decode_base64, read_media
from schemas.errors import FetchFailed, InvalidMedia

BODY = bytes(range(256))
STANDARD = base64.b64encode(BODY).decode()
URL_SAFE = base64.urlsafe_b64encode(BODY).decode()


def no_fetch(url: str) -> bytes:
    raise AssertionError(f"fetched {url}")


def read(value: str, max_bytes: int = 256, kind: str = "image") -> bytes:
    return read_media(value, kind, fetch=no_fetch, max_bytes=max_bytes)


@pytest.mark.parametrize(
    "value",
    [
        STANDARD,
        URL_SAFE,
        STANDARD.rstrip("="),
        URL_SAFE.rstrip("="),
        "\n".join(STANDARD[i : i + 76] for i in range(0, len(STANDARD), 76)) + "\n",
        "\r\n".join(URL_SAFE[i : i + 64] for i in range(0, len(URL_SAFE), 64)),
        f"data:image/png;base64,{STANDARD}",
        f"data:image/webp;base64,{URL_SAFE}",
        f"DATA:Image/JPEG;Base64,{STANDARD}",
        f"data:image/svg+xml;charset=utf-8;base64,{STANDARD}",
        f'data:image/png;name="a.png";base64,{STANDARD}',
        f"data:image/png;base64,\n{STANDARD}\n",
    ],
)
def test_read_media_reads_every_form_of_base64(value):
    assert read(value) == BODY


@pytest.mark.parametrize(
    "value",
    [
        "",
        "=",
        "====",
        "A",
        "AAAAA",
        "AAAAA===",
        "aGVsbG8=!!!",
        "aGVsbG8=aGVsbG8=",
        "aGVsbG8==",
        "aGVsbA=",
        "aGVs=bG8",
        "aGVs bG8=",
        "aGVs\tbG8=",
        "aGVs\x00bG8=",
        "aGVsbG8\u00e9",
        "+/+/-_-_",
        "AAAA====",
        "AAA=AAA=",
        "AAAA\ud800",
        "\uff21\uff21\uff21\uff21",
        "/etc/shadow.d",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "../a.png",
        "C:\\a.png",
        "s3://bucket/a.png",
    ],
)
def test_read_media_refuses_what_is_no_base64(value):
    with pytest.raises(InvalidMedia, match=r"must be an http\(s\) URL, a data URI or base64"):
        read(value)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (f"data:image/png,{STANDARD}", "the data URI must read data:<type>;base64,<data>"),
        (f"data:image/png;base64{STANDARD}", "the data URI must read data:<type>;base64,<data>"),
        (f"data:image/png;base64;x=y,{STANDARD}", "the data URI must read data:<type>;base64,<data>"),
        ("data:", "the data URI must read data:<type>;base64,<data>"),
        ("data:" + "a" * 300 + ";base64,AAAA", "the data URI must read data:<type>;base64,<data>"),
        (f"data:;base64,{STANDARD}", "the data URI must be of type image/*"),
        (f"data:text/html;base64,{STANDARD}", "the data URI must be of type image/*"),
        (f"data:video/mp4;base64,{STANDARD}", "the data URI must be of type image/*"),
        (f"data:images/png;base64,{STANDARD}", "the data URI must be of type image/*"),
        ("data:image/png;base64,", "must be an http(s) URL, a data URI or base64"),
        ("data:image/png;base64,data:image/png;base64,AAAA", "must be an http(s) URL, a data URI or base64"),
    ],
)
def test_read_media_refuses_a_data_uri(value, sentence):
    with pytest.raises(InvalidMedia) as caught:
        read(value)
    assert caught.value.sentence == sentence


def test_read_media_wants_a_video_where_a_video_is_due():
    assert read(f"data:video/mp4;base64,{STANDARD}", kind="video") == BODY
    with pytest.raises(InvalidMedia, match="must be of type video"):
        read(f"data:image/png;base64,{STANDARD}", kind="video")


@pytest.mark.parametrize("value", [STANDARD, URL_SAFE.rstrip("="), f"data:image/png;base64,{STANDARD}", "A" * 10_000])
def test_read_media_refuses_more_bytes_than_the_limit(value):
    with pytest.raises(InvalidMedia, match="holds more than 255 bytes"):
        read(value, max_bytes=255)


@given(st.text(alphabet="AZaz09+/-_= \n\r\0é", max_size=12) | st.from_regex(r"[A-D+/_-]{0,9}={0,3}\n?", fullmatch=True))
def test_decode_base64_takes_what_one_of_the_alphabets_spells(text):
    whole = text.replace("\n", "").replace("\r", "")
    spelled = re.fullmatch(r"([A-Za-z0-9+/]+|[A-Za-z0-9_-]+)={0,2}", whole)
    digits = whole.rstrip("=")
    fits = len(digits) % 4 != 1 and (digits == whole or len(whole) % 4 == 0)
    if spelled and fits:
        assert decode_base64(text, 100) == base64.urlsafe_b64decode(
            digits.replace("+", "-").replace("/", "_") + "=" * (-len(digits) % 4)
        )
    else:
        with pytest.raises(InvalidMedia):
            decode_base64(text, 100)


def test_decode_base64_does_not_copy_what_is_far_too_long():
    with pytest.raises(InvalidMedia, match="holds more than 9 bytes"):
        decode_base64("\n" * 1000, 9)


@pytest.mark.parametrize("url", ["http://h/a.png", "https://h/a.png", "HTTPS://h/a.png"])
def test_read_media_hands_urls_to_fetch_as_they_are(url):
    asked = []

    def fetch(text: str) -> bytes:
        asked.append(text)
        return BODY

    assert read_media(url, "image", fetch=fetch, max_bytes=256) == BODY
    assert asked == [url]


def test_read_media_passes_the_failure_of_fetch_on():
    def fetch(text: str) -> bytes:
        raise FetchFailed("no")

    with pytest.raises(FetchFailed, match="no"):
        read_media("https://h/", "image", fetch=fetch, max_bytes=1)


def test_read_media_refuses_a_fetched_body_over_the_limit():
    with pytest.raises(InvalidMedia, match="holds more than 255 bytes"):
        read_media("https://h/", "image", fetch=lambda _: BODY, max_bytes=255)
