import pytest

from engine.urls import Target, parse_url
from schemas.errors import FetchFailed

GOOD = [
    ("http://example.com", Target("http", "example.com", 80, "/")),
    ("HTTPS://Example.COM/A/b.png", Target("https", "example.com", 443, "/A/b.png")),
    ("https://example.com:8443/a?b=c&d=%2F#frag", Target("https", "example.com", 8443, "/a?b=c&d=%2F")),
    ("https://example.com.:443/", Target("https", "example.com", 443, "/")),
    ("https://example.com:/x", Target("https", "example.com", 443, "/x")),
    ("http://[::1]:80/x", Target("http", "::1", 80, "/x")),
    ("http://[0:0::0:1]/x", Target("http", "::1", 80, "/x")),
    ("http://127.0.0.1:80#@example.com", Target("http", "127.0.0.1", 80, "/")),
    ("https://example.com/fu\u00df/\u732b.png", Target("https", "example.com", 443, "/fu%C3%9F/%E7%8C%AB.png")),
    ("https://b\u00fccher.example/", Target("https", "xn--bcher-kva.example", 443, "/")),
    ("https://s3_bucket.example.com/", Target("https", "s3_bucket.example.com", 443, "/")),
    ("https://h/a?X-Amz-Sig=a~c&x=[1]|'<>", Target("https", "h", 443, "/a?X-Amz-Sig=a~c&x=[1]|'%3C%3E")),
]


@pytest.mark.parametrize(("text", "target"), GOOD)
def test_parse_url_takes_apart(text, target):
    assert parse_url(text) == target


BAD = [
    "", "a", "/etc/passwd", "//example.com/x", "example.com/x", "file:///etc/passwd", "ftp://example.com/x",
    "gopher://example.com:70/x", "http+unix://%2Fvar%2Frun%2Fdocker.sock/", "data:image/png;base64,AAAA",
    "javascript:1", "http://", "http:///x", "http:/example.com", "http://user@example.com/", "http://u:p@example.com/",
    "http://example.com@127.0.0.1/", "http://@127.0.0.1/", "http://127.0.0.1\\@example.com/", "http:\\\\127.0.0.1/",
    "http://example.com\\.127.0.0.1/", " http://example.com/", "http://example.com/ ", "http://exam ple.com/",
    "http://example.com/a b", "http://example.com/\r\nHost: x", "http://example.com/\tx", "http://exam\nple.com/",
    "http://example.com/\x00", "http://example.com/\x7f", "http://example.com/\x85", "http://example.com/\u2028",
    "http://example.com/\u202e", "http://example.com/\ud800", "http://exam\u00a0ple.com/", "http://exam\u200bple.com/",
    "http://example.com:99999/", "http://example.com:-1/", "http://example.com:8o/", "http://example.com:80:80/",
    "http://example.com:\uff18\uff10/", "http://[::1/", "http://::1/", "http://[::1]evil.com/", "http://a[::1]/",
    "http://[fe80::1%25eth0]/", "http://[fe80::1%eth0]/", "http://[127.0.0.1]/", "http://[v1.x]/", "http://[]/",
    "http://a..b/", "http://.a/", f"http://{'a' * 64}.com/", f"http://{'a.' * 130}com/", "http://%31%32%37.0.0.1/",
    "http://exa%00mple.com/", "http://a,b/", "http://a;b/", "http://a/" + "x" * 8192, "http://ex*mple.com/",
    "http://fa\u00df.de/", "http://FA\u1e9e.de/", "http://a\u03c2.gr/",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_parse_url_refuses(text):
    with pytest.raises(FetchFailed):
        parse_url(text)


@pytest.mark.parametrize("text", [text for text, _ in GOOD])
def test_parse_url_reads_its_own_writing(text):
    target = parse_url(text)
    assert parse_url(target.url) == target


def test_parse_url_keeps_odd_digits_out_of_the_host():
    assert parse_url("http://\uff11\u3002\uff11.1.1/").host == "1.1.1.1"


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/b?c", "https://h:444/b?c"),
        ("b", "https://h:444/a/b"),
        ("//other/b", "https://other/b"),
        ("https://other:1/b", "https://other:1/b"),
        ("", "https://h:444/a/x"),
    ],
)
def test_follow_resolves_a_location(location, url):
    assert parse_url("https://h:444/a/x").follow(location).url == url


@pytest.mark.parametrize(
    "location",
    [
        "http://h/",
        "file:///etc/passwd",
        "https://u@h/",
        "https://h\\@x/",
        "https://h/a b",
        "\thttps://h/",
        "https://[/",
    ],
)
def test_follow_refuses(location):
    with pytest.raises(FetchFailed):
        parse_url("https://h/").follow(location)
