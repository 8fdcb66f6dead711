"""Rolling experts on a card that copies as late as it may: a block never runs on bytes that have not come.

The card is played. What is given to the copying stream happens only when the computing one waits for it, or when
somebody waits for the whole card; and each copy must have been told to wait for all work that was given before it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from engine.experts import RollingExperts
from engine.packing import HostCopy
from tests.engine.test_experts import forward, is_job, run_job
from tests.engine.tiny_wan import make_wan

LAYERS = 4


class LateCopies:
    """The copying stream."""

    device = "cuda:0"

    def __init__(self, compute: "Compute") -> None:
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self._compute = compute
        self._after: object = None

    def wait_event(self, event: object) -> None:
        self._after = event

    def record_event(self) -> int:
        """As an event: how many copies come before it."""
        return len(self.queue)

    def put(self, one: Callable[[], None]) -> None:
        assert self._after is self._compute.latest, "a copy that does not wait for the work before it"
        self._compute.latest = None
        self.queue.append(one)

    def run(self, count: int) -> None:
        while self.done < count:
            self.queue[self.done]()
            self.done += 1


class Compute:
    """The computing stream; the CPU does its work at once."""

    def __init__(self) -> None:
        self.copies = LateCopies(self)
        self.latest: object = None
        """The event recorded last, until a copy has taken it."""

    def record_event(self) -> object:
        self.latest = object()
        return self.latest

    def wait_event(self, event: int) -> None:
        self.copies.run(event)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"high": make_wan(0, LAYERS), "low": make_wan(1, LAYERS)}


@pytest.fixture(scope="module")
def expected(models: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: forward(model) for name, model in models.items()}


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Compute:
    made = Compute()

    @contextmanager
    def on_stream(stream: LateCopies) -> Iterator[None]:
        assert stream is made.copies
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: made.copies.run(len(made.copies.queue)))
    return made


@pytest.fixture
def rolling(models: dict[str, Any], compute: Compute, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RollingExperts]:
    def act(slots: int | None = None) -> RollingExperts:
        experts = RollingExperts(copy.deepcopy(models), "cpu", slots)
        now = experts._copy
        monkeypatch.setattr(experts, "_copy", lambda name, i: compute.copies.put(partial(now, name, i)))
        monkeypatch.setattr(experts, "_stream", compute.copies)
        return experts

    return act


@pytest.mark.parametrize("slots", [None, 1, 2, 3])
@pytest.mark.parametrize("hinted", [True, False])
def test_every_block_waits_for_its_own_copy(
    rolling: Callable[..., RollingExperts], expected: dict[str, torch.Tensor], slots: int | None, hinted: bool
) -> None:
    experts = rolling(slots)
    for _ in range(2):
        assert is_job(run_job(experts, hinted=hinted), expected)


def test_copies_are_late_enough_to_show_a_block_that_does_not_wait(
    rolling: Callable[..., RollingExperts],
    expected: dict[str, torch.Tensor],
    compute: Compute,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = rolling()
    run_job(experts)
    monkeypatch.setattr(compute, "wait_event", lambda _: None)
    assert not is_job(run_job(experts), expected)


def test_copy_that_would_not_wait_for_the_last_reader_of_its_bytes_is_found_out(
    rolling: Callable[..., RollingExperts], compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = rolling()
    monkeypatch.setattr(compute.copies, "wait_event", lambda _: None)
    with pytest.raises(AssertionError, match="does not wait"):
        run_job(experts)


@pytest.mark.parametrize("slots", [None, 2])
def test_job_that_fails_with_copies_under_way_leaves_the_next_one_right(
    rolling: Callable[..., RollingExperts], expected: dict[str, torch.Tensor], slots: int | None
) -> None:
    experts = rolling(slots)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), experts.use("high", 1, "low") as model, ExitStack() as stack:
        stack.callback(model.blocks[2].register_forward_pre_hook(full).remove)
        forward(model)
    assert is_job(run_job(experts), expected)


def test_parking_waits_for_the_copies_that_are_under_way(
    rolling: Callable[..., RollingExperts], expected: dict[str, torch.Tensor], compute: Compute
) -> None:
    experts = rolling()
    run_job(experts)
    assert compute.copies.done < len(compute.copies.queue)  # the first expert is coming in again
    experts.park()
    assert compute.copies.done == len(compute.copies.queue)
    experts.bring_back()
    assert is_job(run_job(experts), expected)


def test_unloading_waits_for_the_copies_before_their_source_goes(
    rolling: Callable[..., RollingExperts], compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, left = rolling(), list[int]()
    run_job(experts)
    monkeypatch.setattr(HostCopy, "release", lambda _: left.append(len(compute.copies.queue) - compute.copies.done))
    experts.unload()
    assert left == [0, 0]
