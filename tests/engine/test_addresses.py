import random
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest

from engine import addresses
from engine.addresses import Allowed, is_public, may_connect, parse_allowed

# Written out apart from the product's table. Source: IANA IPv4 and IPv6 Special-Purpose Address Registries, every row,
# also those inside another row; then multicast and what earlier RFCs gave out and took back.
FORBIDDEN = [
    "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32", "192.0.0.170/32", "192.0.0.171/32",
    "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16",
    "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4", "255.255.255.255/32",
    "224.0.0.0/4",
    "::1/128", "::/128", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23",
    "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48", "2001:3::/32", "2001:4:112::/48",
    "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10",
    "::/96", "3ffe::/16", "fec0::/10", "ff00::/8",
]  # fmt: skip

METADATA = {
    "169.254.169.254": "AWS, Google, Azure, Oracle, DigitalOcean, Hetzner, Vultr, Linode, IBM, OpenStack",
    "169.254.170.2": "AWS ECS credentials",
    "169.254.170.23": "AWS EKS credentials",
    "169.254.169.253": "AWS resolver",
    "169.254.169.123": "AWS time",
    "169.254.0.23": "Tencent",
    "169.254.42.42": "Scaleway",
    "168.63.129.16": "Azure wire server",
    "100.100.100.200": "Alibaba",
    "192.0.0.192": "Oracle, classic",
    "fd00:ec2::254": "AWS",
    "fd00:ec2::253": "AWS resolver",
    "fd00:ec2::23": "AWS EKS credentials",
    "fd00:c1::a9fe:a9fe": "Oracle",
    "fd00:a9fe:a9fe::1": "Linode",
    "fd00:42::42": "Scaleway",
    "fd20:ce::254": "Google",
    "fe80::a9fe:a9fe": "link-local form of 169.254.169.254",
    "10.96.0.1": "Kubernetes API by default",
    "100.65.0.1": "pods of the same platform",
    "::ffff:169.254.169.254": "mapped",
    "::ffff:168.63.129.16": "mapped",
    "::ffff:100.100.100.200": "mapped",
    "::ffff:0:a9fe:a9fe": "translated (SIIT)",
    "::a9fe:a9fe": "compatible",
    "2002:a9fe:a9fe::": "6to4",
    "2002:a83f:8110::1": "6to4 of Azure's",
    "2002:6464:64c8::1": "6to4 of Alibaba's",
    "64:ff9b::a9fe:a9fe": "NAT64",
    "64:ff9b:1:a9fe:a9:fe00::": "NAT64 with a local prefix",
    "2001:0:5ef5:79fb:0:59b:5601:5601": "Teredo",
    "2606:4700::5efe:a9fe:a9fe": "ISATAP under a public prefix",
    "2606:4700::200:5efe:a9fe:a9fe": "ISATAP under a public prefix, of a global IPv4 address",
}

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "128.0.0.1", "168.63.129.15",
    "168.63.129.17", "169.253.255.255", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "193.0.0.1",
    "198.17.255.255", "198.20.0.0", "223.255.255.255", "2001:200::1", "2001:4860:4860::8888", "2003::1",
    "2606:4700:4700::1111", "2620:4f:8001::1", "2a00:1450:4001::8a",
]  # fmt: skip


@pytest.mark.parametrize("text", FORBIDDEN)
def test_is_public_refuses_every_address_of_a_special_range(text):
    network = ip_network(text)
    draw = random.Random(text)
    picked = [draw.randrange(network.num_addresses) for _ in range(200)]
    found = {network[index] for index in (0, network.num_addresses - 1, *picked)}
    assert [address for address in found if is_public(address)] == []


@pytest.mark.parametrize("text", METADATA)
def test_is_public_refuses_what_clouds_keep_for_themselves(text):
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_is_public_accepts_the_neighbours_of_special_ranges(text):
    assert is_public(ip_address(text))


def test_is_public_refuses_an_address_with_a_zone():
    assert not is_public(ip_address("2606:4700::1111%eth0"))


@pytest.mark.parametrize("text", [*addresses.SPECIAL_IPV4, *addresses.SPECIAL_IPV6])
def test_is_public_needs_each_row_of_the_table(text, monkeypatch):
    without = tuple(network for network in addresses._SPECIAL if network != ip_network(text))
    monkeypatch.setattr(addresses, "_SPECIAL", without)
    assert is_public(ip_network(text)[0])


ALLOWED = [
    ("minio.local", Allowed(name="minio.local")),
    ("MinIO.local:9000", Allowed(name="minio.local", port=9000)),
    ("10.0.0.0/8", Allowed(network=IPv4Network("10.0.0.0/8"))),
    ("10.0.0.7", Allowed(network=IPv4Network("10.0.0.7/32"))),
    ("10.0.0.7:9000", Allowed(network=IPv4Network("10.0.0.7/32"), port=9000)),
    ("fd00::/8", Allowed(network=IPv6Network("fd00::/8"))),
    ("::1", Allowed(network=IPv6Network("::1/128"))),
    ("[::1]:9000", Allowed(network=IPv6Network("::1/128"), port=9000)),
]


@pytest.mark.parametrize(("text", "entry"), ALLOWED)
def test_parse_allowed_reads(text, entry):
    assert parse_allowed([f" {text} "]) == (entry,)


@pytest.mark.parametrize(
    "text",
    ["", ":80", "a b", "10.0.0.1/8", "host:0", "host:65536", "host:http", "http://host", "*", "*.host", "h/", "[::1",
     "10.0.0.0/8:80", "a..b", "ü.de"],
)  # fmt: skip
def test_parse_allowed_refuses(text):
    with pytest.raises(ValueError, match="is not a host, host:port or network"):
        parse_allowed([text])


@pytest.mark.parametrize(
    ("host", "port", "found", "allow", "expected"),
    [
        ("example.com", 443, ["1.1.1.1", "2606:4700::1"], [], True),
        ("example.com", 80, ["1.1.1.1"], [], True),
        ("example.com", 8080, ["1.1.1.1"], [], False),
        ("example.com", 443, [], [], False),
        ("example.com", 443, ["1.1.1.1", "10.0.0.1"], [], False),
        ("example.com", 443, ["10.0.0.1"], ["example.com"], True),
        ("example.com", 9000, ["10.0.0.1"], ["example.com"], True),
        ("example.com", 9000, ["10.0.0.1"], ["example.com:9000"], True),
        ("example.com", 9001, ["10.0.0.1"], ["example.com:9000"], False),
        ("sub.example.com", 443, ["10.0.0.1"], ["example.com"], False),
        ("example.com", 443, [], ["example.com"], False),
        ("example.com", 9000, ["10.0.0.1"], ["10.0.0.0/24"], True),
        ("example.com", 9000, ["10.0.1.1"], ["10.0.0.0/24"], False),
        ("example.com", 9000, ["10.0.0.1", "127.0.0.1"], ["10.0.0.0/24"], False),
        ("example.com", 443, ["10.0.0.1", "1.1.1.1"], ["10.0.0.0/24"], True),
        ("10.0.0.1", 9000, ["10.0.0.1"], ["10.0.0.1:9000"], True),
        ("10.0.0.1", 9001, ["10.0.0.1"], ["10.0.0.1:9000"], False),
        ("a", 80, ["::ffff:10.0.0.1"], ["10.0.0.0/24"], False),
    ],
)
def test_may_connect_wants_every_address_public_or_allowed(host, port, found, allow, expected):
    assert may_connect(host, port, [ip_address(text) for text in found], parse_allowed(allow)) is expected
