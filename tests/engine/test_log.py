"""What reaches the log, from our code and from libraries, and what never does."""

import io
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import pytest

from engine import log
from engine.settings import ROOT, Secret, Settings

ENDPOINT = Settings(
    in_endpoint=True,
    bucket_endpoint_url="https://s3.example",
    bucket_access_key_id=Secret("canary-key-id"),
    bucket_secret_access_key=Secret("canary secret, key"),
)


@pytest.fixture(autouse=True)
def undisturbed_logging() -> Iterator[None]:
    """Put back what `configure` sets for a whole process."""
    root = logging.getLogger()
    handlers, level, factory = root.handlers[:], root.level, logging.getLogRecordFactory()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.setLogRecordFactory(factory)
    logging.captureWarnings(False)
    logging.raiseExceptions = True


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def own(stream: io.StringIO) -> logging.Logger:
    """A logger of ours in an endpoint: JSON lines into `stream`."""
    log.configure(ENDPOINT, stream)
    return logging.getLogger("engine.anything")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("got data:image/png;base64,Q2FuYXJ5 here", "got data:*** here"),
        (
            "GET https://b.example/k/v.mp4?X-Amz-Signature=canary&a=1 200",
            "GET https://b.example/k/v.mp4?*** 200",
        ),
        ("https://b.example/k#canary", "https://b.example/k?***"),
        ("postgres://user:canary@db:5432/x", "postgres://***@db:5432/x"),
        ("redis://:canary@host/0", "redis://***@host/0"),
        ("Authorization: Bearer canary", "Authorization: ***"),
        ("{'Authorization': 'Basic canary'}", "{'Authorization': '***'}"),
        ("sent bearer canarycanary", "sent bearer ***"),
        ("X-Amz-Credential=canary/20260101/eu", "X-Amz-Credential=***"),
        ("&Signature=canary&Expires=5", "&Signature=***&Expires=5"),
        ("aws_secret_access_key=canary", "aws_secret_access_key=***"),
        ('{"accessSecret": "canary one", "bucketName": "b"}', '{"accessSecret": ***", "bucketName": "b"}'),
        ("accessId=canary, x", "accessId=***, x"),
        ("password: canary", "password: ***"),
        ("key AKIACANARYCANARYCANA.", "key ***."),
        ("hf_CanaryCanaryCanary", "***"),
        ("rpa_CANARYCANARYCANARYCANARY", "***"),
        ("Aa0" * 30 + "==", "<92 characters>"),
        ("A" * 70, "<70 characters>"),
    ],
)
def test_redact_removes_secrets_and_keeps_the_rest(text: str, expected: str) -> None:
    assert log.redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "loaded wan22_i2v_svi in 12.3 s",
        "sha256 " + "0123456789abcdef" * 4,
        "/usr/lib/python3.11/site-packages/diffusers/pipelines/wan/pipeline_wan_i2v.py:812",
        "the tokenizer has 5 tokens too many",
        "https://bucket.example/worker/abc/video.mp4",
        "data: 5 rows",
        "ünïcode ❤",
    ],
)
def test_redact_leaves_ordinary_text_alone(text: str) -> None:
    assert log.redact(text) == text


def test_redact_removes_given_secrets_wherever_they_are() -> None:
    assert log.redact("no a canary, here, b", ("a canary, here",)) == "no ***, b"


def test_redact_keeps_both_ends_of_a_long_text() -> None:
    text = log.redact("start " + "word " * 10_000 + "end")
    assert len(text) < log.MAX_CHARACTERS + 10
    assert text.startswith("start ")
    assert text.endswith(" end")


def test_redact_keeps_the_end_of_a_traceback_of_any_length_but_not_the_rest_of_a_cut_line() -> None:
    text = log.redact("start\n" + "  File x.py, line 5\n" * 10_000 + "RecursionError: too deep")
    assert text.startswith("start\n")
    assert text.endswith("\nRecursionError: too deep")
    cookie = log.redact("Cookie: " + "a=b; " * 20_000 + "c=canary\nend")
    assert "canary" not in cookie
    assert cookie.endswith("\nend")


