"""The bench of real faults, as far as a machine without a card can run it: its jobs, its processes, its verdicts."""

from pathlib import Path

import pytest

from bench import faults
from engine.settings import Settings
from schemas.input_schema import parse_request


def test_payloads_are_legal_requests_of_each_mode(tmp_path: Path) -> None:
    assert [parse_request(payload).mode for payload in faults.payloads(tmp_path).values()] == [
        "image", "video", "svi_endframe",
    ]  # fmt: skip


@pytest.mark.soak
def test_sound_worker_in_a_process_of_its_own_answers_and_leaves_well(twins: Path, tmp_path: Path) -> None:
    environment = {"WORKER_WEIGHTS_DIR": str(twins), "WORKER_OUTPUT_DIR": str(tmp_path)}
    answer, code, taken = faults.through_command_line("none", environment, faults.payloads(tmp_path)["image"])
    assert (answer["profile"], code, taken) == ("tiny/sdxl", 0, 1)


@pytest.mark.parametrize(("leak_bytes", "is_well"), [(0, True), (80 * 2**20, False)])
def test_mixed_jobs_fail_when_memory_grows(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak_bytes: int, is_well: bool
) -> None:
    held = iter((10**9, 10**9 + leak_bytes))
    monkeypatch.setattr(faults, "held_bytes", lambda: next(held))
    asked = {"image": faults.payloads(tmp_path)["image"]}
    found = faults.mixed_jobs(settings, asked, 1)
    assert (found["ok"], found["jobs"], found["errors"]) == (is_well, 1, [])


def test_mixed_jobs_fail_when_a_job_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "held_bytes", lambda: 0)
    found = faults.mixed_jobs(settings, {"image": {"prompt": 3}}, 1)
    assert not found["ok"]
    assert found["errors"][0].startswith("invalid_input")
