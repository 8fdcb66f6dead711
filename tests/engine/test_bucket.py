"""Where the bucket is: the forms of endpoints, and a stranger's s3Config."""

from pathlib import Path

import pytest

from engine import bucket as bucket_module
from engine.bucket import bucket_from_request, bucket_from_settings
from engine.settings import Settings
from schemas.errors import InvalidInput, SettingsError

R2 = "0123456789abcdef0123456789abcdef.r2.cloudflarestorage.com"
R2_EU = "0123456789abcdef0123456789abcdef.eu.r2.cloudflarestorage.com"
GOOD = {
    "accessId": "AKID",
    "accessSecret": "very-secret",
    "bucketName": "mine",
    "endpointUrl": "https://1.1.1.1",
}


def read(url: str, name: str | None = None, region: str | None = None):
    variables = {
        "BUCKET_ENDPOINT_URL": url,
        "BUCKET_ACCESS_KEY_ID": "AKID",
        "BUCKET_SECRET_ACCESS_KEY": "very-secret",
    }
    optional = {"BUCKET_NAME": name, "BUCKET_REGION": region}
    return bucket_from_settings(
        Settings.from_env(variables | {key: value for key, value in optional.items() if value is not None})
    )


@pytest.mark.parametrize(
    ("url", "name", "host_url", "bucket", "region", "addressing"),
    [
        ("https://pics.s3.us-west-2.amazonaws.com", None,
         "https://pics.s3.us-west-2.amazonaws.com", "pics", "us-west-2", "virtual"),
        ("https://s3.eu-central-1.amazonaws.com/pics/", None,
         "https://pics.s3.eu-central-1.amazonaws.com", "pics", "eu-central-1", "virtual"),
        ("https://s3.us-gov-west-1.amazonaws.com", "pics",
         "https://pics.s3.us-gov-west-1.amazonaws.com", "pics", "us-gov-west-1", "virtual"),
        ("https://pics.s3.amazonaws.com", "pics",
         "https://pics.s3.amazonaws.com", "pics", "us-east-1", "virtual"),
        ("https://pics.s3-us-west-2.amazonaws.com", None,
         "https://pics.s3-us-west-2.amazonaws.com", "pics", "us-west-2", "virtual"),
        ("https://s3.eu-west-1.amazonaws.com./pics", None,
         "https://pics.s3.eu-west-1.amazonaws.com", "pics", "eu-west-1", "virtual"),
        ("https://my.pics.s3.eu-west-1.amazonaws.com", None,
         "https://s3.eu-west-1.amazonaws.com", "my.pics", "eu-west-1", "path"),
        ("https://s3.cn-north-1.amazonaws.com.cn/pics", None,
         "https://pics.s3.cn-north-1.amazonaws.com.cn", "pics", "cn-north-1", "virtual"),
        (f"https://{R2}/pics", None, f"https://{R2}", "pics", "auto", "path"),
        (f"https://pics.{R2}", None, f"https://pics.{R2}", "pics", "auto", "virtual"),
        (f"https://{R2_EU}", "pics", f"https://{R2_EU}", "pics", "auto", "path"),
        ("https://s3.us-west-004.backblazeb2.com", "pics",
         "https://s3.us-west-004.backblazeb2.com", "pics", "us-west-004", "path"),
        ("https://nyc3.digitaloceanspaces.com", "pics",
         "https://nyc3.digitaloceanspaces.com", "pics", "nyc3", "path"),
        ("https://pics.nyc3.digitaloceanspaces.com", None,
         "https://pics.nyc3.digitaloceanspaces.com", "pics", "nyc3", "virtual"),
        ("https://s3.fr-par.scw.cloud/pics", None, "https://s3.fr-par.scw.cloud", "pics", "fr-par", "path"),
        ("https://storage.googleapis.com/pics", None,
         "https://storage.googleapis.com", "pics", "auto", "path"),
        ("http://minio:9000/pics", None, "http://minio:9000", "pics", "us-east-1", "path"),
        ("http://minio:9000", "pics", "http://minio:9000", "pics", "us-east-1", "path"),
        ("http://[::1]:9000/pics", None, "http://[::1]:9000", "pics", "us-east-1", "path"),
        ("https://pics.store.example", "pics", "https://pics.store.example", "pics", "us-east-1", "virtual"),
    ],
)  # fmt: skip
def test_bucket_is_found_in_every_form(url, name, host_url, bucket, region, addressing) -> None:
    found = read(url, name)
    assert (found.host_url, found.name, found.region, found.addressing) == (
        host_url,
        bucket,
        region,
        addressing,
    )


def test_bucket_region_setting_goes_before_the_endpoints() -> None:
    assert read("https://s3.eu-west-1.amazonaws.com/pics", region="eu-west-3").region == "eu-west-3"


