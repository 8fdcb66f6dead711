"""The worker under RunPod's real SDK loop, in a process of its own, against a job server on loopback."""

import itertools
import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import runpod.serverless
from runpod.serverless.modules import rp_fitness

from apps import runpod_loop
from apps.runpod_jobs import Jobs
from apps.runpod_watch import PRODUCTION
from engine.settings import Settings
from tests.apps.conftest import FAKE_WORKER, Running
from tests.figures import Count, Figure
from tests.servers.runpod_server import Fault, RunPodServer
from tests.servers.worker_process import start_worker

pytest_plugins = ["tests.figures"]


def test_our_checks_come_after_the_sdks_which_need_a_card_and_a_host_that_are_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def warm_up() -> None: ...

    for name in ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_SKIP_GPU_CHECK"):
        monkeypatch.delenv(name, raising=False)
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(rp_fitness, "_fitness_checks", registered)
    monkeypatch.setattr(rp_fitness, "_registration_state", {"gpu_check": False, "system_checks": False})
    monkeypatch.setattr(runpod_loop, "install", lambda *_: None)
    # What the SDK's start does before it runs the checks.
    monkeypatch.setattr(runpod.serverless, "start", lambda _: rp_fitness._ensure_system_checks_registered())
    runpod_loop.take_jobs(Jobs(lambda *_: {}, Settings()), [warm_up], PRODUCTION)
    names = [check.__name__ for check in registered]
    assert names.index("_memory_check") < names.index("warm_up") == len(names) - 1


def test_a_job_is_answered_with_what_it_returned(running: Running) -> None:
    assert running.answer(echo="ünïcode ❤") == {"output": {"echo": "ünïcode ❤", "video_url": "file:///video.mp4"}}


@pytest.mark.parametrize("then", ["raise", "exit", "interrupt", "memory", "recurse", "bytes", "nan", "surrogate"])
def test_a_job_that_breaks_is_answered_internal_without_its_reason(running: Running, then: str) -> None:
    result = running.answer(then=then, prompt="a canary in a prompt")
    assert result["output"] == {"code": "internal", "retryable": False}
    assert str(result["error"]).startswith("internal: the worker ")
    assert "Traceback" not in json.dumps(result)
    assert "/" not in json.dumps(result)
    assert "canary" not in json.dumps(result)


def test_a_job_that_breaks_would_tell_its_prompt_and_our_paths_without_the_fixed_texts(tmp_path: Path) -> None:
    environment = {"FAKE_WITHOUT": "texts"}
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path, environment):
        server.queue("job0", {"then": "raise", "prompt": "a canary in a prompt"})
        error = server.result("job0")["error"]
    assert "a canary in a prompt" in error
    assert "Traceback" in error
    assert "fake_job.py" in error


@pytest.mark.parametrize("then", ["none", "empty"])
def test_a_job_without_a_result_fails(running: Running, then: str) -> None:
    assert running.answer(then=then)["error"] == "internal: the worker made no result"


def test_an_invalid_input_lists_its_problems_as_a_string_and_as_a_list(running: Running) -> None:
    result = running.answer(then="invalid")
    assert result["error"] == "invalid_input: prompt: is missing; seed: must be an integer ?"
    assert result["output"]["problems"][0] == {"field": "prompt", "message": "is missing"}


def test_a_response_over_the_limit_names_the_way_out(running: Running) -> None:
    result = running.answer(then="big", size=9_500_000)
    assert result["output"]["code"] == "output_too_large"
    assert "BUCKET_ENDPOINT_URL" in result["error"]


def test_a_response_over_it_would_never_reach_the_caller_without_the_limit(tmp_path: Path) -> None:
    environment = {"WORKER_RESPONSE_LIMIT_BYTES": "1000000000"}
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path, environment):
        server.queue("job0", {"then": "big", "size": 10_000_000})
        server.wait_for("refused", "job0")
        server.queue("job1", {})
        assert "error" not in server.result("job1")
        assert server.of("result", "job0") == []


def test_a_response_just_below_the_limit_arrives(running: Running) -> None:
    assert len(running.answer(then="big", size=9_400_000)["output"]["video"]) == 9_400_000


