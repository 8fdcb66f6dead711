"""Which bucket, where, and with whose keys: read from the environment or from a request's `s3Config`."""

import re
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from engine.addresses import parse_allowed
from engine.fetch import check_endpoint
from engine.settings import Secret, Settings
from engine.urls import MAX_URL_CHARACTERS, parse_url
from schemas.errors import FetchFailed, InvalidInput, Problem, SettingsError
from schemas.words import nearest, printable


@dataclass(frozen=True)
class Labels:
    """What the parts of a bucket are called where they came from, for sentences that name what is wrong."""

    endpoint: str
    name: str
    region: str
    access_key: str
    secret_key: str


ENVIRONMENT = Labels(
    "BUCKET_ENDPOINT_URL", "BUCKET_NAME", "BUCKET_REGION", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"
)
REQUEST = Labels(
    "s3Config.endpointUrl",
    "s3Config.bucketName",
    "s3Config.endpointUrl",
    "s3Config.accessId",
    "s3Config.accessSecret",
)
REQUEST_FIELDS = ("accessId", "accessSecret", "bucketName", "endpointUrl")
"""Source: RunPod documentation, "Send API requests", S3-compatible storage integration."""
MAX_STRANGE = 20  # unknown fields that are named one by one; the rest is counted


@dataclass(frozen=True)
class Bucket:
    """Everything a client needs. Compares and hashes by value, keys included; its repr shows no key."""

    endpoint_url: str
    """Scheme, host and port, never the bucket."""
    name: str
    region: str
    addressing: Literal["virtual", "path"]
    access_key_id: Secret
    secret_access_key: Secret
    labels: Labels = ENVIRONMENT
    guest_allow: tuple[str, ...] | None = None
    """For a request's bucket, the private hosts it may be on; None for the operator's, which may be anywhere."""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0

    @property
    def host_url(self) -> str:
        """Scheme, host and port that the client connects to."""
        scheme, host = self.endpoint_url.split("://")
        return f"{scheme}://{self.name}.{host}" if self.addressing == "virtual" else self.endpoint_url


@dataclass(frozen=True)
class _Vendor:
    """Hosts of one vendor: `host` may have the groups `bucket` and `region`."""

    host: re.Pattern[str]
    region: str = "us-east-1"
    addressing: Literal["virtual", "path"] = "path"


def _hosts(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:(?P<bucket>[a-z0-9][a-z0-9.-]*)\.)?{pattern}")


VENDORS = (
    # A bucket created in an AWS region after 2019 may only be reachable as a virtual host.
    _Vendor(
        _hosts(r"s3[.-](?:dualstack\.)?(?P<region>[a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com(?:\.cn)?"),
        "",
        "virtual",
    ),
    _Vendor(_hosts(r"s3\.amazonaws\.com"), addressing="virtual"),
    _Vendor(_hosts(r"[0-9a-f]{32}\.(?:[a-z]+\.)?r2\.cloudflarestorage\.com"), "auto"),
    _Vendor(_hosts(r"s3\.(?P<region>[a-z0-9-]+)\.backblazeb2\.com")),
    _Vendor(_hosts(r"(?P<region>[a-z]{3}\d)\.digitaloceanspaces\.com")),
    _Vendor(_hosts(r"s3\.(?P<region>[a-z0-9-]+)\.(?:wasabisys\.com|scw\.cloud)")),
    _Vendor(_hosts(r"storage\.googleapis\.com"), "auto"),
)
_ANY_HOST = _Vendor(re.compile(""))

_BUCKET_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_KEY_TEXT = re.compile(r"[\x21-\x7e]{1,256}")


def bucket_from_settings(settings: Settings) -> Bucket:
    """The operator's bucket.

    Raises:
        SettingsError: the endpoint is no URL, or no bucket is named.
    """
    if not (settings.bucket_endpoint_url and settings.bucket_access_key_id and settings.bucket_secret_access_key):
        raise SettingsError("S3 is not set: BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY")
    try:
        return _bucket(
            settings.bucket_endpoint_url,
            settings.bucket_name,
            settings.bucket_region,
            settings.bucket_access_key_id,
            settings.bucket_secret_access_key,
            ENVIRONMENT,
        )
    except InvalidInput as error:
        raise SettingsError(error.sentence) from error


def bucket_from_request(s3_config: object, *, allow: tuple[str, ...]) -> Bucket:
    """The caller's bucket, from the request's `s3Config`. Looks its host up, connects nowhere.

    The host must be https, unless the operator listed it in `allow`. It is looked up and checked again at every request
    that is sent to it, see `engine.guest_wire`; this first look is to refuse before any work.

    Raises:
        InvalidInput: names every wrong field; never a value of the keys.
    """
    if not isinstance(s3_config, dict):
        raise InvalidInput([Problem("s3Config", f"must be an object with {', '.join(REQUEST_FIELDS)}")])
    problems = _unknown_fields(s3_config)
    for name in ("accessId", "accessSecret"):
        value = s3_config.get(name)
        if not isinstance(value, str) or not _KEY_TEXT.fullmatch(value):
            problems.append(Problem(f"s3Config.{name}", "must be 1 to 256 printable ASCII characters without spaces"))
    url, bucket_name = s3_config.get("endpointUrl"), s3_config.get("bucketName")
    if not isinstance(url, str) or not url:
        problems.append(Problem("s3Config.endpointUrl", "must be an https URL"))
    if bucket_name is not None and not isinstance(bucket_name, str):
        problems.append(Problem("s3Config.bucketName", "must be a string"))
    if problems or not isinstance(url, str):
        raise InvalidInput(problems)
    bucket = _bucket(
        url,
        bucket_name or None,
        None,
        Secret(s3_config["accessId"]),
        Secret(s3_config["accessSecret"]),
        REQUEST,
    )
    _check_public(bucket.host_url, allow)
    return replace(bucket, guest_allow=allow)


