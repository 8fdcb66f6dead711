"""The parking lot: who is kept, who is dropped for whom, and that nothing half parked is ever brought back."""

import logging
from dataclasses import dataclass, field

import pytest

from engine.parking import MARGIN_BYTES, NotLocked, ParkingLot
from schemas.errors import GpuFault

GIB = 2**30


@dataclass
class Host:
    """A machine's memory, in GiB. The lot leaves a margin of it alone."""

    free_gib: float

    def free_bytes(self) -> int:
        return int(self.free_gib * GIB)


@dataclass
class Model:
    """A profile whose weights take the host's memory when they park and give it back when they are unloaded."""

    name: str
    size_gib: float
    host: Host
    is_whole: bool = True
    fault: Exception | None = None
    """Raised in the middle of the next way out or back, once."""
    held_gib: float = 0.0
    story: list[str] = field(default_factory=list)

    @property
    def weights(self) -> "Model":
        return self

    @property
    def needed_bytes(self) -> int:
        return int((self.size_gib - self.held_gib) * GIB)

    @property
    def held_bytes(self) -> int:
        return int(self.held_gib * GIB)

    def park(self) -> int:
        return self._go("park", self.size_gib - self.held_gib)

    def bring_back(self) -> int:
        return self._go("bring back", 0.0) or int(self.size_gib * GIB)

    def unload(self) -> None:
        self.story.append("unload")
        self.host.free_gib, self.held_gib = self.host.free_gib + self.held_gib, 0.0

    def _go(self, what: str, taken_gib: float) -> int:
        self.story.append(what)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.host.free_gib, self.held_gib = self.host.free_gib - taken_gib, self.held_gib + taken_gib
        return int(taken_gib * GIB)


MARGIN_GIB = MARGIN_BYTES / GIB


def lot_of(host: Host) -> ParkingLot[Model]:
    return ParkingLot(host.free_bytes)


def park(lot: ParkingLot[Model], *models: Model) -> list[bool]:
    return [lot.park(model.name, model) for model in models]


def test_what_is_parked_comes_back_and_is_counted() -> None:
    host = Host(20 + MARGIN_GIB)
    lot, model = lot_of(host), Model("a", 10, host)
    for _ in range(2):
        assert park(lot, model) == [True]
        assert "a" in lot
        assert lot.bring_back(lot.take("a"))
        assert "a" not in lot
    assert model.story == ["park", "bring back"] * 2
    assert (lot.parkings, lot.returns, lot.bytes_to_host, lot.bytes_to_card) == (2, 2, 10 * GIB, 20 * GIB)


def test_margin_is_left_to_the_rest_of_the_worker() -> None:
    host = Host(10 + MARGIN_GIB)
    assert park(lot_of(host), Model("a", 10, host)) == [True]
    assert host.free_gib == MARGIN_GIB
    host = Host(10 + MARGIN_GIB - 0.001)
    assert park(lot_of(host), Model("a", 10, host)) == [False]


def test_room_for_weights_is_what_the_margin_leaves() -> None:
    assert lot_of(Host(10 + MARGIN_GIB)).room_bytes() == 10 * GIB
    assert lot_of(Host(1)).room_bytes() < 0


def test_without_room_it_is_unloaded_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    host = Host(2)
    model = Model("a", 10, host)
    with caplog.at_level(logging.INFO):
        assert park(lot_of(host), model) == [False]
    assert model.story == ["unload"]
    assert caplog.messages == ["a is unloaded, not parked: host memory has no room for 10.00 GiB and a margin of 4 GiB"]


def test_those_parked_longest_are_dropped_for_the_next() -> None:
    host = Host(25 + MARGIN_GIB)
    lot = lot_of(host)
    first, second, third = (Model(name, 10, host) for name in "abc")
    assert park(lot, first, second, third) == [True, True, True]
    assert [name in lot for name in "abc"] == [False, True, True]
    assert [model.story for model in (first, second, third)] == [["park", "unload"], ["park"], ["park"]]