def test_progress_is_ordered_and_ends_before_the_result(running: Running) -> None:
    job_ids = [running.new_id() for _ in range(5)]
    for job_id in job_ids:
        running.server.queue(job_id, {"steps": 100, "step_s": 0.02})
    for job_id in job_ids:
        running.server.result(job_id)
    for job_id in job_ids:
        events = [e for e in running.server.events if e.job_id == job_id and e.kind in ("progress", "result")]
        steps = [e.body["output"]["step"] for e in events[:-1]]
        assert [e.kind for e in events[-1:]] == ["result"]
        assert len(steps) >= 2
        assert steps == sorted(set(steps))
        assert all(b.at - a.at > 0.09 for a, b in itertools.pairwise(events[:-1]))
        assert set(events[0].body["output"]) == {"stage", "step", "total", "percent", "eta_s"}


def test_progress_that_fails_stops_after_three_and_costs_the_job_nothing(running: Running) -> None:
    job_id = running.new_id()
    running.server.progress_faults = deque([Fault(503), Fault(0), Fault(200, delay_s=40.0), Fault(503), Fault(503)])
    running.server.queue(job_id, {"steps": 80, "step_s": 0.05})
    result = running.server.result(job_id)
    assert "error" not in result
    assert len(running.server.of("refused", job_id)) == 3
    assert running.server.of("progress", job_id) == []
    start, end = (at for _, at in running.ran(job_id))
    assert end - start < 20.0  # 80 steps take 4 s; the third post is answered after 40
    assert running.server.of("result", job_id)[0].at - end < 15.0
    running.server.progress_faults.clear()


def test_a_result_is_posted_again_until_it_is_taken(running: Running) -> None:
    running.server.result_faults = deque([Fault(503)] * 7 + [Fault(0), Fault(429)])
    assert running.answer(echo=9)["output"]["echo"] == 9


def test_a_result_that_hangs_is_posted_again(running: Running) -> None:
    running.server.result_faults = deque([Fault(0, delay_s=40.0)])
    assert running.answer(echo=1)["output"]["echo"] == 1


def test_a_result_that_is_refused_is_not_posted_again_and_the_next_job_runs(running: Running) -> None:
    job_id = running.new_id()
    running.server.result_faults = deque([Fault(400)])
    running.server.queue(job_id, {})
    running.server.wait_for("refused", job_id)
    assert "error" not in running.answer()
    assert running.server.of("result", job_id) == []


def cancel_at_a_step(running: Running, after_s: float, free_within_s: float = 20.0) -> None:
    """Stop a job of a minute, with another waiting: the card is free within a step, and never shared."""
    stopped, following = running.new_id(), running.new_id()
    running.server.queue(stopped, {"steps": 1200, "step_s": 0.05})
    running.wait_for_start(stopped)  # the SDK forgets a stop for a job that it has not begun
    time.sleep(after_s)
    running.server.stop(stopped)
    running.server.stop(stopped)
    running.server.queue(following, {"steps": 2, "step_s": 0.05})
    running.server.result(following)
    assert len(running.ran(stopped)) == 2, "the stopped job is still on the card"
    (_, _), (_, ended) = running.ran(stopped)
    (_, started), _ = running.ran(following)
    assert ended - running.server.of("stop", stopped)[0].at < free_within_s
    assert started >= ended
    assert running.server.of("result", stopped) == []


def test_a_stopped_job_ends_within_a_step_and_is_not_answered(running: Running) -> None:
    for run in range(10):
        cancel_at_a_step(running, 0.1 + 0.037 * run)


def test_without_the_wait_a_stopped_job_would_share_the_card_with_the_next(tmp_path: Path) -> None:
    environment = {"FAKE_WITHOUT": "wait", "FAKE_HASTE": "1", "FAKE_JOB_LOG": str(tmp_path / "jobs")}
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path, environment) as worker:
        shared = Running(server, worker, tmp_path / "jobs")
        with pytest.raises(AssertionError, match="still on the card"):
            cancel_at_a_step(shared, 0.1)


def test_a_stop_for_a_finished_job_changes_nothing(running: Running) -> None:
    job_id = running.new_id()
    running.server.queue(job_id, {})
    running.server.result(job_id)
    running.server.stop(job_id)
    running.server.wait_for("stop", job_id)
    assert "error" not in running.answer()


def test_a_job_delivered_twice_runs_once(running: Running) -> None:
    job_id = running.new_id()
    running.server.queue(job_id, {"echo": 1, "steps": 3, "step_s": 0.05})
    running.server.queue(job_id, {"echo": 1, "steps": 3, "step_s": 0.05})
    running.server.wait_for("result", job_id, count=2)
    first, second = running.server.of("result", job_id)
    assert first.body == second.body
    assert [what for what, _ in running.ran(job_id)] == ["start", "end"]


