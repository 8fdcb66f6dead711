"""`--plan`: every baked profile with its table and its limits, and whether all of them can run."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import handler
from apps import operator_commands
from apps.operator_commands import check_plan, compile_ahead
from engine.admission import Limits
from engine.plan_report import NothingFits, report
from engine.residency import GIB
from engine.settings import Settings
from model_handler import ModelHandler
from schemas.errors import CardUnfit


def limits(gib: float) -> Limits:
    return Limits(int(gib * GIB))


def test_report_shows_each_baked_profile_once_as_the_real_weights_would_lie(settings: Settings) -> None:
    text = report(settings, limits(44.5), None)
    assert text.startswith("no card here; as on one with 44.50 GiB\n")
    heads = [line for line in text.splitlines() if line.startswith("tiny/")]
    assert heads == [
        "tiny/sdxl: resident, fp16",
        "tiny/wan21_i2v_480p: resident, bf16",
        "tiny/wan22_i2v_svi: swap, bf16",
        "tiny/wan22_i2v_lightning: swap, bf16",
    ]
    assert "  - resident, encoders on the card needs 53.78 GiB of the card" in text
    assert "  activations         9.78 GiB  at the largest size" in text


def test_report_says_what_would_be_refused(settings: Settings) -> None:
    lines = report(settings, limits(44.5), (8, 9)).splitlines()
    assert lines[0] == "this card with 44.50 GiB"
    assert "  1280x1280: up to 113 frames a clip, more is refused" in lines
    assert "  2048x2048: up to 2 pictures at once, more is refused" in lines
    assert "  4096x4096: refused" in lines
    assert lines.count("  832x480: up to 161 frames a clip") == 2  # `video`, by either of its models
    assert lines.count("  832x480: up to 81 frames a clip") == 1  # `svi_endframe`: longer films are chains


def test_profile_without_a_placement_fails_the_report_which_shows_the_others_too(settings: Settings) -> None:
    with pytest.raises(NothingFits) as caught:
        report(settings, limits(14.0), None)
    text = str(caught.value)
    assert "tiny/sdxl in fp16 at this size needs at least 14.9 GiB of card memory" in text
    assert "tiny/wan22_i2v_svi: stream, bf16" in text


def test_host_that_cannot_hold_both_experts_fails_the_report(settings: Settings) -> None:
    with pytest.raises(NothingFits) as caught:
        report(settings, replace(limits(44.5), host_bytes=50 * GIB), (8, 9))
    text = str(caught.value)
    assert text.startswith("this card with 44.50 GiB, and 50.00 GiB of host memory for weights\n")
    assert "63.9 GiB of host memory; the card has 44.5 GiB and the host 50.0 GiB\n  832x480: refused" in text
    assert "tiny/wan21_i2v_480p: resident, bf16" in text


def test_nothing_baked_fails_the_report(tmp_path: Path) -> None:
    with pytest.raises(NothingFits, match="no profile is baked"):
        report(Settings(weights_dir=tmp_path), limits(44.5), None)


@pytest.mark.parametrize(("vram_gib", "code"), [("", 0), ("14", 1)])
def test_plan_on_the_command_line_prints_it_and_exits(
    twins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], vram_gib: str, code: int
) -> None:
    monkeypatch.setenv("WORKER_WEIGHTS_DIR", str(twins))
    monkeypatch.setenv("WORKER_VRAM_GIB", vram_gib)
    monkeypatch.setattr(sys, "argv", ["handler.py", "--plan"])
    assert handler.main() == code
    assert "tiny/wan21_i2v_480p: " in capsys.readouterr().out


def test_start_logs_the_plan_of_a_card(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(operator_commands, "capability", lambda: (8, 9))
    with caplog.at_level("INFO"):
        check_plan(settings, ModelHandler(settings))
    assert "tiny/wan22_i2v_svi: swap, bf16" in caplog.text


def test_start_fails_on_a_card_that_a_baked_profile_does_not_fit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_commands, "capability", lambda: (8, 9))
    small = replace(settings, vram_gib=14.0)
    with pytest.raises(CardUnfit, match="--plan"):
        check_plan(small, ModelHandler(small))


def test_start_without_a_card_plans_nothing(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        check_plan(replace(settings, vram_gib=1.0), ModelHandler(settings))
    assert "resident" not in caplog.text


def test_warm_up_says_why_nothing_can_be_compiled_here(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_ahead(settings, ModelHandler(settings)) == 1
    assert "WORKER_CACHE_DIR is not set" in capsys.readouterr().out
    bare = Settings(weights_dir=tmp_path)
    assert compile_ahead(bare, ModelHandler(bare)) == 1
    assert capsys.readouterr().out == "no video profile is baked where this worker looks\n"


def test_warm_up_on_damaged_weights_says_so(twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path(shutil.copytree(twins, tmp_path / "weights"))
    next((weights / "sdxl" / "unet").glob("*.safetensors")).write_bytes(b"")
    settings = Settings(weights_dir=weights)
    assert compile_ahead(settings, ModelHandler(settings)) == 1
    assert "cut short" in capsys.readouterr().out


def test_warm_up_on_the_command_line_takes_no_jobs(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_WEIGHTS_DIR", str(twins))
    monkeypatch.setattr(sys, "argv", ["handler.py", "--warm-up"])
    assert handler.main() == 1
