"""`--rp_serve_api`: the SDK's API answers good and bad bodies with JSON, and stays up."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from apps import runpod_api, runpod_worker
from engine.settings import Settings
from tests.apps.conftest import FAKE_WORKER
from tests.apps.fake_job import run
from tests.servers.runpod_server import PATIENCE_S
from tests.servers.worker_process import start_api


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("api")
    with start_api([FAKE_WORKER], folder) as port:
        yield port
    assert "canary" not in (folder / "log").read_text().lower()


def post(port: int, path: str, body: bytes) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read(), parse_constant=pytest.fail)
    finally:
        connection.close()


def test_runsync_answers_a_job(port: int) -> None:
    status, body = post(port, "/runsync", b'{"input": {"echo": "\xc3\xa9"}}')
    assert status == 200
    assert body["status"] == "COMPLETED"
    assert body["output"] == {"echo": "é", "video_url": "file:///video.mp4"}


def test_run_and_status_answer_a_job(port: int) -> None:
    _, accepted = post(port, "/run", b'{"input": {"echo": 3}}')
    status, body = post(port, f"/status/{accepted['id']}", b"")
    assert (status, body["status"], body["output"]["echo"]) == (200, "COMPLETED", 3)


@pytest.mark.parametrize("then", ["invalid", "raise", "exit", "nan", "bytes", "surrogate", "none", "empty", "recurse"])
def test_runsync_answers_a_failed_job_with_its_error_as_a_string(port: int, then: str) -> None:
    asked = json.dumps({"input": {"then": then, "prompt": "a canary in a prompt"}}).encode()
    status, body = post(port, "/runsync", asked)
    assert (status, body["status"]) == (200, "FAILED")
    assert body["error"].startswith(("internal: ", "invalid_input: "))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"5",
        b'"text"',
        b"[]",
        b"{}",
        b"{",
        b"\xff\xfe",
        b'{"input": null}',
        b'{"input": 5}',
        b'{"input": "canary"}',
        b'{"input": []}',
        b'{"input": [NaN, "canary"]}',
        b'{"input": "\\ud800 canary"}',
        b'{"input": {"a": 1}, "webhook": 5}',
        b'{"input": {"a": 1}, "webhook": NaN}',
        b'{"prompt": "canary"}',
        b'{"input": ' + b"[" * 100_000,
        b'{"input": ' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body)[:40],
)
def test_runsync_refuses_a_bad_body_with_json(port: int, body: bytes) -> None:
    status, answer = post(port, "/runsync", body)
    assert status in (400, 422)
    assert "canary" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("flags", "place"),
    [([], ("localhost", 8000)), (["--rp_api_host", "0.0.0.0", "--rp_api_port", "0"], ("0.0.0.0", 0))],
    ids=["default", "given"],
)
def test_the_api_listens_on_loopback_unless_told_otherwise(
    flags: list[str], place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[str, int]] = []
    monkeypatch.setattr(runpod_api, "serve_api", lambda _jobs, host, port: places.append((host, port)))
    assert runpod_worker.serve(run, Settings(), ["--rp_serve_api", *flags]) == 0
    assert places == [place]


def test_the_sdks_own_api_would_break_on_a_bad_body() -> None:
    from fastapi.testclient import TestClient
    from runpod.serverless.modules import rp_fastapi

    stock = TestClient(rp_fastapi.WorkerAPI({"handler": dict}).rp_app, raise_server_exceptions=False)
    answer = stock.post("/runsync", content=b'{"input": [NaN]}', headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")


def test_runsync_stays_up_after_all_of_this(port: int) -> None:
    assert post(port, "/runsync", b'{"input": {}}')[0] == 200
