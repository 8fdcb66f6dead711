"""How a worker ends: taken away, killed, its card lost, its job hung. Each guard is shown to be needed."""

import re
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.apps.conftest import FAKE_WORKER
from tests.servers.runpod_server import Fault, RunPodServer
from tests.servers.worker_process import start_worker

HAND_OUT_S = 1.5
"""Limits.hand_out_s: how long a worker still listens after SIGTERM."""


def end_around_a_job(
    folder: Path, offset_s: float, environment: dict[str, str] | None = None
) -> tuple[int, int]:
    """Queue a job `offset_s` after SIGTERM reaches an idle worker, which must end by itself, soon, with code 0.

    Returns how often the job was handed out and how often it was answered.
    """
    folder.mkdir()
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, environment) as worker:
        server.wait_for("take")
        time.sleep(0.5)
        signalled = time.monotonic() + max(0.0, -offset_s)
        queued = signalled + offset_s
        for at, act in sorted([(signalled, "signal"), (queued, "queue")]):
            time.sleep(max(0.0, at - time.monotonic()))
            if act == "signal":
                worker.terminate()
            else:
                server.queue("job0", {"steps": 3, "step_s": 0.1})
        assert worker.wait() == 0
        ended = time.monotonic()
        handed_out, answered = server.of("hand_out", "job0"), server.of("result", "job0")
        last = max([signalled + HAND_OUT_S, *(event.at for event in answered)])
        assert ended - last < 2.0
        return len(handed_out), len(answered)


def test_every_job_handed_out_around_sigterm_is_answered_once(tmp_path: Path) -> None:
    offsets_s = (-0.4, -0.05, 0.0, 0.05, 0.2, 0.5)
    with ThreadPoolExecutor(3) as threads:
        ends = list(
            threads.map(lambda i: end_around_a_job(tmp_path / str(i), offsets_s[i]), range(len(offsets_s)))
        )
    assert ends == [(1, 1)] * 6


def test_without_the_drain_a_job_handed_out_after_sigterm_would_be_lost(tmp_path: Path) -> None:
    # The stock scaler ends only when its open polls do, after up to 90 s.
    with (
        RunPodServer() as server,
        start_worker(server, [FAKE_WORKER], tmp_path, {"FAKE_WITHOUT": "drain"}) as worker,
    ):
        server.wait_for("take")
        time.sleep(0.5)
        worker.terminate()
        time.sleep(0.3)
        server.queue("job0", {})
        server.wait_for("hand_out", "job0")
        with pytest.raises(TimeoutError):
            server.result("job0", timeout_s=3.0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_jobs_handed_out_around_sigterm_are_answered_once(tmp_path: Path) -> None:
    random = Random(0)
    offsets_s = [random.uniform(-0.5, 0.5) for _ in range(200)]
    with ThreadPoolExecutor(3) as threads:
        ends = list(threads.map(lambda i: end_around_a_job(tmp_path / str(i), offsets_s[i]), range(200)))
    assert ends == [(1, 1)] * 200


def test_a_running_job_is_finished_after_sigterm_and_none_is_taken(tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path) as worker:
        server.queue("job0", {"steps": 20, "step_s": 0.1})
        server.wait_for("progress", "job0")
        worker.terminate()
        server.queue("job1", {})
        assert worker.wait() == 0
        assert "error" not in server.result("job0")
        assert server.of("hand_out", "job1") == []


def lose_the_card(folder: Path) -> float:
    """Run a job that loses the card, with another waiting. Returns the seconds from the answer to the end."""
    folder.mkdir(exist_ok=True)
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "fault"})
        server.queue("job1", {})
        answer = server.wait_for("result", "job0")
        assert worker.wait() == 1
        ended = time.monotonic()
        assert answer.body["stopPod"] is True
        assert answer.body["error"] == "gpu_fault: the card is lost"
        assert answer.body["output"] == {"code": "gpu_fault", "retryable": True}
        assert server.of("hand_out", "job1") == []
        return ended - answer.at


