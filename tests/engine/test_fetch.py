"""Fetching against real loopback peers. `public_loopback` makes 127.0.0.1 public, so that only the guard under test
stands between a URL and a listener; every guard is also shown to matter by a run without it."""

import errno
import gzip
import socket
import ssl
import sys
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from urllib.request import build_opener

import pytest

from engine import addresses, connection, fetch
from engine.fetch import UNREACHABLE, check_endpoint
from schemas.errors import FetchFailed
from tests.figures import Figure
from tests.servers.http_peer import Peer, redirect, send_raw, serve

pytest_plugins = ["tests.figures"]

GOOD, FORBIDDEN = "127.0.0.1", "127.0.0.2"


def names(table: dict[str, list[str]]):
    """A resolver of these names and of every spelling of an address; it never asks a server."""

    def resolve(host: str, port: int) -> list[str]:
        if host in table:
            return table[host]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(sockaddr[0]) for *_, sockaddr in found]

    return resolve


LOCAL_NAMES = names(
    {"localhost": ["127.0.0.1", "::1"], "localtest.me": ["127.0.0.1"], "mixed": ["127.0.0.1", "1.1.1.1"]}
)


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
        "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54", "10.0.0.1", "169.254.169.254", "192.168.0.1",
        "168.63.129.16",
    ]  # fmt: skip
    forms = [f"http://{host}:{port}/" for host in hosts]
    forms += [
        f"http://u:p@127.0.0.1:{port}/", f"http://example.com@127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}\\@example.com/", f"http://127.0.0.1:{port}#@example.com/",
        f"http://127.0.0.1:{port}?@example.com/", f"http:\\\\127.0.0.1:{port}/",
        f"http://[fe80::1%25lo]:{port}/", f"http://[::1%lo]:{port}/", f"http://127.0.0.1:{port}/\r\nHost: a",
        f"http://127.0.0.1:{port}\t/", f"\thttp://127.0.0.1:{port}/", f"ftp://127.0.0.1:{port}/",
        f"file://127.0.0.1:{port}/", f"gopher://127.0.0.1:{port}/_x", f"//127.0.0.1:{port}/", f"http:127.0.0.1:{port}",
        f"http+unix://127.0.0.1:{port}/", f"http://127.0.0.1:{port}:80/", f"http://{'a' * 64}.com:{port}/", f"http://%31%32%37.0.0.1:{port}/",
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


def test_fetch_never_reaches_a_private_listener_by_any_form(monkeypatch, figure: Figure):
    with both_loopbacks(monkeypatch) as peers:
        urls = hostile_urls(peers[0].port)
        assert len(urls) >= 59
        assert len(try_all(urls)) == len(urls)
    hits = sum(peer.hits for peer in peers)
    figure("connections by hostile forms of a URL", f"{hits} by {len(urls)} forms, at {len(peers)} listeners")
    assert [peer.hits for peer in peers] == [0] * len(peers)


def test_fetch_would_reach_it_by_these_forms_without_the_address_check(monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda address: address.is_loopback or address.is_unspecified)
    with both_loopbacks(monkeypatch) as peers:
        try_all(hostile_urls(peers[0].port))
    assert sum(peer.hits for peer in peers) >= 20


@pytest.mark.parametrize("port", [22, 25, 6379, 8080])
def test_fetch_keeps_to_the_web_ports_of_public_hosts(port, monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
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


def test_fetch_would_go_where_the_name_leads_now_without_the_pinned_address(public_loopback, monkeypatch):
    answers = iter([GOOD, FORBIDDEN])

    def connect_by_name(target, _addresses, _deadline):
        return socket.create_connection((next(answers), target.port))

    monkeypatch.setattr(fetch, "connect", connect_by_name)
    with Peer(serve(b"good")) as good, Peer(serve(b"bad"), host=FORBIDDEN, port=good.port) as bad:
        url = f"http://rebind.example:{good.port}/"
        assert fetch.fetch(url, resolve=lambda _host, _port: [next(answers)]) == b"bad"
    assert (good.hits, bad.hits) == (0, 1)


@pytest.mark.parametrize("found", [[GOOD, FORBIDDEN], [FORBIDDEN, GOOD], [GOOD, "::1"], []])
def test_fetch_refuses_a_name_with_one_bad_address_among_good_ones(found, public_loopback):
    with (
        Peer(serve()) as good,
        Peer(serve(), host=FORBIDDEN, port=good.port) as bad,
        pytest.raises(FetchFailed, match="could not be read"),
    ):
        fetch.fetch(f"http://h:{good.port}/", resolve=names({"h": found}))
    assert (good.hits, bad.hits) == (0, 0)


def test_fetch_tries_the_next_address_when_one_is_closed(monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
    monkeypatch.setattr(addresses, "PUBLIC_PORTS", range(65_536))
    with Peer(serve(b"second")) as peer:
        assert fetch.fetch(f"http://h:{peer.port}/", resolve=names({"h": [FORBIDDEN, GOOD]})) == b"second"


def test_fetch_tries_the_next_address_when_the_system_has_no_such_family(monkeypatch):
    real = socket.socket

    def without_ipv6(family=socket.AF_INET, *rest, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest, **options)

    monkeypatch.setattr(addresses, "is_public", lambda _: True)
    monkeypatch.setattr(addresses, "PUBLIC_PORTS", range(65_536))
    with Peer(serve(b"second")) as peer:
        monkeypatch.setattr(socket, "socket", without_ipv6)
        assert fetch.fetch(f"http://h:{peer.port}/", resolve=names({"h": ["::1", GOOD]})) == b"second"


@pytest.mark.parametrize(("closed", "hits"), [(connection.MAX_TRIES - 1, 1), (connection.MAX_TRIES, 0)])
def test_fetch_knocks_at_no_more_addresses_of_a_host_than_the_limit(closed, hits, monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
    monkeypatch.setattr(addresses, "PUBLIC_PORTS", range(65_536))
    found = [*(f"127.0.1.{number}" for number in range(closed)), GOOD]
    with Peer(serve()) as peer, suppress(FetchFailed):
        fetch.fetch(f"http://h:{peer.port}/", resolve=names({"h": found}))
    assert peer.hits == hits


def test_fetch_gives_the_place_of_a_lookup_back_when_no_thread_can_be_started(monkeypatch):
    def no_thread(_self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(connection.threading.Thread, "start", no_thread)
        for _ in range(connection.MAX_LOOKUPS):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                fetch.fetch("http://127.0.0.1/", timeout_s=2)
    with Peer(serve(b"after")) as peer:
        assert fetch.fetch(peer.url(), timeout_s=5, allow=peer.allow) == b"after"


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_fetch_follows_a_redirect_to_an_allowed_place(status, public_loopback):
    with Peer(serve(b"there")) as there, Peer(redirect(there.url("/x"), status)) as here:
        assert fetch.fetch(here.url()) == b"there"
    assert there.requests[0].startswith("GET /x HTTP/1.1\r\n")


def test_fetch_follows_a_redirect_that_is_not_ascii_as_utf8(public_loopback):
    with Peer(serve(b"there")) as there, Peer(redirect(there.url("/f\u00fc\u732b"))) as here:
        assert fetch.fetch(here.url()) == b"there"
    assert there.requests[0].startswith("GET /f%C3%BC%E7%8C%AB HTTP/1.1\r\n")


def test_fetch_refuses_a_redirect_that_is_not_utf8(public_loopback):
    with Peer(send_raw(b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\n\r\n")) as here, pytest.raises(FetchFailed) as caught:
        fetch.fetch(here.url())
    assert caught.value.sentence == "the URL redirects to a malformed one"


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_fetch_checks_every_hop_of_a_redirect(status, public_loopback):
    with (
        Peer(serve(), host=FORBIDDEN) as inside,
        Peer(redirect(inside.url(), status)) as here,
        pytest.raises(FetchFailed) as caught,
    ):
        fetch.fetch(here.url())
    assert caught.value.sentence == UNREACHABLE
    assert (here.hits, inside.hits) == (1, 0)


def test_fetch_would_follow_it_inside_without_the_check(public_loopback, monkeypatch):
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
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
    loop = redirect("/again", body=gzip.compress(bytes(2**20)))
    with Peer(loop) as here, pytest.raises(FetchFailed, match="redirects more than 3 times"):
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


def test_another_client_would_use_the_proxy_of_the_environment(monkeypatch):
    with Peer(serve(b"direct")) as peer, Peer(serve(b"proxied")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url())
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        # An opener of its own: urlopen keeps the first one, proxy and all, for whoever comes after.
        assert build_opener().open(peer.url(), timeout=5).read() == b"proxied"


def told_of_closed_blocked_and_unknown_hosts() -> list[str]:
    """The sentences for a closed port, a forbidden listener, a name that nobody has, and a private address."""
    with socket.create_server((GOOD, 0)) as server:
        closed = server.getsockname()[1]
    with Peer(serve(), host=FORBIDDEN) as blocked:
        urls = [f"http://{GOOD}:{closed}/", blocked.url(), "http://unknown.example/", "http://10.0.0.1/"]
        sentences = try_all(urls)
    assert blocked.hits == 0
    return sentences


def test_fetch_says_the_same_of_closed_blocked_and_unknown_hosts(public_loopback):
    assert told_of_closed_blocked_and_unknown_hosts() == [UNREACHABLE] * 4


def test_fetch_would_tell_closed_blocked_and_unknown_hosts_apart_without_the_one_sentence(public_loopback, monkeypatch):
    def with_its_reason(sentence):
        reason = sys.exc_info()[1]
        return FetchFailed(sentence if reason is None else f"{sentence} ({reason!r})")

    monkeypatch.setattr(fetch, "FetchFailed", with_its_reason)
    closed, blocked, unknown, private = told_of_closed_blocked_and_unknown_hosts()
    assert len({closed, blocked, unknown}) == 3
    assert private == blocked


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
    leaf = certify(name_of(host), key, name_of("root"), root_key, x509.SubjectAlternativeName([x509.DNSName(host)]))
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
    with (
        Peer(serve()) as plain,
        Peer(redirect(plain.url()), tls=context) as secure,
        pytest.raises(FetchFailed, match="redirects from https to http"),
    ):
        fetch.fetch(
            f"https://pictures.example:{secure.port}/", allow=(GOOD,), resolve=names({"pictures.example": [GOOD]})
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