def _unknown_fields(s3_config: dict[Any, Any]) -> list[Problem]:
    strange = [str(name) for name in s3_config if name not in REQUEST_FIELDS]
    problems = []
    for name in strange[:MAX_STRANGE]:
        near = nearest(name, REQUEST_FIELDS)
        hint = f"; did you mean {near}?" if near else ""
        problems.append(Problem("s3Config", f"'{printable(name)}' is not a field{hint}"))
    if len(strange) > MAX_STRANGE:
        problems.append(Problem("s3Config", f"{len(strange) - MAX_STRANGE} more fields are unknown"))
    return problems


def _check_public(url: str, allow: tuple[str, ...]) -> None:
    try:
        check_endpoint(url, allow=allow)
        is_private_on_purpose = _is_listed(url, allow)
    except FetchFailed as error:
        raise InvalidInput([Problem("s3Config.endpointUrl", error.sentence)]) from error
    if not url.startswith("https://") and not is_private_on_purpose:
        raise InvalidInput([Problem("s3Config.endpointUrl", "must be an https URL")])


def _is_listed(url: str, allow: tuple[str, ...]) -> bool:
    """Whether the operator's list names this very host, or holds the address that is written in the URL."""
    target = parse_url(url)
    try:
        address = ip_address(target.host)
    except ValueError:
        return any(entry.names(target.host, target.port) for entry in parse_allowed(allow))
    return any(entry.holds(address, target.port) for entry in parse_allowed(allow))


def _bucket(
    url: str, name: str | None, region: str | None, access_key: Secret, secret_key: Secret, labels: Labels
) -> Bucket:
    """Find bucket, region and addressing in the forms that consoles and manuals show.

    `https://bucket.s3.region.amazonaws.com`, `https://endpoint/bucket`, `https://endpoint` with a separate
    name.

    Raises:
        InvalidInput: with the labels as field names.
    """
    scheme, host, port, path_bucket = _parts(url, labels)
    vendor, host_bucket, host_region = _vendor(host)
    if host_bucket is None and name and host.startswith(f"{name.lower()}."):
        host_bucket = name  # a store of one's own that is set up with virtual hosts
    names = {found for found in (host_bucket, path_bucket, name) if found}
    if not names:
        raise InvalidInput([Problem(labels.endpoint, f"names no bucket; add it to the path, or set {labels.name}")])
    if len(names) > 1:
        raise InvalidInput([Problem(labels.name, f"the endpoint's bucket and {labels.name} differ")])
    bucket_name = names.pop()
    if not _BUCKET_NAME.fullmatch(bucket_name):
        raise InvalidInput([Problem(labels.name, "is not a bucket name")])
    is_virtual = host_bucket is not None or vendor.addressing == "virtual"
    # A wildcard certificate covers one label, so that a bucket with a dot has no valid https virtual host.
    addressing: Literal["virtual", "path"] = "virtual" if is_virtual and "." not in bucket_name else "path"
    if host_bucket is not None:
        host = host[len(host_bucket) + 1 :]
    return Bucket(
        endpoint_url=f"{scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}",
        name=bucket_name,
        region=region or host_region or vendor.region,
        addressing=addressing,
        access_key_id=access_key,
        secret_access_key=secret_key,
        labels=labels,
    )


def _vendor(host: str) -> tuple[_Vendor, str | None, str | None]:
    """Whose host this is, and the bucket and the region written in it."""
    for vendor in VENDORS:
        if match := vendor.host.fullmatch(host):
            return vendor, match["bucket"], match.groupdict().get("region")
    return _ANY_HOST, None, None


def _parts(url: str, labels: Labels) -> tuple[str, str, int | None, str | None]:
    """Scheme, host in lower case without a trailing dot, port, and the bucket if the path names one."""
    if len(url) > MAX_URL_CHARACTERS:
        raise InvalidInput([Problem(labels.endpoint, f"is longer than {MAX_URL_CHARACTERS} characters")])
    try:
        parts = urlsplit(url)
        port = parts.port
        if port == 0:
            raise ValueError("no server listens there")
    except ValueError as error:
        raise InvalidInput([Problem(labels.endpoint, "is not a URL")]) from error
    is_clean = url.isprintable() and not any(character.isspace() or character in "@\\" for character in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_clean:
        raise InvalidInput([Problem(labels.endpoint, "must be a URL such as https://s3.us-west-2.amazonaws.com")])
    if parts.query or parts.fragment:
        raise InvalidInput([Problem(labels.endpoint, "must end after the bucket")])
    segments = [segment for segment in parts.path.split("/") if segment]
    if len(segments) > 1:
        raise InvalidInput([Problem(labels.endpoint, "may have one bucket in its path, no folder")])
    # The dot would be signed as part of the host and, at the door, be gone: a store would blame the secret key.
    return parts.scheme, parts.hostname.removesuffix("."), port, segments[0] if segments else None