def test_a_lost_card_is_answered_and_the_worker_leaves_without_another_job(tmp_path: Path) -> None:
    assert lose_the_card(tmp_path) < 5.0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_50_lost_cards_are_answered_and_their_workers_leave(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        waits_s = list(threads.map(lambda i: lose_the_card(tmp_path / str(i)), range(50)))
    assert len(waits_s) == 50
    assert max(waits_s) < 30.0


def test_without_the_latch_a_worker_without_a_card_would_take_the_next_job(tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path, {"FAKE_WITHOUT": "latch"}):
        server.queue("job0", {"then": "fault"})
        server.queue("job1", {})
        server.wait_for("hand_out", "job1")


def test_a_worker_that_cannot_post_its_fault_leaves_all_the_same(tmp_path: Path) -> None:
    server = RunPodServer(result_faults=deque([Fault(0, delay_s=30.0)] * 20))
    with server, start_worker(server, [FAKE_WORKER], tmp_path) as worker:
        server.queue("job0", {"then": "fault"})
        refused = server.wait_for("refused", "job0")
        assert worker.wait() == 1
        assert time.monotonic() - refused.at < 5.0 + 2.0  # Limits.exit_s in fake_worker


def test_a_hung_step_is_answered_logged_and_ends_the_worker(tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "hang"})
        server.wait_for("progress", "job0")
        started = time.monotonic()
        result = server.result("job0")
        assert worker.wait() == 1
        assert time.monotonic() - started < 1.0 + 5.0  # Limits.step_s in fake_worker
    assert result["error"].startswith("gpu_fault: ")
    assert result["stopPod"] is True
    assert "no step for" in worker.log()
    assert re.search(r"thread card_0:\n(.*\n)*.*fake_job.py", worker.log())


def test_a_stop_for_a_hung_job_ends_the_worker_without_an_answer(tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "hang"})
        server.wait_for("progress", "job0")
        time.sleep(0.5)  # it hangs after 0.15 s
        server.stop("job0")
        assert worker.wait() == 1
        assert server.of("result") == []


def test_a_step_that_freezes_the_interpreter_ends_the_worker_with_its_stacks(tmp_path: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], tmp_path) as worker:
        server.queue("job0", {"then": "freeze"})
        server.wait_for("hand_out", "job0")
        assert worker.wait() == 1
    assert "Timeout (0:00:03)!" in worker.log()
    assert "fake_job.py" in worker.log()


def pings_after_a_kill(folder: Path, environment: dict[str, str]) -> int:
    """Kill a worker amid a job and count the pings that name the job 1 s later and more, for 3 s."""
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, environment) as worker:
        server.queue("job0", {"steps": 100, "step_s": 0.1})
        server.wait_for("ping", "job0")
        worker.kill()
        worker.wait()
        killed = time.monotonic()
        time.sleep(4.0)
        assert server.of("result") == []
        return len([ping for ping in server.of("ping", "job0") if ping.at > killed + 1.0])


def test_a_killed_worker_takes_its_heartbeat_along(tmp_path: Path) -> None:
    assert pings_after_a_kill(tmp_path, {}) == 0


def test_without_the_guard_a_killed_workers_heartbeat_would_go_on(tmp_path: Path) -> None:
    assert pings_after_a_kill(tmp_path, {"FAKE_WITHOUT": "heartbeat"}) >= 2


def test_a_failing_check_ends_the_worker_before_any_job(tmp_path: Path) -> None:
    with RunPodServer() as server:
        server.queue("job0", {})
        with start_worker(server, [FAKE_WORKER], tmp_path, {"FAKE_CHECK": "fail"}) as worker:
            assert worker.wait() == 1
        assert server.of("take") == []
        assert server.of("ping")[0].body["status"] == ["unhealthy"]
    assert "check_weights" in worker.log()
