"""A stranger's S3 endpoint that moves, drips, floods or lies: refused or ended, and the worker goes on."""

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from engine import guest_wire
from engine.bucket import REQUEST, Bucket
from engine.s3 import Objects, Patience, connect
from engine.s3_errors import StoreRefused, StoreUnwell
from engine.upload import upload
from tests.servers.buckets import bucket_at, contents, hurried

pytest_plugins = ["tests.servers.s3_fixtures"]

KEY = "worker/0123456789abcdef0123456789abcdef/video.mp4"
OK = b"HTTP/1.1 200 OK\r\n"


def guest_of(bucket: Bucket, *allow: str) -> Objects:
    return connect(replace(bucket, labels=REQUEST, guest_allow=allow or (bucket.endpoint_url.split("//")[1],)))


ROOM_S = 15.0
"""How late a busy machine may be. Without the guard under test these servers would keep the worker for 30 s or more."""

over = threading.Event()
"""Set when a test is done with its server, so that no server sleeps on."""


@contextmanager
def listener(talk: Callable[[socket.socket], None]) -> Iterator[tuple[Bucket, list[float]]]:
    """A server that reads a request's head and then does what it likes; yields the seconds each connection lasted."""
    over.clear()
    lasted: list[float] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                started = time.monotonic()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    talk(connection)
                lasted.append(time.monotonic() - started)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield bucket_at(f"http://127.0.0.1:{server.getsockname()[1]}"), lasted
    finally:
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(timeout=5)


