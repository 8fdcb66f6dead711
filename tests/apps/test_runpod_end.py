"""How a worker ends: taken away, killed, its card lost, its job hung. Each guard is shown to be needed.

Each scenario has a worker process and a server of its own, and mostly waits; so they run side by side.
"""

import re
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.apps.conftest import FAKE_WORKER
from tests.apps.fake_worker import LIMITS
from tests.figures import Count, Figure
from tests.servers.runpod_server import PATIENCE_S, Fault, RunPodServer
from tests.servers.worker_process import start_worker

pytest_plugins = ["tests.figures"]

AT_A_TIME = 5

ROOM_S = 30.0
"""What a crowded machine may add to anything; less than the server's POLL_S, which a worker may not wait out."""


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def end_around_a_job(offset_s: float, folder: Path) -> None:
    """Queue a job `offset_s` after SIGTERM reaches an idle worker, which answers it once and ends."""
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.wait_for("take")
        time.sleep(0.5)
        signalled = time.monotonic() + max(0.0, -offset_s)
        acts = [
            (signalled, worker.terminate),
            (signalled + offset_s, partial(server.queue, "job0", {"steps": 3})),
        ]
        for at, act in sorted(acts, key=lambda timed: timed[0]):
            time.sleep(max(0.0, at - time.monotonic()))
            act()
        assert worker.wait() == 0
        ended = time.monotonic()
        assert len(server.of("hand_out", "job0")) == 1
        assert len(server.of("result", "job0")) == 1
        assert ended - max(signalled + LIMITS.hand_out_s, server.of("result", "job0")[0].at) < ROOM_S


def without_the_drain_a_job_handed_out_after_sigterm_is_lost(folder: Path) -> None:
    with (
        RunPodServer() as server,
        start_worker(server, [FAKE_WORKER], folder, {"FAKE_WITHOUT": "drain"}) as worker,
    ):
        server.wait_for("take")
        worker.terminate()
        until(lambda: "no more jobs are run" in worker.log())
        server.queue("job0", {})
        server.wait_for("hand_out", "job0")
        with pytest.raises(TimeoutError):
            server.result("job0", timeout_s=3.0)


def a_running_job_is_finished_after_sigterm_and_none_is_taken(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"steps": 60, "step_s": 0.1})
        server.wait_for("progress", "job0")
        worker.terminate()
        server.queue("job1", {})
        assert worker.wait() == 0
        assert "error" not in server.result("job0")
        assert server.of("hand_out", "job1") == []


def a_lost_card_is_answered_and_the_worker_leaves_without_another_job(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "fault"})
        server.queue("job1", {})
        answer = server.wait_for("result", "job0")
        assert worker.wait() == 1
        assert time.monotonic() - answer.at < LIMITS.exit_s + ROOM_S
        assert answer.body["stopPod"] is True
        assert answer.body["error"] == "gpu_fault: the card is lost"
        assert answer.body["output"] == {"code": "gpu_fault", "retryable": True}
        assert server.of("hand_out", "job1") == []


def without_the_latch_a_worker_without_a_card_takes_the_next_job(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, {"FAKE_WITHOUT": "latch"}):
        server.queue("job0", {"then": "fault"})
        server.queue("job1", {})
        server.wait_for("hand_out", "job1")


def a_worker_that_cannot_post_its_fault_leaves_all_the_same(folder: Path) -> None:
    server = RunPodServer(result_faults=deque([Fault(0, delay_s=30.0)] * 20))
    with server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"then": "fault"})
        refused = server.wait_for("refused", "job0")
        assert worker.wait() == 1
        assert time.monotonic() - refused.at < LIMITS.exit_s + ROOM_S


def a_hung_step_is_answered_and_logged_and_ends_the_worker(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "hang"})
        began = server.wait_for("progress", "job0")
        result = server.result("job0")
        assert worker.wait() == 1
        assert time.monotonic() - began.at < LIMITS.step_s + ROOM_S
        assert result["error"].startswith("gpu_fault: ")
        assert result["stopPod"] is True
        assert "no step for" in worker.log()
        assert re.search(r"thread card_0:\n(.*\n)*.*fake_job.py", worker.log())


def without_the_watch_a_hung_job_keeps_the_worker(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, {"FAKE_WITHOUT": "watch"}) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "hang"})
        server.wait_for("progress", "job0")
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(LIMITS.step_s + 5.0)
        assert server.of("result") == []


def without_our_patience_a_result_is_lost_in_an_outage_of_seven_posts(folder: Path) -> None:
    server = RunPodServer(result_faults=deque([Fault(503)] * 7))
    with server, start_worker(server, [FAKE_WORKER], folder, {"FAKE_WITHOUT": "patience"}):
        server.queue("job0", {})
        server.queue("job1", {})
        server.wait_for("hand_out", "job1")
        assert server.of("result", "job0") == []


