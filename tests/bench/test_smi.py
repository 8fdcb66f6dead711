"""Clock, power and temperature, read from a tool that speaks as nvidia-smi does."""

import os
import threading
import time

import pytest

from bench import smi

TOOL = """#!/bin/sh
echo "$*" > "$0.asked"
case "$*" in
*memory.total*) echo 143771 ;;
*) for power in 100.5 300.5; do echo "1980, $power, 41"; done; echo "[N/A], 1, 1"; echo "1500, 700.0, 63"
   exec sleep 60 ;;
esac
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-smi"
    path.write_text(TOOL)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_sampler_tells_median_clock_mean_power_and_highest_temperature(tool):
    started = time.monotonic()
    sampler = smi.Sampler()
    waited = threading.Event()
    for _ in range(200):
        if len(sampler._seen) == 3 or waited.wait(0.05):
            break
    assert sampler.since(started) == smi.CardState(1980.0, 367.0, 63.0)
    assert sampler.since(time.monotonic()) is None
    sampler.close()


def test_card_bytes_are_what_the_tool_says(tool):
    assert smi.card_bytes() == 143771 * 2**20


@pytest.mark.parametrize(("seen", "asked"), [(None, "--id=0"), ("1", "--id=1"), ("3,0", "--id=3")])
def test_card_that_is_asked_for_is_the_first_that_the_process_sees(tool, tmp_path, monkeypatch, seen, asked):
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    smi.card_bytes()
    assert asked in (tmp_path / "nvidia-smi.asked").read_text().split()


def test_nothing_is_seen_without_the_tool(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sampler = smi.Sampler()
    assert sampler.since(0.0) is None
    assert smi.card_bytes() is None
    sampler.close()