def drip(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        connection.sendall(bytes([byte]))
        over.wait(0.05)


def read(objects: Objects) -> bytes:
    return objects.read("a", 10**9, Patience.lasting(0.0))


@pytest.mark.parametrize("size", [100_000, 17 * 2**20], ids=["single", "parts"])
def test_guest_uploads_to_a_real_store(swift, bucket, make_file, size) -> None:
    file = make_file(size)
    assert upload(guest_of(bucket), file, KEY, Patience.lasting(60.0, hurried)) == KEY
    assert contents(swift, bucket) == {KEY: file.path.read_bytes()}
    assert guest_of(bucket).sha256_of(KEY, Patience.lasting(10.0)) == file.sha256


def test_guest_survives_faults_on_the_way(swift, proxy, bucket, make_file) -> None:
    file = make_file(100_000)
    for fault in ("503", "reset", "flip", "ok-error", "lost"):
        proxy.inject(fault, 2, matching="PUT")
    assert upload(guest_of(bucket), file, KEY, Patience.lasting(60.0, hurried)) == KEY
    assert proxy.pending_faults == 0
    assert contents(swift, bucket) == {KEY: file.path.read_bytes()}


def test_guest_is_checked_at_every_request_and_not_only_at_the_first(swift, proxy, bucket, monkeypatch) -> None:
    """The name that was public when the job came now leads inside."""
    moved = replace(bucket, endpoint_url=f"http://store.example:{proxy.port}")
    monkeypatch.setattr(guest_wire, "system_resolver", lambda _host, _port: ["127.0.0.1"])
    with pytest.raises(StoreRefused, match=r"the store is not allowed; check s3Config\.endpointUrl"):
        read(guest_of(moved, "10.0.0.0/8"))
    assert proxy.requests == []
    with pytest.raises(StoreRefused):  # the control: allowed by name, it is reached and asked
        read(guest_of(moved, f"store.example:{proxy.port}"))
    assert len(proxy.requests) == 1


def test_guest_with_one_address_inside_is_refused(proxy, bucket, monkeypatch) -> None:
    moved = replace(bucket, endpoint_url="http://store.example:80")
    monkeypatch.setattr(guest_wire, "system_resolver", lambda _host, _port: ["1.1.1.1", "169.254.169.254"])
    with pytest.raises(StoreRefused, match="the store is not allowed"):
        read(guest_of(moved, "10.0.0.0/8"))


def test_guest_looks_a_host_up_once_a_request(bucket, monkeypatch) -> None:
    asked = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    monkeypatch.setattr(guest_wire, "system_resolver", resolve)
    with suppress(StoreRefused):
        read(guest_of(bucket))
    assert asked == ["127.0.0.1"]


def slow_resolver(_host: str, _port: int) -> list[str]:
    over.wait(30)
    return ["127.0.0.1"]


def test_guest_whose_name_takes_for_ever_is_left_when_the_connection_has_had_its_time(monkeypatch) -> None:
    monkeypatch.setattr(guest_wire, "REACH_S", 0.3)
    monkeypatch.setattr(guest_wire, "system_resolver", slow_resolver)
    with listener(lambda _: None) as (slow, lasted):
        started = time.monotonic()
        with pytest.raises(StoreUnwell):
            read(guest_of(slow))
        assert time.monotonic() - started < ROOM_S
        assert lasted == []


def test_guest_would_wait_for_the_resolver_without_the_guarded_lookup(monkeypatch) -> None:
    """The control: the system's resolver has no limit but its own."""

    def ask() -> None:
        with suppress(StoreUnwell):
            read(guest_of(slow))

    monkeypatch.setattr(guest_wire, "REACH_S", 0.3)
    monkeypatch.setattr(guest_wire, "look_up", lambda target, _, __: [ip_address(slow_resolver(target.host, 0)[0])])
    with listener(lambda _: None) as (slow, _):
        waiting = threading.Thread(target=ask, daemon=True)
        waiting.start()
        waiting.join(2.0)
        assert waiting.is_alive()
    waiting.join(5.0)


def test_guest_whose_name_does_not_resolve_is_asked_again_later(bucket, monkeypatch) -> None:
    def resolve(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(guest_wire, "system_resolver", resolve)
    with pytest.raises(StoreUnwell, match="the store did not answer"):
        read(guest_of(bucket))


def test_guest_whose_tls_stalls_is_left_when_the_connection_has_had_its_time(monkeypatch) -> None:
    monkeypatch.setattr(guest_wire, "REACH_S", 0.3)
    with listener(lambda _: over.wait(30)) as (slow, _):
        started = time.monotonic()
        with pytest.raises(StoreUnwell):
            read(guest_of(replace(slow, endpoint_url=slow.endpoint_url.replace("http:", "https:"))))
        assert time.monotonic() - started < ROOM_S


def test_guest_is_reached_at_the_next_address_when_one_is_closed(proxy, bucket, monkeypatch) -> None:
    moved = replace(bucket, endpoint_url=f"http://store.example:{proxy.port}")
    monkeypatch.setattr(guest_wire, "system_resolver", lambda _host, _port: ["127.0.0.2", "127.0.0.1"])
    with pytest.raises(StoreRefused):  # it was asked, and has no such key
        read(guest_of(moved, f"store.example:{proxy.port}"))
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    "talk",
    [
        lambda connection: drip(connection, OK + b"X: y\r\n" * 1000),
        lambda connection: drip(connection, OK + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000),
        lambda _: over.wait(30),
    ],
    ids=["head", "body", "silence"],
)
def test_guest_that_drips_is_left_when_the_request_has_had_its_time(talk, monkeypatch) -> None:
    monkeypatch.setattr(guest_wire, "REQUEST_S", 0.3)
    with listener(talk) as (slow, _):
        started = time.monotonic()
        with pytest.raises(StoreUnwell):
            read(guest_of(slow))
        assert time.monotonic() - started < ROOM_S


def test_guest_that_never_reads_is_left_when_the_request_has_had_its_time(monkeypatch) -> None:
    monkeypatch.setattr(guest_wire, "REQUEST_S", 0.3)
    with listener(lambda _: over.wait(30)) as (slow, _):
        started = time.monotonic()
        with pytest.raises(StoreUnwell):
            guest_of(slow).create("a", b"x" * 16 * 2**20, "video/mp4", "0", Patience.lasting(0.0))
        assert time.monotonic() - started < ROOM_S


@pytest.mark.parametrize(
    "head",
    [OK, OK + b"X: ", OK + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", OK + b"Content-Length: 134217728\r\n\r\n"],
    ids=["no-end-of-head", "header-line", "chunked", "length"],
)
def test_guest_that_floods_is_cut_off(head) -> None:
    sent = []

    def talk(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(2000):  # 128 MiB
            connection.sendall(b"x" * 65536)
            sent.append(65536)

    with listener(talk) as (endless, lasted):
        with pytest.raises(StoreUnwell):
            guest_of(endless).create("a", b"x", "video/mp4", "0", Patience.lasting(0.0))
        while not lasted:
            time.sleep(0.01)
    assert sum(sent) < 16 * 2**20


@pytest.mark.parametrize(
    "ask",
    [read, lambda objects: objects.unfinished_uploads("a", Patience.lasting(0.0))],
    ids=["in a stream", "in an answer"],
)
def test_guest_that_names_a_chunk_of_negative_size_is_unwell(ask) -> None:
    lying = OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n0\r\n\r\n"
    with listener(lambda connection: connection.sendall(lying)) as (store, _), pytest.raises(StoreUnwell):
        ask(guest_of(store))


def self_signed(folder: Path) -> ssl.SSLContext:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    certificate = builder.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


@pytest.mark.parametrize("is_guest", [True, False])
def test_a_certificate_that_nobody_signed_is_refused_at_once(tmp_path, is_guest) -> None:
    context = self_signed(tmp_path)
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    bucket = bucket_at(f"https://127.0.0.1:{server.getsockname()[1]}")
    objects = guest_of(bucket) if is_guest else connect(bucket)
    try:
        started = time.monotonic()
        with pytest.raises(StoreRefused, match="the store's certificate is not valid"):
            objects.read("a", 100, Patience.lasting(60.0))
        assert time.monotonic() - started < ROOM_S
    finally:
        server.shutdown(socket.SHUT_RDWR)  # a close alone would leave the thread waiting in accept()
        server.close()
        thread.join(timeout=5)