@pytest.mark.parametrize(
    ("url", "name", "sentence"),
    [
        ("https://s3.eu-west-1.amazonaws.com", None,
         "BUCKET_ENDPOINT_URL: names no bucket; add it to the path, or set BUCKET_NAME"),
        ("https://pics.s3.eu-west-1.amazonaws.com", "other",
         "BUCKET_NAME: the endpoint's bucket and BUCKET_NAME differ"),
        ("https://store.example/pics", "other", "BUCKET_NAME: the endpoint's bucket and BUCKET_NAME differ"),
        ("https://store.example/pics/2026", None,
         "BUCKET_ENDPOINT_URL: may have one bucket in its path, no folder"),
        ("https://store.example/pics?region=x", None, "BUCKET_ENDPOINT_URL: must end after the bucket"),
        ("https://store.example/p!", None, "BUCKET_NAME: is not a bucket name"),
        ("https://store.example:port/pics", None, "BUCKET_ENDPOINT_URL: is not a URL"),
        ("https://store.example:0/pics", None, "BUCKET_ENDPOINT_URL: is not a URL"),
        ("https://store.example/" + "a" * 8192, None, "BUCKET_ENDPOINT_URL: is longer than 8192 characters"),
        ("store.example/pics", None,
         "BUCKET_ENDPOINT_URL: must be a URL such as https://s3.us-west-2.amazonaws.com"),
        ("https://user:pass@store.example/pics", None,
         "BUCKET_ENDPOINT_URL: must be a URL such as https://s3.us-west-2.amazonaws.com"),
        ("https://store .example/pics", None,
         "BUCKET_ENDPOINT_URL: must be a URL such as https://s3.us-west-2.amazonaws.com"),
    ],
)  # fmt: skip
def test_bucket_from_settings_names_what_is_wrong(url, name, sentence) -> None:
    with pytest.raises(SettingsError) as caught:
        read(url, name)
    assert caught.value.sentence == sentence


def test_bucket_does_not_show_its_keys() -> None:
    shown = repr(read("https://store.example/pics"))
    assert "very-secret" not in shown
    assert "AKID" not in shown


def test_bucket_from_request_takes_runpods_four_fields() -> None:
    found = bucket_from_request(GOOD, allow=())
    assert (found.host_url, found.name, found.access_key_id, found.secret_access_key) == (
        "https://1.1.1.1",
        "mine",
        "AKID",
        "very-secret",
    )


def test_bucket_from_request_lists_every_problem_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        bucket_from_request({"accessID": "AKID", "accessSecret": "bad secret", "bucketName": 7}, allow=())
    assert [str(problem) for problem in caught.value.problems] == [
        "s3Config: 'accessID' is not a field; did you mean accessId?",
        "s3Config.accessId: must be 1 to 256 printable ASCII characters without spaces",
        "s3Config.accessSecret: must be 1 to 256 printable ASCII characters without spaces",
        "s3Config.endpointUrl: must be an https URL",
        "s3Config.bucketName: must be a string",
    ]
    assert "bad secret" not in caught.value.sentence


def test_bucket_from_request_counts_unknown_fields_that_are_too_many_to_name() -> None:
    with pytest.raises(InvalidInput) as caught:
        bucket_from_request(GOOD | {f"x{number}": 1 for number in range(23)}, allow=())
    problems = [str(problem) for problem in caught.value.problems]
    assert problems[19:] == ["s3Config: 'x19' is not a field", "s3Config: 3 more fields are unknown"]


def test_bucket_from_request_shows_a_long_name_cut_and_printable() -> None:
    with pytest.raises(InvalidInput) as caught:
        bucket_from_request(GOOD | {"\n" + "x" * 99: 1}, allow=())
    assert caught.value.sentence == f"s3Config: '\\n{'x' * 38}…' is not a field"


@pytest.mark.parametrize("value", ["text", 7, [], True, ["accessId"]])
def test_bucket_from_request_refuses_what_is_no_object(value) -> None:
    with pytest.raises(InvalidInput, match="s3Config: must be an object"):
        bucket_from_request(value, allow=())


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:9000",
        "https://localhost",
        "https://10.1.2.3",
        "https://169.254.169.254/mine",
        "https://[::ffff:10.0.0.1]",
        "https://0x7f000001",
        "http://1.1.1.1",
        "https://user:pass@1.1.1.1",
        "ftp://1.1.1.1",
        "https://1.1.1.1\\@10.0.0.1",
        "https://1.1.1.1:22",
        "https://1.1.1.1:0",
        "https://1.1.1.1/" + "a" * 8192,
    ],
)
def test_bucket_from_request_refuses_an_endpoint_inside_or_in_the_clear(url) -> None:
    with pytest.raises(InvalidInput, match=r"^s3Config\.endpointUrl: "):
        bucket_from_request(GOOD | {"endpointUrl": url}, allow=())


def test_bucket_from_request_takes_plain_http_from_the_operators_list_only() -> None:
    inside = GOOD | {"endpointUrl": "http://127.0.0.1:9000"}
    assert bucket_from_request(inside, allow=("127.0.0.1:9000",)).host_url == "http://127.0.0.1:9000"
    with pytest.raises(InvalidInput, match=r"s3Config\.endpointUrl"):
        bucket_from_request(inside, allow=("127.0.0.1:9001",))


def test_bucket_from_request_checks_the_host_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(bucket_module, "check_endpoint", lambda url, **_: checked.append(url))
    bucket_from_request(GOOD | {"bucketName": "metadata", "endpointUrl": "https://metadata.attacker.example"}, allow=())
    bucket_from_request(GOOD | {"endpointUrl": "https://s3.eu-west-1.amazonaws.com"}, allow=())
    assert checked == ["https://metadata.attacker.example", "https://mine.s3.eu-west-1.amazonaws.com"]


def test_settings_without_s3_have_no_bucket(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="S3 is not set"):
        bucket_from_settings(Settings(output_dir=tmp_path))
