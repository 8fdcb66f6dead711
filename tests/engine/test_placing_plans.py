"""Every plan's way of holding a profile runs on weights that are still coming; the CPU stands for the card."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import placing
from engine.arrival import Arrival
from engine.card import Card
from engine.experts import RollingExperts
from engine.loading import Loader
from engine.placing import Placed
from engine.profiles import PROFILES
from engine.progress import Progress
from engine.residency import GIB, plan
from engine.settings import Settings
from engine.weights import locate
from schemas.errors import RequestTooLarge, WeightsCorrupt
from tests.engine.disk import Disk, readers
from tests.engine.twin_models import EXPERTS, assert_equal, by_the_library, file_of, forward

CPU = Card("cpu", 2**40)


@pytest.fixture
def parts(twins: Path) -> Any:
    return locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=twins)).parts()


def by_plan(parts: Any, card_gib: float) -> Placed:
    """Placed as a plan for a card of that size says, with the CPU as the card."""
    made = plan(parts.profile, int(card_gib * GIB), precision="bf16")
    arrival = Arrival("cpu", lanes=1, chunk_bytes=4096)
    return placing._placed(Loader(parts, "bf16", "cpu", arrival), made, CPU, EXPERTS)


@pytest.mark.parametrize(("card_gib", "kind"), [(200.0, "resident"), (44.5, "swap"), (24.0, "stream")])
def test_every_plan_runs_on_weights_that_are_still_coming(
    card_gib: float, kind: str, parts: Any, twins: Path, disk: Disk
) -> None:
    made = by_plan(parts, card_gib)
    assert made.plan is not None
    assert made.plan.kind == kind
    with made.attended(Progress()):
        for expert, name, then in (("high", "transformer", "low"), ("low", "transformer_2", "high")) * 2:
            with made.experts.use(expert, 2, then) as model:
                wanted = forward(by_the_library(name, twins))
                assert torch.equal(forward(model), wanted)
                assert torch.equal(forward(model), wanted)
        with made.encoders["text_encoder"]() as encoder:
            assert_equal(encoder, by_the_library("text_encoder", twins))
    assert readers() == []
    assert len({(path, offset) for path, offset, _ in disk.reads}) == len(disk.reads)
    made.unload()


def test_host_without_room_is_refused_before_anything_is_read(
    parts: Any, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    card = Card("cuda", int(44.5 * GIB), host_bytes=50 * GIB)
    with pytest.raises(RequestTooLarge, match=r"63\.9 GiB of host memory"):
        placing.place(parts.profile, parts, card, EXPERTS)
    assert disk.reads == []


@pytest.mark.parametrize("card_gib", [44.5, 24.0])
def test_swapping_expert_runs_while_the_other_is_not_there(
    card_gib: float, parts: Any, twins: Path, disk: Disk
) -> None:
    """The hint that the low expert comes next must not wait for it inside the high one's forward."""
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.held = lambda path, _: path == low
    disk.gate.clear()
    made = by_plan(parts, card_gib)
    with made.experts.use("high", 1, "low") as model:
        assert torch.equal(forward(model), forward(by_the_library("transformer", twins)))
    disk.gate.set()
    with made.experts.use("low", 1, "high") as model:
        assert torch.equal(forward(model), forward(by_the_library("transformer_2", twins)))
    made.unload()


def test_swap_of_weights_that_came_later_moves_no_more_than_usual(parts: Any) -> None:
    made, moved = by_plan(parts, 44.5), []
    rolling = made.experts
    assert isinstance(rolling, RollingExperts)
    for _ in range(3):
        before = rolling.bytes_moved
        for expert, then in (("high", "low"), ("low", "high")):
            with rolling.use(expert, 1, then) as model:
                forward(model)
        moved.append(rolling.bytes_moved - before)
    expert_bytes = sum(piece.size_bytes for piece in rolling._pieces)
    assert moved[1:] == [2 * expert_bytes] * 2
    made.unload()


def test_failure_in_the_middle_of_a_swapping_expert_leaves_the_next_job_right(
    parts: Any, twins: Path, disk: Disk
) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.fails = lambda path, offset: path == low and offset > 40_000
    made = by_plan(parts, 44.5)
    with pytest.raises(WeightsCorrupt), made.experts.use("low", 1, "high") as model:
        forward(model)
    disk.fails = lambda *_: False
    for expert, name in EXPERTS.items():
        with made.experts.use(expert, 1) as model:
            assert torch.equal(forward(model), forward(by_the_library(name, twins)))
    made.unload()


def test_visitor_waits_for_its_weights(parts: Any, twins: Path, disk: Disk) -> None:
    text = file_of(twins, "shared/umt5_xxl")
    disk.held = lambda path, _: path == text
    disk.gate.clear()
    made = by_plan(parts, 44.5)
    threading.Timer(0.2, disk.gate.set).start()
    with made.encoders["text_encoder"]() as encoder:
        assert_equal(encoder, by_the_library("text_encoder", twins))
    made.unload()