def a_stop_for_a_hung_job_ends_the_worker_without_an_answer(folder: Path) -> None:
    notes = folder / "jobs"
    environment = {"FAKE_JOB_LOG": str(notes)}
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, environment) as worker:
        server.queue("job0", {"steps": 3, "step_s": 0.05, "then": "hang"})
        until(lambda: notes.exists() and "finish job0" in notes.read_text())  # from here on it looks at no stop
        server.stop("job0")
        assert worker.wait() == 1
        assert server.of("result") == []


def a_step_that_freezes_the_interpreter_ends_the_worker_with_its_stacks(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"then": "freeze"})
        server.wait_for("hand_out", "job0")
        assert worker.wait() == 1
        assert f"Timeout (0:00:{LIMITS.frozen_s:02.0f})!" in worker.log()
        assert "fake_job.py" in worker.log()


def a_killed_worker_takes_its_heartbeat_along(folder: Path) -> None:
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder) as worker:
        server.queue("job0", {"steps": 600, "step_s": 0.1})
        server.wait_for("ping", "job0")
        worker.kill()
        time.sleep(2.0)  # for one that was on its way
        seen = len(server.of("ping"))
        time.sleep(4.0)  # it pings every second
        assert len(server.of("ping")) == seen


def without_the_guard_a_killed_workers_heartbeat_goes_on(folder: Path) -> None:
    environment = {"FAKE_WITHOUT": "heartbeat"}
    with RunPodServer() as server, start_worker(server, [FAKE_WORKER], folder, environment) as worker:
        server.queue("job0", {"steps": 600, "step_s": 0.1})
        server.wait_for("ping", "job0")
        worker.kill()
        worker.wait()
        server.wait_for("ping", "job0", count=len(server.of("ping", "job0")) + 3)


def a_failing_check_ends_the_worker_before_any_job(folder: Path) -> None:
    with RunPodServer() as server:
        server.queue("job0", {})
        with start_worker(server, [FAKE_WORKER], folder, {"FAKE_CHECK": "fail"}) as worker:
            assert worker.wait() == 1
            assert "check_weights" in worker.log()
        assert server.of("take") == []
        assert server.wait_for("ping").body["status"] == ["unhealthy"]


OFFSETS_S = (-0.4, -0.05, 0.0, 0.05, 0.2, 0.5)
SCENARIOS: dict[str, Callable[[Path], None]] = {
    f"a_job_handed_out_{offset_s:+}s_from_sigterm_is_answered_once": partial(end_around_a_job, offset_s)
    for offset_s in OFFSETS_S
} | {
    scenario.__name__: scenario
    for scenario in (
        without_the_drain_a_job_handed_out_after_sigterm_is_lost,
        a_running_job_is_finished_after_sigterm_and_none_is_taken,
        a_lost_card_is_answered_and_the_worker_leaves_without_another_job,
        without_the_latch_a_worker_without_a_card_takes_the_next_job,
        a_worker_that_cannot_post_its_fault_leaves_all_the_same,
        a_hung_step_is_answered_and_logged_and_ends_the_worker,
        without_the_watch_a_hung_job_keeps_the_worker,
        without_our_patience_a_result_is_lost_in_an_outage_of_seven_posts,
        a_stop_for_a_hung_job_ends_the_worker_without_an_answer,
        a_step_that_freezes_the_interpreter_ends_the_worker_with_its_stacks,
        a_killed_worker_takes_its_heartbeat_along,
        without_the_guard_a_killed_workers_heartbeat_goes_on,
        a_failing_check_ends_the_worker_before_any_job,
    )
}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The scenarios that this run of pytest selected, side by side."""
    tests = [item for item in request.session.items if item.originalname == "test_a_worker_ends_well"]
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        yield {
            name: threads.submit(SCENARIOS[name], tmp_path_factory.mktemp("worker"))
            for name in (test.callspec.params["scenario"] for test in tests)
        }


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_worker_ends_well(scenario: str, outcomes: dict[str, Future[None]]) -> None:
    outcomes[scenario].result()


def run_many(scenarios: list[Callable[[Path], None]], folder: Path) -> int:
    """Run them a few at a time; returns how many passed, and raises what the first failed one raised."""
    folders = [folder / str(i) for i in range(len(scenarios))]
    for each in folders:
        each.mkdir()
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        return len(list(threads.map(lambda scenario, where: scenario(where), scenarios, folders)))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_200_jobs_handed_out_around_sigterm_are_answered_once(tmp_path: Path, figure: Figure) -> None:
    random = Random(0)
    trials = [partial(end_around_a_job, random.uniform(-0.5, 0.5)) for _ in range(200)]
    answered = run_many(trials, tmp_path)
    figure("jobs around SIGTERM answered exactly once", Count(answered, 200))
    assert answered == 200


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_50_lost_cards_are_answered_and_their_workers_leave(tmp_path: Path, figure: Figure) -> None:
    left = run_many([a_lost_card_is_answered_and_the_worker_leaves_without_another_job] * 50, tmp_path)
    figure("sticky faults answered, no job taken after, gone within 30 s", Count(left, 50))
    assert left == 50
