"""Which addresses a stranger's URL may lead to: public unicast, and what the operator allowed. Nothing else.

The tables are written out because `ipaddress.is_global` of the Python releases we run on lets 6to4,
site-local addresses, 192.0.0.0/24 and Azure's wire server pass.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PUBLIC_PORTS = frozenset({80, 443})

# Source: IANA IPv4 Special-Purpose Address Registry, with the multicast block and the clouds' own addresses.
# Ranges that the registry calls globally reachable stay in: no picture is served from an anycast relay.
SPECIAL_IPV4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT; 100.100.100.200 is Alibaba's metadata",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "Azure's wire server, a public address that only the host answers",
    "169.254.0.0/16": "link-local; 169.254.169.254 and .170.2 are most clouds' metadata and credentials",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments; 192.0.0.192 is Oracle's metadata",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT relays",
    "192.88.99.0/24": "6to4 relays, withdrawn",
    "192.168.0.0/16": "private",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmarks",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved, and the broadcast address",
}

# Source: IANA IPv6 Special-Purpose Address Registry. Only 2000::/3 is unicast that anyone may be given.
# Loopback, mapped, NAT64, discard-only, SRv6, unique local (AWS fd00:ec2::254, Google fd20:ce::254),
# link-local, site-local and multicast addresses fall outside without a line here.
UNICAST_IPV6 = IPv6Network("2000::/3")
SPECIAL_IPV6 = {
    "2001::/23": "protocol assignments: Teredo, benchmarks, AMT, ORCHID, drones",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4: carries any IPv4 address",
    "2620:4f:8000::/48": "AS112",
    "3ffe::/16": "6bone, handed back",
    "3fff::/20": "documentation",
}

_SPECIAL: tuple[Network, ...] = tuple(ip_network(text) for text in (*SPECIAL_IPV4, *SPECIAL_IPV6))
# RFC 5214: an interface identifier that carries an IPv4 address under any prefix.
_ISATAP_IDENTIFIERS = frozenset({0x0000_5EFE, 0x0200_5EFE})

_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_WITH_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(:(?P<port>[0-9]{1,5}))?")


def is_public(address: Address) -> bool:
    """Whether the address is ordinary unicast of the public internet."""
    if isinstance(address, IPv6Address) and (
        address not in UNICAST_IPV6
        or address.scope_id is not None
        or int(address) >> 32 & 0xFFFF_FFFF in _ISATAP_IDENTIFIERS
    ):
        return False
    return not any(address in network for network in _SPECIAL)


@dataclass(frozen=True)
class Allowed:
    """One entry of the allow-list: a host by name or a network, on one port or on any."""

    name: str | None = None
    network: Network | None = None
    port: int | None = None

    def names(self, host: str, port: int) -> bool:
        return self.name == host and self.port in (None, port)

    def holds(self, address: Address, port: int) -> bool:
        return self.network is not None and address in self.network and self.port in (None, port)


def parse_allowed(entries: Iterable[str]) -> tuple[Allowed, ...]:
    """Read an allow-list: `minio.local`, `minio.local:9000`, `10.0.0.7:9000`, `[fd00::7]:9000`, `10.0.0.0/8`.

    Raises:
        ValueError: an entry is none of these.
    """
    return tuple(_parse_entry(entry.strip().lower()) for entry in entries)


def may_connect(host: str, port: int, addresses: Sequence[Address], allowed: Sequence[Allowed]) -> bool:
    """Whether a connection to `host` may be made, given every address that it resolves to.

    A host allowed by name may be anywhere. Otherwise each address must be public, on a public port, or inside
    an allowed network: one bad address among good ones refuses them all.
    """
    if any(entry.names(host, port) for entry in allowed):
        return bool(addresses)
    return bool(addresses) and all(
        (is_public(address) and port in PUBLIC_PORTS) or any(entry.holds(address, port) for entry in allowed)
        for address in addresses
    )


def _parse_entry(entry: str) -> Allowed:
    network = _as_network(entry)
    if network is not None:
        return Allowed(network=network)
    match = _WITH_PORT.fullmatch(entry)
    if match is None:
        raise ValueError(f"{entry!r} is not a host, host:port or network")
    host = match["host"]
    port = int(match["port"]) if match["port"] else None
    network = _as_network(host.strip("[]"))
    if network is not None and "/" not in host:
        return Allowed(network=network, port=port)
    if not _HOST.fullmatch(host) or port == 0 or (port or 0) > 65_535:
        raise ValueError(f"{entry!r} is not a host, host:port or network")
    return Allowed(name=host, port=port)


def _as_network(text: str) -> Network | None:
    try:
        return ip_network(text)
    except ValueError:
        return None
