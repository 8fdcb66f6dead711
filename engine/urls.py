"""A stranger's URL, taken apart once: check, connection and redirect all use the parts, never the text."""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import quote, urljoin, urlsplit

from schemas.errors import FetchFailed

MAX_URL_CHARACTERS = 8192  # presigned URLs with a session token pass 2000

_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_AUTHORITY = re.compile(r"(\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:]+))(:(?P<port>[0-9]{0,5}))?")
_READ_TWO_WAYS = frozenset("\u00df\u1e9e\u03c2")  # sharp s and final sigma: another host by IDNA 2003 than by IDNA 2008
_KEPT = "/%:@!$&'()*+,;=~"  # quote() keeps letters, digits and -._~ by itself


@dataclass(frozen=True)
class Target:
    """An http(s) URL in parts."""

    scheme: str
    host: str
    """Lower-case ASCII without brackets or a trailing dot."""
    port: int
    path: str
    """With the query, without the fragment; ASCII, begins with a slash."""

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    def follow(self, location: str) -> "Target":
        """Where a redirect from here leads.

        Raises:
            FetchFailed: `location` is malformed, or leaves https for http.
        """
        refuse_unprintable(location)  # before urljoin, which drops some of what it does not like
        try:
            following = urljoin(self.url, location)
        except ValueError as error:
            raise FetchFailed("the URL redirects to a malformed one") from error
        target = parse_url(following)
        if self.scheme == "https" and target.scheme == "http":
            raise FetchFailed("the URL redirects from https to http")
        return target


def parse_url(text: str) -> Target:
    """Take an http(s) URL apart, refusing every form that two parsers could read differently.

    Raises:
        FetchFailed: it is not such a URL.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise FetchFailed(f"the URL is longer than {MAX_URL_CHARACTERS} characters")
    refuse_unprintable(text)
    try:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https"):
            raise FetchFailed("the URL must begin with http:// or https://")
        if "@" in parts.netloc:
            raise FetchFailed("the URL must not hold a user name or password")
        host, port = _split_authority(parts.netloc)
    except ValueError as error:  # UnicodeError of the idna codec included
        raise FetchFailed("the URL's host or port is malformed") from error
    path = quote(parts.path or "/", safe=_KEPT)
    query = quote(parts.query, safe=_KEPT + "?[]|")
    return Target(
        scheme=parts.scheme,
        host=host,
        port=_default_port(parts.scheme) if port is None else port,
        path=f"{path}?{query}" if query else path,
    )


def refuse_unprintable(text: str) -> None:
    """Raise FetchFailed on what parsers strip or differ on: backslash, blank, control, lone surrogate."""
    if "\\" in text or " " in text or not text.isprintable():
        raise FetchFailed("the URL holds a backslash, a space or a control character; percent-encode it")


def _split_authority(authority: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError("not a host with an optional port")
    port = int(match["port"]) if match["port"] else None
    if port is not None and port > 65_535:
        raise ValueError("not a port")
    return str(IPv6Address(match["ipv6"])) if match["ipv6"] else _ascii_host(match["name"]), port


def _ascii_host(name: str) -> str:
    if len(name) > 253:
        raise ValueError("longer than a name can be")
    if not _READ_TWO_WAYS.isdisjoint(name):
        raise ValueError("not the same host to everyone")
    host = name.encode("idna").decode("ascii").lower()
    if not _HOST.fullmatch(host):
        raise ValueError("not a host name")
    return host.removesuffix(".")


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80
