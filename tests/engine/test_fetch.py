"""Fetching against real loopback peers. `public_loopback` makes 127.0.0.1 public, so that only the guard under test
stands between a URL and a listener; every guard is also shown to matter by a run without it."""

import gzip
import os
import random
import socket
import ssl
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest

from engine import addresses, fetch
from engine.fetch import CUT_SHORT, TOO_SLOW, UNREACHABLE, FetchBudget, check_endpoint
from schemas.errors import FetchFailed
from tests.servers.http_peer import Peer, hold, redirect, send_for_ever, send_raw, serve

OK_HEAD = b"HTTP/1.1 200 OK\r\n"
GOOD, FORBIDDEN = "127.0.0.1", "127.0.0.2"


def names(table: dict[str, list[str]]):
    """A resolver of these names and of every spelling of an address; it never asks a server."""

    def resolve(host: str, port: int) -> list[str]:
        if host in table:
            return table[host]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(sockaddr[0]) for *_, sockaddr in found]

    return resolve


LOCAL_NAMES = names({"localhost": ["127.0.0.1", "::1"], "localtest.me": ["127.0.0.1"], "mixed": ["127.0.0.1", "1.1.1.1"]})


@pytest.fixture
def public_loopback(monkeypatch):
    """127.0.0.1 counts as public, on any port. 127.0.0.2 does not."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == ip_address(GOOD))
    monkeypatch.setattr(addresses, "PUBLIC_PORTS", range(65_536))


def test_fetch_returns_the_body_and_asks_as_a_client_should():
    with Peer(serve(b"bytes")) as peer:
        assert fetch.fetch(peer.url("/a%20b?c=d"), allow=peer.allow) == b"bytes"
    lines = peer.requests[0].split("\r\n")
    assert lines[0] == "GET /a%20b?c=d HTTP/1.1"
    assert f"Host: 127.0.0.1:{peer.port}" in lines
    assert "Accept-Encoding: identity" in lines
    assert "Connection: close" in lines
    assert not any(line.lower().startswith(("cookie", "authorization", "referer")) for line in lines)


def hostile_urls(port: int) -> list[str]:
    """Every way known to us of writing a URL that leads to 127.0.0.1 or ::1 without looking like it, or that breaks."""
    hosts = [
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1",
        "0177.0.0.1", "017700000001", "0x7f.0x0.0x0.0x1", "127.0.0.1.", "0", "0.0.0.0", "127.255.255.254", "[::1]",
        "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]", "[::ffff:0:127.0.0.1]", "[fe80::1]", "[fec0::1]", "[fc00::1]", "localtest.me", "mixed",
        "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.0.0.1", "loc\u00adalhost",
        "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", "10.0.0.1", "169.254.169.254", "192.168.0.1", "168.63.129.16",
    ]  # fmt: skip
    forms = [f"http://{host}:{port}/" for host in hosts]
    forms += [
        f"http://u:p@127.0.0.1:{port}/", f"http://example.com@127.0.0.1:{port}/", f"http://127.0.0.1:{port}\\@example.com/",
        f"http://127.0.0.1:{port}#@example.com/", f"http://127.0.0.1:{port}?@example.com/", f"http:\\\\127.0.0.1:{port}/",
        f"http://[fe80::1%25lo]:{port}/", f"http://[::1%lo]:{port}/", f"http://127.0.0.1:{port}/\r\nHost: a",
        f"http://127.0.0.1:{port}\t/", f"\thttp://127.0.0.1:{port}/", f"ftp://127.0.0.1:{port}/", f"file://127.0.0.1:{port}/",
        f"gopher://127.0.0.1:{port}/_x", f"//127.0.0.1:{port}/", f"http:127.0.0.1:{port}", f"http+unix://127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}:80/", f"http://{'a' * 64}.com:{port}/", f"http://%31%32%37.0.0.1:{port}/",
    ]  # fmt: skip
    return forms


def try_all(urls: list[str]) -> list[str]:
    """The sentences of those that failed, as they must."""
    sentences = []
    for url in urls:
        try:
            fetch.fetch(url, timeout_s=2, resolve=LOCAL_NAMES)
        except FetchFailed as error:
            sentences.append(error.sentence)
    return sentences


@contextmanager
def both_loopbacks(monkeypatch):
    """Listeners on 127.0.0.1 and, where the machine has it, ::1; their port is one that public hosts may use."""
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(serve()))]
        with suppress(OSError):
            peers.append(stack.enter_context(Peer(serve(), host="::1", port=peers[0].port)))
        monkeypatch.setattr(addresses, "PUBLIC_PORTS", {peers[0].port})
        yield peers


def test_fetch_never_reaches_a_private_listener_by_any_form(monkeypatch):
    with both_loopbacks(monkeypatch) as peers:
        urls = hostile_urls(peers[0].port)
        assert len(urls) >= 59
        assert len(try_all(urls)) == len(urls)
    assert [peer.hits for peer in peers] == [0] * len(peers)


def test_fetch_would_reach_it_by_these_forms_without_the_address_check(monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda address: address.is_loopback or address.is_unspecified)
    with both_loopbacks(monkeypatch) as peers:
        try_all(hostile_urls(peers[0].port))
    assert sum(peer.hits for peer in peers) >= 20


@pytest.mark.parametrize("port", [22, 25, 6379, 8080])
def test_fetch_keeps_to_the_web_ports_of_public_hosts(port, monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    with pytest.raises(FetchFailed, match="could not be read"):
        fetch.fetch(f"http://127.0.0.1:{port}/", timeout_s=2)


def test_fetch_connects_to_the_address_it_checked_when_the_name_rebinds(public_loopback):
    answers = [[GOOD], [FORBIDDEN], [FORBIDDEN]]
    asked = []

    def rebind(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    with Peer(serve(b"good")) as good, Peer(serve(b"bad"), host=FORBIDDEN, port=good.port) as bad:
        url = f"http://rebind.example:{good.port}/"
        assert fetch.fetch(url, resolve=rebind) == b"good"
        assert asked == ["rebind.example"]
        with pytest.raises(FetchFailed, match="could not be read"):
            fetch.fetch(url, resolve=rebind)
    assert (good.hits, bad.hits) == (1, 0)
    assert f"Host: rebind.example:{good.port}" in good.requests[0]


@pytest.mark.parametrize("found", [[GOOD, FORBIDDEN], [FORBIDDEN, GOOD], [GOOD, "::1"], []])
def test_fetch_refuses_a_name_with_one_bad_address_among_good_ones(found, public_loopback):
    with Peer(serve()) as good, Peer(serve(), host=FORBIDDEN, port=good.port) as bad:
        with pytest.raises(FetchFailed, match="could not be read"):
            fetch.fetch(f"http://h:{good.port}/", resolve=names({"h": found}))
    assert (good.hits, bad.hits) == (0, 0)


def test_fetch_tries_the_next_address_when_one_is_closed(monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    monkeypatch.setattr(addresses, "PUBLIC_PORTS", range(65_536))
    with Peer(serve(b"second")) as peer:
        assert fetch.fetch(f"http://h:{peer.port}/", resolve=names({"h": [FORBIDDEN, GOOD]})) == b"second"


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_fetch_follows_a_redirect_to_an_allowed_place(status, public_loopback):
    with Peer(serve(b"there")) as there, Peer(redirect(there.url("/x"), status)) as here:
        assert fetch.fetch(here.url()) == b"there"
    assert there.requests[0].startswith("GET /x HTTP/1.1\r\n")


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_fetch_checks_every_hop_of_a_redirect(status, public_loopback):
    with Peer(serve(), host=FORBIDDEN) as inside, Peer(redirect(inside.url(), status)) as here:
        with pytest.raises(FetchFailed) as caught:
            fetch.fetch(here.url())
    assert caught.value.sentence == UNREACHABLE
    assert (here.hits, inside.hits) == (1, 0)


def test_fetch_would_follow_it_inside_without_the_check(public_loopback, monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    with Peer(serve(), host=FORBIDDEN) as inside, Peer(redirect(inside.url())) as here:
        fetch.fetch(here.url())
    assert inside.hits == 1


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/", "http://u:p@127.0.0.1/", "http://127.0.0.1\\@a/", "http://[", "data:,x",
     "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "http://a b/", "javascript:0"],
)  # fmt: skip
def test_fetch_refuses_a_redirect_to(location, public_loopback):
    with Peer(redirect(location)) as here, pytest.raises(FetchFailed):
        fetch.fetch(here.url(), timeout_s=2)
    assert here.hits == 1


def test_fetch_refuses_a_redirect_without_a_location(public_loopback):
    with Peer(serve(b"", "302 Found")) as here, pytest.raises(FetchFailed, match="answered 302 without a Location"):
        fetch.fetch(here.url())


def test_fetch_gives_up_after_three_redirects(public_loopback):
    with Peer(redirect("/again", body=gzip.compress(bytes(2**20)))) as here:
        with pytest.raises(FetchFailed, match="redirects more than 3 times"):
            fetch.fetch(here.url())
    assert here.hits == 4


def test_fetch_follows_three_redirects(public_loopback):
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(serve(b"end")))
        for _ in range(3):
            peer = stack.enter_context(Peer(redirect(peer.url())))
        assert fetch.fetch(peer.url()) == b"end"


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"])
def test_fetch_uses_no_proxy_of_the_environment(variable, monkeypatch):
    with Peer(serve(b"direct")) as peer, Peer(serve(b"proxied")) as proxy:
        monkeypatch.setenv(variable, proxy.url())
        assert fetch.fetch(peer.url(), allow=peer.allow) == b"direct"
    assert proxy.hits == 0


def endless_answers(peer: Peer, connection: socket.socket) -> None:
    peer.read_head(connection)
    while not peer.stopping.wait(0.02):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


SLOW = {
    "silence": hold,
    "a byte of the head now and then": send_for_ever(b"HTTP/1.1 200 OK\r\nX: ", b"x", every_s=0.05),
    "a header line now and then": send_for_ever(OK_HEAD, b"X: y\r\n", every_s=0.2),
    "a byte of the body now and then": send_for_ever(OK_HEAD + b"Content-Length: 9999\r\n\r\n", b"x", every_s=0.05),
    "a chunk now and then": send_for_ever(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", every_s=0.05),
    "a body without an end": send_for_ever(OK_HEAD + b"\r\n", b"x", every_s=0.05),
    "interim answers for ever": endless_answers,
}


@pytest.mark.parametrize("what", SLOW)
def test_fetch_ends_within_its_budget_when_the_peer_sends(what):
    with Peer(SLOW[what]) as peer:
        started = time.monotonic()
        with pytest.raises(FetchFailed) as caught:
            fetch.fetch(peer.url(), timeout_s=0.4, allow=peer.allow)
        assert time.monotonic() - started < 1.4
    assert caught.value.sentence == TOO_SLOW


def test_fetch_would_not_end_with_a_limit_on_each_read_only(monkeypatch):
    monkeypatch.setattr(fetch.Deadline, "left_s", lambda self: 0.4)
    monkeypatch.setattr(fetch, "may_connect", lambda *_: True)
    with Peer(SLOW["a byte of the body now and then"]) as peer:
        thread = threading.Thread(target=lambda: try_all([peer.url()]), daemon=True)
        thread.start()
        thread.join(2.0)
        assert thread.is_alive()
    thread.join(5.0)


def test_fetch_ends_within_its_budget_when_tls_stalls():
    with Peer(hold) as peer:
        started = time.monotonic()
        with pytest.raises(FetchFailed) as caught:
            fetch.fetch(peer.url().replace("http:", "https:"), timeout_s=0.4, allow=peer.allow)
        assert time.monotonic() - started < 1.4
    assert caught.value.sentence == UNREACHABLE


def test_fetch_ends_within_its_budget_when_redirects_are_slow(public_loopback):
    def slow_redirect(peer: Peer, connection: socket.socket) -> None:
        peer.stopping.wait(0.25)
        redirect("/again")(peer, connection)

    with Peer(slow_redirect) as peer:
        started = time.monotonic()
        with pytest.raises(FetchFailed) as caught:
            fetch.fetch(peer.url(), timeout_s=0.6)
        assert time.monotonic() - started < 1.6
    assert caught.value.sentence == TOO_SLOW


def test_fetch_leaves_a_slow_resolver_behind_in_bounded_number():
    release = threading.Event()

    def slow(host: str, port: int) -> list[str]:
        release.wait(10)
        return ["127.0.0.1"]

    before = threading.active_count()
    failures: list[float] = []

    def one() -> None:
        started = time.monotonic()
        with pytest.raises(FetchFailed):
            fetch.fetch("http://slow.example/", timeout_s=0.4, resolve=slow)
        failures.append(time.monotonic() - started)

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 20
    assert max(failures) < 1.4
    assert threading.active_count() - before <= fetch.MAX_LOOKUPS
    release.set()
    wait_until(lambda: threading.active_count() == before)
    with Peer(serve(b"after")) as peer:
        assert fetch.fetch(peer.url(), allow=peer.allow) == b"after"


def test_fetch_leaves_no_thread_and_no_descriptor_after_slow_peers_in_parallel():
    with Peer(SLOW["a byte of the body now and then"]) as peer:
        before = set(os.listdir("/proc/self/fd")), threading.active_count()

        def one() -> None:
            with pytest.raises(FetchFailed):
                fetch.fetch(peer.url(), timeout_s=0.5, allow=peer.allow)

        threads = [threading.Thread(target=one) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= len(before[0]))
    assert threading.active_count() <= before[1]


@pytest.mark.soak
@pytest.mark.parametrize("what", SLOW)
def test_fetch_ends_within_21_seconds_at_its_default_budget(what):
    with Peer(SLOW[what]) as peer:
        started = time.monotonic()
        with pytest.raises(FetchFailed):
            fetch.fetch(peer.url(), allow=peer.allow)
        assert 19 < time.monotonic() - started < 21


CAP = 2**20
TOO_LARGE = "the URL's body is larger than 1,048,576 bytes"
OVERSIZED = {
    "a declared 10 GiB": send_raw(OK_HEAD + b"Content-Length: 10737418240\r\n\r\n"),
    "a chunked body without an end": send_for_ever(
        OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(2**16) + b"\r\n"
    ),
    "a body without an end": send_for_ever(OK_HEAD + b"\r\n", bytes(2**16)),
    "chunks of one byte": send_for_ever(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10_000),
    "chunks with long extensions": send_for_ever(
        OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1;" + b"e" * 30_000 + b"\r\nx\r\n"
    ),
    "trailers without an end": send_for_ever(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 1000),
    "interim answers without an end": send_for_ever(b"", b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" * 1000),
    "one byte over": serve(bytes(CAP + 1)),
}


@pytest.mark.parametrize("what", OVERSIZED)
def test_fetch_stops_at_the_cap_when_the_peer_sends(what):
    with Peer(OVERSIZED[what]) as peer:
        before = peak_kib(reset=True)
        with pytest.raises(FetchFailed) as caught:
            fetch.fetch(peer.url(), max_bytes=CAP, allow=peer.allow)
        assert peak_kib() - before < 32 * 1024
    assert caught.value.sentence == TOO_LARGE


def test_fetch_takes_a_body_of_exactly_the_cap():
    with Peer(serve(bytes(CAP))) as peer:
        assert len(fetch.fetch(peer.url(), max_bytes=CAP, allow=peer.allow)) == CAP


def test_fetch_reads_a_chunked_body():
    with Peer(send_raw(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: u\r\n\r\n")) as peer:
        assert fetch.fetch(peer.url(), allow=peer.allow) == b"abcde"


def test_fetch_reads_only_what_was_declared():
    with Peer(send_raw(OK_HEAD + b"Content-Length: 3\r\n\r\nabcdef")) as peer:
        assert fetch.fetch(peer.url(), allow=peer.allow) == b"abc"


MALFORMED = {
    "less than it declared": OK_HEAD + b"Content-Length: 10\r\n\r\nabc",
    "a chunked body that ends early": OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
    "a chunk of no size": OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "nothing": b"",
    "a web page without a head": b"<html></html>",
    "a status that is no number": b"HTTP/1.1 abc OK\r\n\r\n",
    "an endless line": b"HTTP/1.1 200 " + b"a" * 100_000,
    "too many headers": OK_HEAD + b"X: y\r\n" * 1000 + b"\r\n",
    "noise": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_fetch_refuses_a_peer_that_sends(what):
    with Peer(send_raw(MALFORMED[what])) as peer, pytest.raises(FetchFailed) as caught:
        fetch.fetch(peer.url(), timeout_s=5, allow=peer.allow)
    assert caught.value.sentence == CUT_SHORT


def test_fetch_raises_nothing_but_its_own_error_for_mutated_answers():
    good = OK_HEAD + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\nA: b\r\n\r\n"
    draw = random.Random(0)
    outcomes = set()
    for _ in range(300):
        answer = bytearray(good)
        for _ in range(draw.randint(1, 6)):
            answer[draw.randrange(len(answer))] = draw.choice(b"\0\r\n :0159afHT\xff")
        with Peer(send_raw(bytes(answer))) as peer:
            try:
                outcomes.add(type(fetch.fetch(peer.url(), timeout_s=2, max_bytes=1000, allow=peer.allow)))
            except FetchFailed as error:
                outcomes.add(type(error))
    assert outcomes == {bytes, FetchFailed}


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Content-Encoding: br", "Content-Encoding: zstd",
                                    "Content-Encoding: gzip, identity", "Transfer-Encoding: gzip, chunked"])  # fmt: skip
def test_fetch_refuses_a_compressed_answer_unread(header):
    with Peer(serve(gzip.compress(bytes(2**20)), headers=header + "\r\n")) as peer:
        with pytest.raises(FetchFailed, match="compresses its answer"):
            fetch.fetch(peer.url(), allow=peer.allow)


@pytest.mark.parametrize("status", ["204 No Content", "206 Partial", "304 Same", "403 No", "404 No", "500 Oops"])
def test_fetch_names_a_status_that_is_not_200(status):
    with Peer(serve(b"", status)) as peer, pytest.raises(FetchFailed) as caught:
        fetch.fetch(peer.url(), allow=peer.allow)
    assert caught.value.sentence == f"the URL's server answered {status[:3]}"


def test_fetch_says_the_same_of_closed_blocked_and_unknown_hosts(public_loopback):
    with socket.create_server((GOOD, 0)) as server:
        closed = server.getsockname()[1]
    with Peer(serve(), host=FORBIDDEN) as blocked:
        urls = [f"http://{GOOD}:{closed}/", blocked.url(), "http://unknown.example/", "http://10.0.0.1/"]
        assert try_all(urls) == [UNREACHABLE] * 4
    assert blocked.hits == 0


def certificates(folder: Path, host: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate authority made on the spot, and a server's context with its certificate for `host`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certify(name, key, issuer, issuer_key, extension):
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(extension, critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def name_of(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    constraint = x509.BasicConstraints(ca=True, path_length=None)
    root = certify(name_of("root"), root_key, name_of("root"), root_key, constraint)
    leaf = certify(
        name_of(host), key, name_of("root"), root_key, x509.SubjectAlternativeName([x509.DNSName(host)])
    )
    pem = serialization.Encoding.PEM
    (folder / "root.pem").write_bytes(root.public_bytes(pem))
    (folder / "leaf.pem").write_bytes(leaf.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "leaf.pem", folder / "key.pem")
    return folder / "root.pem", context


def test_fetch_over_tls_proves_the_name_and_connects_to_the_checked_address(tmp_path, monkeypatch):
    root, context = certificates(tmp_path, "pictures.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(root))
    resolve = names({"pictures.example": [GOOD], "other.example": [GOOD]})
    with Peer(serve(b"secret"), tls=context) as peer:
        allow = (f"{GOOD}:{peer.port}",)
        assert fetch.fetch(f"https://pictures.example:{peer.port}/", allow=allow, resolve=resolve) == b"secret"
        with pytest.raises(FetchFailed, match="no valid certificate"):
            fetch.fetch(f"https://other.example:{peer.port}/", allow=allow, resolve=resolve)
    assert peer.names == ["pictures.example", "other.example"]
    assert len(peer.requests) == 1
    assert f"Host: pictures.example:{peer.port}" in peer.requests[0]


def test_fetch_over_tls_refuses_a_certificate_of_nobody(tmp_path):
    _, context = certificates(tmp_path, "pictures.example")
    with Peer(serve(b"secret"), tls=context) as peer, pytest.raises(FetchFailed, match="no valid certificate"):
        fetch.fetch(
            f"https://pictures.example:{peer.port}/", allow=peer.allow, resolve=names({"pictures.example": [GOOD]})
        )
    assert peer.requests == []


def test_fetch_over_tls_does_not_follow_down_to_http(tmp_path, monkeypatch):
    root, context = certificates(tmp_path, "pictures.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(root))
    with Peer(serve()) as plain, Peer(redirect(plain.url()), tls=context) as secure:
        with pytest.raises(FetchFailed, match="redirects from https to http"):
            fetch.fetch(
                f"https://pictures.example:{secure.port}/",
                allow=(GOOD,),
                resolve=names({"pictures.example": [GOOD]}),
            )
    assert plain.hits == 0


def test_check_endpoint_judges_without_connecting():
    with Peer(serve()) as peer:
        check_endpoint(peer.url(), allow=peer.allow)
        with pytest.raises(FetchFailed, match="could not be read"):
            check_endpoint(peer.url())
    assert peer.hits == 0


def test_check_endpoint_refuses_a_malformed_url():
    with pytest.raises(FetchFailed, match="must begin with http"):
        check_endpoint("s3://bucket")


def test_fetch_budget_is_shared_in_bytes():
    budget = FetchBudget(max_bytes=10)
    with Peer(serve(b"123456")) as peer:
        assert fetch.fetch(peer.url(), allow=peer.allow, budget=budget) == b"123456"
        with pytest.raises(FetchFailed, match="larger than 4 bytes"):
            fetch.fetch(peer.url(), allow=peer.allow, budget=budget)


def test_fetch_budget_is_shared_in_seconds():
    budget = FetchBudget(timeout_s=0.5)
    with Peer(hold) as peer:
        with pytest.raises(FetchFailed, match="took too long"):
            fetch.fetch(peer.url(), allow=peer.allow, budget=budget)
        with pytest.raises(FetchFailed, match="URLs together"):
            fetch.fetch(peer.url(), allow=peer.allow, budget=budget)
    assert peer.hits == 1


def test_fetch_budget_leaves_the_limits_of_each_url_in_place():
    with Peer(serve(b"123456")) as peer, pytest.raises(FetchFailed, match="larger than 5 bytes"):
        fetch.fetch(peer.url(), max_bytes=5, allow=peer.allow, budget=FetchBudget())


def peak_kib(*, reset: bool = False) -> int:
    """The most memory this process has held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def wait_until(holds, timeout_s: float = 5.0) -> None:
    ends = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends, "it never came to hold"
        time.sleep(0.01)