@pytest.mark.parametrize(
    "unit",
    ["a.", "a:", "a", "Aa1", "secret", "data:", "x-amz-", "http://", "http://a", "bearer  ", "a@", " ", "a-"],
)
def test_redact_is_quick_on_hostile_text(unit: str) -> None:
    started = time.process_time()
    log.redact(unit * (1_000_000 // len(unit)))
    assert time.process_time() - started < 10.0  # 1 s at worst; a search that is quadratic takes minutes


def test_mask_removes_the_strings_of_a_payload_in_each_spelling() -> None:
    payload = {"prompt": 'a "red"\nfox', "s3Config": [{"accessSecret": "hush hush"}], "n": 5, "mode": "video"}
    text = f"""ValueError: {payload["prompt"]!r} or {json.dumps(payload["prompt"])} or hush hush, in video.py"""
    assert log.mask(text, payload) == """ValueError: '***' or "***" or ***, in video.py"""


def test_mask_takes_a_payload_nested_beyond_the_stack() -> None:
    payload: list[object] = ["a canary of a fox"]
    for _ in range(100_000):
        payload = [payload]
    assert log.mask("no a canary of a fox", payload) == "no ***"


def test_a_line_in_an_endpoint_is_json_with_the_jobs_id_and_its_facts(own: logging.Logger, stream: io.StringIO) -> None:
    with log.for_job("job-1"):
        own.info("stored %s", "v.mp4", extra={"stage": "upload", "size_bytes": 5, "seconds": 0.5})
    own.warning("no job")
    first, second = lines(stream)
    assert first.pop("time")
    assert first == {
        "level": "INFO",
        "requestId": "job-1",
        "message": "stored v.mp4",
        "stage": "upload",
        "size_bytes": 5,
        "seconds": 0.5,
    }
    assert (second["level"], second["requestId"]) == ("WARN", None)


def test_a_line_elsewhere_is_text_that_cannot_be_forged(stream: io.StringIO) -> None:
    log.configure(Settings(), stream)
    with log.for_job("a b\nERROR"):
        logging.getLogger("engine.anything").info("one\nINFO    | two \x1b[31m \ud800")
    assert stream.getvalue() == "INFO    | a?b?ERROR | one\n    INFO    | two ?[31m \\ud800\n"


def test_own_records_are_redacted_with_their_tracebacks(own: logging.Logger, stream: io.StringIO) -> None:
    try:
        raise RuntimeError("token=canary")
    except RuntimeError:
        own.exception("failed for %s", "https://b.example/?sig=canary")
    (line,) = lines(stream)
    assert "RuntimeError: token=***" in str(line["traceback"])
    assert "canary" not in stream.getvalue()


def test_without_the_redaction_they_would_show(
    own: logging.Logger, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "redact", lambda text, _secrets: text)
    own.info("GET https://b.example/?sig=canary by canary-key-id")
    assert lines(stream)[0]["message"] == "GET https://b.example/?sig=canary by canary-key-id"


def test_the_stores_keys_never_show(own: logging.Logger, stream: io.StringIO) -> None:
    own.info("signed by canary-key-id with canary secret, key")
    assert lines(stream)[0]["message"] == "signed by *** with ***"


def test_a_librarys_warning_is_reduced_to_its_place(own: logging.Logger, stream: io.StringIO) -> None:
    logging.getLogger("diffusers.pipelines").warning("truncated: ['a canary of a fox']")
    assert str(lines(stream)[0]["message"]).startswith("diffusers.pipelines at ")
    assert str(lines(stream)[0]["message"]).endswith(": text withheld")
    assert "canary" not in stream.getvalue()


def test_a_librarys_own_handler_sees_the_reduced_text_too(own: logging.Logger) -> None:
    private = io.StringIO()
    library = logging.getLogger("somelibrary")
    handler = logging.StreamHandler(private)
    library.addHandler(handler)
    library.warning("truncated: %s", "a canary of a fox")
    library.error("GET https://b.example/?sig=canary")
    library.removeHandler(handler)
    assert "text withheld" in private.getvalue()
    assert "canary" not in private.getvalue()


def test_a_librarys_errors_stay_and_its_chatter_goes(own: logging.Logger, stream: io.StringIO) -> None:
    logging.getLogger("botocore").error("cannot connect")
    logging.getLogger("botocore").info("found credentials")
    logging.getLogger("engine").debug("too fine")
    assert [line["message"] for line in lines(stream)] == ["cannot connect"]


def test_a_python_warning_keeps_its_place_and_category(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log.configure(ENDPOINT, stream)
        warnings.warn_explicit("a canary of a fox", UserWarning, "lib.py", 7)
    assert lines(stream)[0]["message"] == "lib.py:7: UserWarning: text withheld"


def test_a_record_that_cannot_be_formatted_is_not_dumped(
    own: logging.Logger, stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    own.info("%d frames", "canary")
    assert lines(stream)[0]["message"] == "unprintable message (TypeError)"
    assert "canary" not in stream.getvalue() + capsys.readouterr().err


def test_configure_twice_writes_each_line_once(stream: io.StringIO) -> None:
    log.configure(ENDPOINT, io.StringIO())
    log.configure(ENDPOINT, stream)
    logging.getLogger("engine").info("once")
    assert len(lines(stream)) == 1


@pytest.mark.parametrize(("in_endpoint", "expected"), [("True", "out"), ("False", "err")])
def test_the_log_goes_to_stdout_in_an_endpoint_and_leaves_it_free_elsewhere(in_endpoint: str, expected: str) -> None:
    code = (
        "import logging; logging.basicConfig(); from engine import log; from engine.settings import Settings;"
        f"log.configure(Settings(in_endpoint={in_endpoint})); logging.getLogger('engine').info('here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"out": done.stdout, "err": done.stderr}[expected].count("here") == 1
    assert "here" not in {"err": done.stdout, "out": done.stderr}[expected]
