"""An arm in a process of its own, asked over a pipe; the protocol from the command line to the table, with twins."""

import json
import re
import subprocess
import sys

import pytest
import torch

from bench import processes
from bench.processes import ROOT, Arm, Died, once


def make_cell(twins, what: str = "ours", **changes) -> dict:
    return {
        "what": what, "mode": "svi_endframe", "precision": "bf16", "size": "twin", "twins": str(twins),
        "cap_gib": 44.5, "attention": None, "compile": True, "cache_dir": None, **changes,
    }  # fmt: skip


@pytest.mark.soak
def test_arm_answers_job_by_job_keeps_its_models_and_says_when_it_fails(twins, capfd):
    arm = Arm(make_cell(twins))
    first, second = (arm.ask("job", layout="flf", steps=3) for _ in range(2))
    whole = arm.ask("whole", layout="svi_latent", steps=None)["whole"]
    with pytest.raises(Died, match="exit code 1"):
        arm.ask("job", layout="no such layout", steps=None)
    arm.close()
    assert [len(each["sample"]["forwards_s"]) for each in (first, second)] == [3, 3]
    assert first["sample"]["tokens"] == 64  # 4 latent frames of 8 x 8, patches of 1 x 2 x 2
    assert second["sample"]["stages_s"]["load"] < first["sample"]["stages_s"]["load"] / 4
    assert 0 < whole["generate_s"] < whole["seconds"]
    assert {"fetch", "load", "encode", "denoise", "decode", "upload"} <= set(whole["stages_s"])
    assert "KeyError" in capfd.readouterr().err


def test_half_an_answer_is_none(monkeypatch):
    """As of a process that the system kills for its memory while it answers."""
    code = "import os, sys; sys.stdin.readline(); os.write(int(sys.argv[-1]), b'{\"sample\": ')"
    monkeypatch.setattr(processes, "_command", lambda _: [sys.executable, "-c", code])
    arm = Arm({})
    with pytest.raises(Died, match="exit code 0"):
        arm.ask("job")
    arm.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_seconds_are_not_measured_without_a_card(capfd):
    assert once({"what": "ceilings", "cap_gib": 44.5, "size": "full"}) is None
    assert "--cpu-counts and --size twin need none" in capfd.readouterr().err


@pytest.mark.soak
def test_jobs_of_both_arms_from_the_command_line(twins, tmp_path):
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench", "jobs", "--size", "twin", "--repeats", "2", "--layout", "svi_latent"]
    command += ["--twins", str(twins), "--precision", "bf16", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    plain, ours = json.loads(path.read_text())
    assert [len(cell["samples"]) for cell in (plain, ours)] == [2, 2]
    assert [len(cell["samples"][0]["forwards_s"]) for cell in (plain, ours)] == [6, 6]
    assert [cell["samples"][0]["tokens"] for cell in (plain, ours)] == [64, 80]  # 4 and 5 latent frames
    assert re.findall(r" s  svi_endframe (\S.*: job \d) of", done.stderr) == [
        "plain bf16: job 1", "ours bf16 svi_latent: job 1", "plain bf16: job 2", "ours bf16 svi_latent: job 2",
    ]  # fmt: skip
    assert "seconds mean nothing" in done.stdout
    assert "of plain diffusers' time" not in done.stdout