def test_nothing_is_dropped_where_that_would_not_make_room() -> None:
    host = Host(15 + MARGIN_GIB)
    lot = lot_of(host)
    small, large = Model("a", 10, host), Model("b", 16, host)
    assert park(lot, small, large) == [True, False]
    assert "a" in lot


def test_memory_that_somebody_else_will_need_is_left_free() -> None:
    host = Host(15 + MARGIN_GIB)
    lot, model = lot_of(host), Model("a", 10, host)
    assert not lot.park("a", model, 6 * GIB)
    assert lot.park("a", model, 5 * GIB)


def test_room_for_a_load_is_made_by_dropping_what_is_parked() -> None:
    host = Host(20 + MARGIN_GIB)
    lot = lot_of(host)
    park(lot, *(Model(name, 10, host) for name in "ab"))
    lot.make_room(0)
    assert ("a" in lot, "b" in lot) == (True, True)
    lot.make_room(8 * GIB)
    assert ("a" in lot, "b" in lot) == (False, True)
    lot.make_room(30 * GIB)  # not enough, and more than nothing
    assert "b" not in lot


def test_copy_that_is_there_already_needs_no_room() -> None:
    host = Host(10 + MARGIN_GIB)
    lot, model = lot_of(host), Model("a", 10, host)
    park(lot, model)
    lot.bring_back(lot.take("a"))
    host.free_gib = 0.0
    assert park(lot, model) == [True]


def test_weights_that_are_still_coming_are_not_waited_for() -> None:
    host = Host(50)
    model = Model("a", 10, host, is_whole=False)
    assert park(lot_of(host), model) == [False]
    assert model.story == ["unload"]


SURVIVED = [NotLocked("refused"), MemoryError(), RuntimeError("CUDA error: out of memory")]


@pytest.mark.parametrize("fault", SURVIVED, ids=lambda fault: type(fault).__name__)
def test_fault_on_the_way_out_unloads(fault: Exception) -> None:
    host = Host(50)
    model = Model("a", 10, host, fault=fault)
    lot = lot_of(host)
    assert park(lot, model) == [False]
    assert model.story == ["park", "unload"]
    assert ("a" in lot, lot.parkings, lot.bytes_to_host) == (False, 0, 0)


@pytest.mark.parametrize("fault", SURVIVED[1:], ids=lambda fault: type(fault).__name__)
def test_fault_on_the_way_back_unloads(fault: Exception) -> None:
    host = Host(50)
    model, lot = Model("a", 10, host), lot_of(host)
    park(lot, model)
    model.fault = fault
    assert not lot.bring_back(lot.take("a"))
    assert model.story == ["park", "bring back", "unload"]
    assert ("a" in lot, lot.returns, lot.bytes_to_card) == (False, 0, 0)
    assert host.free_gib == 50


@pytest.mark.parametrize("way", ["out", "back"])
def test_poisoned_card_is_not_touched_again(way: str) -> None:
    host = Host(50)
    model, lot = Model("a", 10, host), lot_of(host)
    poison = RuntimeError("CUDA error: an illegal memory access was encountered")
    if way == "out":
        model.fault = poison
        with pytest.raises(GpuFault):
            park(lot, model)
    else:
        park(lot, model)
        one, model.fault = lot.take("a"), poison
        with pytest.raises(GpuFault):
            lot.bring_back(one)
    assert "unload" not in model.story
    assert "a" not in lot


def test_clear_unloads_everyone() -> None:
    host = Host(50)
    lot, models = lot_of(host), [Model(name, 10, host) for name in "ab"]
    park(lot, *models)
    lot.clear()
    assert [model.story for model in models] == [["park", "unload"]] * 2
    assert host.free_gib == 50


def test_lot_asks_this_machine_unless_told_otherwise() -> None:
    host = Host(0)
    assert park(ParkingLot(), Model("a", 2.0**40, host)) == [False]
