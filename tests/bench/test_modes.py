"""The bench of changing modes, at the twins' size: what it counts, and that it notices what must not be."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import modes
from bench.modes import Visit, line, wrong
from engine import mp4


class ChangingCrf:
    """Makes x264 give other bytes for the same frames."""

    crf = 18

    def __str__(self) -> str:
        self.crf += 1
        return str(self.crf)


def test_modes_take_turns_and_come_back(twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4, "CRF", ChangingCrf())
    told = tmp_path / "modes.json"
    asked = ["--small", "--rounds", "2", "--precision", "bf16", "--twins", str(twins), "--json", str(told)]
    monkeypatch.setattr(sys, "argv", ["bench.modes", *asked])
    assert modes.main() == 0
    visits = [Visit(**each) for each in json.loads(told.read_text())["visits"]]
    assert [(visit.mode, visit.is_return) for visit in visits] == [
        ("svi_endframe", False), ("image", False), ("svi_endframe", True), ("image", True),
    ]  # fmt: skip
    first, second, third, fourth = visits
    assert (first.to_host_gb, first.to_card_gb) == (0.0, 0.0)
    assert second.to_host_gb == third.to_card_gb > 0  # the video model goes out, and comes back
    assert third.to_host_gb == fourth.to_card_gb > 0
    assert fourth.to_host_gb == 0.0  # its copy is there already


SVI = Visit("svi_endframe", 0, False, 20.0, 15.0, 0.0, 0.0, 0.0, 0.0, 36_000.0, "a")
BACK = replace(SVI, round=1, is_return=True, load_s=1.0, make_room_s=0.25, to_card_s=0.5, to_card_gb=25.0)


def test_line_says_how_fast_it_came_back() -> None:
    assert line(BACK) == (
        "round 1 svi_endframe  load 1.00 s: room made in 0.25 s (0.00 GB to the host), "
        "back: 25.00 GB in 0.50 s, 50.0 GB/s; job 20.00 s; 36000 MiB after it"
    )


def test_visits_as_they_should_be_are_not_wrong() -> None:
    assert wrong([SVI, BACK], 64.0) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"is_return": False}, "svi_endframe in round 1: was loaded again"),
        ({"card_mib": 36_065.0}, "svi_endframe in round 1: 36065 MiB on the card, 36000 the first time"),
        ({"sha256": "b"}, "svi_endframe in round 1: other pixels than the first time"),
    ],
)
def test_visit_that_should_not_be_is_said(changes: dict[str, object], problem: str) -> None:
    assert wrong([SVI, replace(BACK, **changes)], 0.0) == [problem]


def test_memory_that_stays_behind_is_said() -> None:
    assert wrong([SVI, BACK], 65.0) == ["65 MiB are left on the card with both parked"]


def test_mode_without_a_short_form_is_refused_before_anything_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        modes._arguments().parse_args(["--modes", "lightning", "image"])
    assert "invalid choice: 'lightning'" in capsys.readouterr().err


def test_visits_are_kept_as_they_come(twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(modes, "keep", lambda _, found: kept.append((len(found["visits"]), found["problems"])))
    monkeypatch.setattr(modes.Turns, "visit", lambda *_: SVI)
    monkeypatch.setattr(sys, "argv", ["bench.modes", "--small", "--rounds", "1", "--twins", str(twins)])
    modes.main()
    assert [visits for visits, _ in kept] == [1, 2, 2]
    assert kept[0][1] == ["cut short"]