def test_a_known_id_with_another_input_runs(running: Running) -> None:
    job_id = running.new_id()
    running.server.queue(job_id, {"echo": 1})
    running.server.queue(job_id, {"echo": 2})
    assert running.server.wait_for("result", job_id, count=2).body["output"]["echo"] == 2


CANARIES = {
    "prompt": "canary-prompt-of-a-fox",
    "image_url": "https://bucket.example/a.png?X-Amz-Signature=canarysignature0",
    "image_start": "data:image/png;base64,Canary0Image" + "Q0FuYXJ5MQ" * 40,
    "url": "https://bucket.example/out.mp4?X-Amz-Signature=canaryresult0000",
}
SECRETS = {
    "accessId": "AKIACANARYCANARYCANA",
    "accessSecret": "canary/secret+of/the/request",
    "bucketName": "b",
}


def run_jobs_with_canaries(running: Running) -> None:
    """Run jobs that succeed, fail and are stopped, with a mark in each place where a secret may be."""
    server = running.server
    for then in ("answer", "raise", "invalid", "nan", "big"):
        job_id = running.new_id()
        server.queue(job_id, CANARIES | {"then": then, "size": 9_500_000}, s3Config=SECRETS)
        server.result(job_id)
    stopped = running.new_id()
    server.queue(stopped, CANARIES | {"steps": 1200, "step_s": 0.05}, s3Config=SECRETS)
    server.wait_for("progress", stopped)
    server.stop(stopped)
    following = running.new_id()
    server.queue(following, CANARIES)
    server.result(following)


def test_logs_hold_job_ids_and_sizes_and_no_canary(running: Running) -> None:
    run_jobs_with_canaries(running)
    text = running.worker.log()
    assert "canary" not in text.lower()
    assert "LOOPBACKLOOPBACK" not in text
    lines = [json.loads(line) for line in text.splitlines() if not line.startswith("--- Starting Serverless")]
    assert any(line["message"].startswith("ended after") and line["size_bytes"] > 0 for line in lines)
    assert any(line.get("stage") == "denoise" and line["requestId"].startswith("job") for line in lines)
    assert any("RuntimeError: no such prompt: ***" in line["message"] for line in lines)


def test_without_the_quiet_log_the_canaries_would_show(tmp_path: Path) -> None:
    environment = {"FAKE_WITHOUT": "quiet"}
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path, environment) as worker:
        server.queue("job0", CANARIES)
        server.result("job0")
        assert "canaryresult0000" in worker.log()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_100_stopped_jobs_leave_the_card_within_a_step(running: Running, figure: Figure) -> None:
    for run in range(100):
        cancel_at_a_step(running, 0.1 + 0.0037 * run, free_within_s=0.05 + 0.5)
        figure("stopped jobs off the card within a step + 0.5 s, none beside the next job", Count(1, 1))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_no_progress_of_100_jobs_with_20_steps_comes_after_its_result(running: Running, figure: Figure) -> None:
    random = Random(0)
    job_ids = [running.new_id() for _ in range(100)]
    for job_id in job_ids:
        slow = [
            Fault(random.choice((200, 503, 0)), random.uniform(0, 0.7)) for _ in range(random.choice((0, 0, 0, 1, 2)))
        ]
        running.server.progress_faults = deque(slow)
        running.server.queue(job_id, {"steps": 20, "step_s": 0.02})
        running.server.result(job_id)
    late = [
        event
        for job_id in job_ids
        for event in running.server.of("progress", job_id)
        if event.at > running.server.of("result", job_id)[0].at
    ]
    posted = sum(len(running.server.of("progress", job_id)) for job_id in job_ids)
    figure("late progress", f"{len(late)} of 2,000 updates ({posted:,} posted, the others superseded)")
    assert posted > 150
    assert late == []


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_no_canary_is_in_the_log_after_200_jobs(running: Running, figure: Figure) -> None:
    for _ in range(29):  # 7 jobs each
        run_jobs_with_canaries(running)
    log = running.worker.log().lower()
    answers = json.dumps([event.body for event in running.server.of("result") if "error" in event.body]).lower()
    figure("canaries in the log of 203 jobs, in their errors", f"{log.count('canary')}, {answers.count('canary')}")
    assert "canary" not in log
    assert "canary" not in answers
