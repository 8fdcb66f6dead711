"""The whole worker as RunPod runs it: handler.py in a process of its own, the SDK's loop, a job server, tiny twins."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from engine.settings import ROOT
from tests.conftest import data_uri, decode_video, photo
from tests.schemas.test_bad_input import BAD_FIELDS, LEAST
from tests.servers.runpod_server import RunPodServer
from tests.servers.worker_process import WorkerProcess, least_environment, start_api, start_worker

IMAGE = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 2, "refiner_inference_steps": 4}
VIDEO = {"mode": "video", "prompt": "a fox", "image_url": data_uri(photo()), "num_frames": 9, "num_inference_steps": 2}
SVI = {
    "mode": "svi_endframe",
    "prompt": "a fox",
    "image_start": data_uri(photo()),
    "image_end": data_uri(photo(seed=1)),
    "video_length": 9,
}
LIGHTNING = {"model_type": "wan22_i2v_lightning", "num_inference_steps": 4}
LONG = {**VIDEO, "num_frames": 81, "num_inference_steps": 500}
FIRST_JOB_S = 200.0  # imports torch and diffusers, on a crowded machine; the rest is fast


def environment(twins: Path) -> dict[str, str]:
    # No bucket is set, so that files come back inline: a worker in the cloud has no disk that a caller could read.
    return {"WORKER_WEIGHTS_DIR": str(twins), "RUNPOD_INIT_TIMEOUT": "600", "RUNPOD_SKIP_GPU_CHECK": "true"}


@pytest.mark.timeout(600)
def test_every_mode_comes_out_of_runpods_own_loop(twins: Path, tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [ROOT / "handler.py"], tmp_path, environment(twins)) as worker:
        for name, payload in {"image": IMAGE, "video": VIDEO, "svi": SVI, "bad": {"prompt": 3}}.items():
            server.queue(name, payload)
        image = server.result("image", FIRST_JOB_S)["output"]
        assert image["images"][0].startswith("data:image/png;base64,")
        for name in ("video", "svi"):
            output = server.result(name, FIRST_JOB_S)["output"]
            assert frames_inline(output["video_url"], tmp_path) == (9, output["height"], output["width"], 3)
        bad = server.result("bad", FIRST_JOB_S)
        assert bad["error"].startswith("invalid_input: prompt: must be a string")
        updates = [event.body["output"] for event in server.of("progress", "video")]
        assert [update["percent"] for update in updates] == sorted(update["percent"] for update in updates)
        assert set(updates[0]) == {"stage", "step", "total", "percent", "eta_s"}
        worker.terminate()
        assert worker.wait() == 0


@pytest.mark.timeout(600)
def test_worker_that_warmed_up_loads_nothing_for_its_first_jobs(twins: Path, tmp_path: Path) -> None:
    variables = {**environment(twins), "WORKER_WARM_UP": "svi_endframe, video:wan22_i2v_lightning"}
    with RunPodServer() as server, start_worker(server, [ROOT / "handler.py"], tmp_path, variables) as worker:
        for name, payload in {"svi": SVI, "lightning": VIDEO | LIGHTNING}.items():
            server.queue(name, payload)
            assert "load_read" not in server.result(name, FIRST_JOB_S)["output"]["timings_s"]
        log = worker.log()
        for mode in ("svi_endframe", "video"):
            assert log.index(f"warmed up for {mode} in ") < log.index("ended after")
        assert list(server.of("progress", "warm-up")) == []


@pytest.mark.timeout(600)
def test_worker_imports_what_its_first_job_needs_while_it_waits_for_it(twins: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("shared", "wan22_i2v_svi"):
        (weights / name).symlink_to(twins / name)
    with (
        RunPodServer() as server,
        start_worker(server, [ROOT / "handler.py"], tmp_path, environment(weights)) as worker,
    ):
        wait_for_line(worker, "imported ahead of the first job in ")
        server.queue("first", SVI)
        assert server.result("first", FIRST_JOB_S)["output"]["num_frames"] == 9
        log = worker.log()
        assert log.index("imported ahead of the first job in ") < log.index("first | Started.")


@pytest.mark.timeout(600)
def test_worker_that_is_told_to_leave_while_it_imports_leaves(twins: Path, tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [ROOT / "handler.py"], tmp_path, environment(twins)) as worker:
        server.wait_for("take", timeout_s=FIRST_JOB_S)  # it obeys signals from before then, and begins to import then
        assert "imported ahead of the first job" not in worker.log()
        worker.terminate()
        assert worker.wait(FIRST_JOB_S) == 0
        assert "Traceback" not in worker.log()


def wait_for_line(worker: WorkerProcess, words: str) -> None:
    ends = time.monotonic() + FIRST_JOB_S
    while words not in worker.log():
        assert time.monotonic() < ends, f"the worker does not say {words!r}"
        time.sleep(0.05)


@pytest.mark.timeout(600)
def test_worker_that_cannot_warm_up_ends_before_it_takes_a_job(twins: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "sdxl").symlink_to(twins / "sdxl")
    variables = {**environment(weights), "WORKER_WARM_UP": "video"}
    with RunPodServer() as server, start_worker(server, [ROOT / "handler.py"], tmp_path, variables) as worker:
        server.queue("first", IMAGE)
        assert worker.wait(FIRST_JOB_S) == 1
        assert server.of("result") == []
        assert "the weights of wan21_i2v_480p are not there" in worker.log()


@pytest.mark.timeout(600)
def test_cancelled_video_stops_long_before_its_end_and_the_next_job_runs(twins: Path, tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [ROOT / "handler.py"], tmp_path, environment(twins)):
        server.queue("warm", VIDEO)
        server.result("warm", FIRST_JOB_S)
        server.queue("long", LONG)
        server.wait_for("progress", "long")
        server.stop("long")
        server.queue("next", VIDEO)
        server.result("next", FIRST_JOB_S)
        assert server.of("result", "long") == []
        updates = [event.body["output"] for event in server.of("progress", "long")]
        assert max(update["step"] for update in updates) < 250  # of 500


@pytest.fixture(scope="module")
def api(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("api")
    variables = {"WORKER_WEIGHTS_DIR": str(twins), "WORKER_OUTPUT_DIR": str(folder / "output")}
    with start_api([ROOT / "handler.py"], folder, variables) as port:
        yield port


def runsync(port: int, payload: object) -> dict[str, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=FIRST_JOB_S)
    try:
        body = json.dumps({"input": payload})
        connection.request("POST", "/runsync", body, {"Content-Type": "application/json"})
        answer: dict[str, Any] = json.loads(connection.getresponse().read(), parse_constant=pytest.fail)
        return answer
    finally:
        connection.close()


@pytest.mark.timeout(600)
def test_local_api_answers_both_modes(api: int) -> None:
    assert runsync(api, IMAGE)["output"]["image_url"].startswith("data:image/png")
    video = runsync(api, VIDEO)["output"]
    assert decode_video(video["video_url"]).shape[0] == 9


def test_local_api_answers_every_bad_input_with_json(api: int) -> None:
    rows = [row for row in BAD_FIELDS if isinstance(row[1], str) and is_json(row[2])]
    assert len(rows) >= 40
    for mode, field, value, _sentence in rows:
        answer = runsync(api, {**LEAST[mode], field: value})
        assert answer["error"].startswith("invalid_input: "), (mode, field)
        assert "Traceback" not in json.dumps(answer)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([], marks=pytest.mark.soak),
        pytest.param(["test_input.json"], marks=pytest.mark.soak),
        ['{"input": {"prompt": "a fox", "height": 64, "width": 64}}'],
    ],
)
def test_test_input_runs_from_any_directory(twins: Path, tmp_path: Path, given: list[str]) -> None:
    arguments = [str(ROOT / name) if name.endswith(".json") else name for name in given]
    done = subprocess.run(
        [sys.executable, ROOT / "handler.py", "--test_input", *arguments],
        cwd=tmp_path,
        env=least_environment(tmp_path) | {"WORKER_WEIGHTS_DIR": "weights/tiny"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout.splitlines()[-1])
    assert {"images", "image_url", "seed"} <= set(response)


def test_bad_test_input_exits_1_with_a_sentence_for_each_problem_and_no_traceback(twins: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "handler.py", "--test_input", '{"input": {"prompt": 3, "hieght": 64}}'],
        env={"PATH": "/usr/bin:/bin", "WORKER_WEIGHTS_DIR": str(twins)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "hieght: is not a field of mode image; did you mean height?" in done.stderr
    assert "prompt: must be a string" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def frames_inline(url: str, folder: Path) -> tuple[int, ...]:
    import base64

    head, _, body = url.partition(",")
    assert head == "data:video/mp4;base64"
    (folder / "inline.mp4").write_bytes(base64.b64decode(body))
    return decode_video(folder / "inline.mp4").shape


def is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True
