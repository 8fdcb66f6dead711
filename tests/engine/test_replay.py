"""A replayed forward gives what the forward gives, and leaves nothing behind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import profiles, weights
from engine.backends.sdxl import Sdxl
from engine.card import Card, Levers
from engine.progress import Progress
from engine.replay import record_graph, replayed
from engine.settings import Settings
from schemas.errors import Cancelled
from tests.engine.backends.test_sdxl import SMALL, task


class Unet(nn.Module):
    """Called as the pipelines call theirs; counts the forwards that Python ran."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        self.forwards += 1
        assert added_cond_kwargs is not None
        assert not return_dict
        return (sample * timestep + encoder_hidden_states.sum() + added_cond_kwargs["time_ids"].sum(),)


class Again:
    """Stands for a CUDA graph on a CPU: what was recorded computes again, from the same places to the same place."""

    resets = 0

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.result = run().clone()

    def replay(self) -> None:
        self.result.copy_(self._run())

    def reset(self) -> None:
        Again.resets += 1


def record(run: Callable[[], Tensor]) -> tuple[Again, Tensor]:
    again = Again(run)
    again.result.fill_(float("nan"))  # recording computes nothing
    return again, again.result


def inputs(seed: int, side: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, side, side, generator=generator),
        "timestep": torch.tensor(float(seed)),
        "encoder_hidden_states": torch.randn(2, 7, 8, generator=generator),
        "added_cond_kwargs": {"time_ids": torch.randn(2, 6, generator=generator)},
    }


def call(unet: nn.Module, given: dict[str, Any], **more: Any) -> Tensor:
    """As diffusers calls it: two by position, the rest by name."""
    named = {name: value for name, value in given.items() if name not in ("sample", "timestep")}
    (out,) = unet(given["sample"], given["timestep"], **named, timestep_cond=None, return_dict=False, **more)
    return out


def expected(seed: int, **size: int) -> Tensor:
    return call(Unet(), inputs(seed, **size))


def test_every_forward_is_equal_and_all_but_the_first_are_replays() -> None:
    unet = Unet()
    with replayed(unet, record) as replay:
        made = [call(unet, inputs(seed)) for seed in range(5)]
    assert all(torch.equal(one, expected(seed)) for seed, one in enumerate(made))
    assert replay.replays == 4


def test_result_of_one_forward_is_not_overwritten_by_the_next() -> None:
    unet = Unet()
    with replayed(unet, record):
        call(unet, inputs(0))
        second = call(unet, inputs(1))
        call(unet, inputs(2))
    assert torch.equal(second, expected(1))


def test_caller_may_reuse_its_own_tensors() -> None:
    unet, given = Unet(), inputs(0)
    with replayed(unet, record):
        for _ in range(3):
            call(unet, given)
        given["sample"].zero_()
        assert torch.equal(call(unet, given), call(Unet(), given))


def test_another_shape_runs_as_ever_and_the_first_goes_on_replaying() -> None:
    unet = Unet()
    with replayed(unet, record) as replay:
        made = [call(unet, inputs(seed, side)) for seed, side in enumerate((4, 4, 2, 4))]
    assert all(torch.equal(made[seed], expected(seed, side=side)) for seed, side in enumerate((4, 4, 2, 4)))
    assert replay.replays == 2


def test_recording_that_fails_is_given_up_for_the_job_and_said(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def fail(_: Callable[[], Tensor]) -> Any:
        tries.append(1)
        raise torch.OutOfMemoryError("no room\nfor it")

    unet = Unet()
    with replayed(unet, fail) as replay:
        made = [call(unet, inputs(seed)) for seed in range(4)]
    assert all(torch.equal(one, expected(seed)) for seed, one in enumerate(made))
    assert (len(tries), replay.replays, unet.forwards) == (1, 0, 4)
    assert [line.getMessage() for line in caplog.records] == ["forwards are not replayed in this job: no room for it"]


def test_job_goes_on_where_the_inputs_have_no_room_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    unet = Unet()
    with replayed(unet, record) as replay:
        call(unet, inputs(0))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "to", no_room)
            second = call(unet, inputs(1))
        third = call(unet, inputs(2))
    assert torch.equal(second, expected(1))
    assert torch.equal(third, expected(2))
    assert replay.replays == 0


def test_nothing_is_left_after_the_block_also_when_the_job_is_cancelled() -> None:
    unet, before = Unet(), Again.resets
    with pytest.raises(Cancelled), replayed(unet, record) as replay:
        for seed in range(3):
            call(unet, inputs(seed))
        raise Cancelled("the job was cancelled")
    assert Again.resets == before + 1
    assert (replay._recording, replay._result, replay._inputs) == (None, None, {})
    assert "forward" not in vars(unet)
    assert torch.equal(call(unet, inputs(9)), expected(9))


def test_what_could_not_be_replayed_is_refused() -> None:
    with replayed(Unet(), record) as replay, pytest.raises(ValueError, match="none of cross_attention_kwargs"):
        given = inputs(0)
        replay(**given, return_dict=False, cross_attention_kwargs={"scale": 0.5})
    with replayed(Unet(), record) as replay, pytest.raises(ValueError, match="no return_dict"):
        replay(**inputs(0), return_dict=True)


def test_sdxl_job_with_replays_makes_the_same_picture(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through diffusers' pipelines: they call the UNet in no other way than Replay knows."""
    baked = weights.locate(profiles.PROFILES["sdxl"], Settings(weights_dir=twins))
    sdxl = Sdxl(baked.profile, baked.parts(), Card("cpu", 0))
    (plain,) = sdxl.generate(task(sdxl, SMALL), Progress()).pictures
    counts: list[int] = []

    @contextmanager
    def counted(unet: nn.Module) -> Iterator[None]:
        with replayed(unet, record) as replay:
            yield
        counts.append(replay.replays)

    monkeypatch.setattr("engine.backends.sdxl.replayed", counted)
    monkeypatch.setattr(sdxl, "_replays", True)
    (fast,) = sdxl.generate(task(sdxl, SMALL), Progress()).pictures
    assert np.array_equal(plain, fast)
    assert counts == [3, 2]  # of 4 base and 3 refiner steps


@pytest.mark.parametrize("levers", [Levers(), Levers(compile=False)])
def test_sdxl_never_replays_without_a_card(twins: Any, levers: Levers) -> None:
    baked = weights.locate(profiles.PROFILES["sdxl"], Settings(weights_dir=twins))
    sdxl = Sdxl(baked.profile, baked.parts(), Card("cpu", 0, levers=levers))
    sdxl.generate(task(sdxl, SMALL), Progress())
    assert sdxl._replays is False


@pytest.mark.gpu
def test_card_replays_a_unet_to_the_bit_and_gets_its_memory_back(twins: Any) -> None:
    parts = weights.locate(profiles.PROFILES["sdxl"], Settings(weights_dir=twins)).parts()
    unet = parts.load("unet", "cuda")
    width = unet.config.cross_attention_dim

    def given(seed: int) -> dict[str, Any]:
        generator = torch.Generator("cuda").manual_seed(seed)
        draw = {"generator": generator, "device": "cuda", "dtype": unet.dtype}
        return {
            "sample": torch.randn(2, 4, 16, 16, **draw),
            "timestep": torch.tensor(900 - 10 * seed, device="cuda"),
            "encoder_hidden_states": torch.randn(2, 77, width, **draw),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(2, 16, **draw),
                "time_ids": torch.randn(2, 6, **draw),
            },
        }

    with torch.inference_mode():
        stock = [call(unet, given(seed)) for seed in range(6)]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        with replayed(unet) as replay:
            made = [call(unet, given(seed)) for seed in range(6)]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    assert replay.replays == 5
    assert all(torch.equal(one, other) for one, other in zip(made, stock, strict=True))
    assert torch.cuda.memory_reserved() <= before + 2**22


@pytest.mark.gpu
def test_card_goes_on_after_a_recording_that_failed() -> None:
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        record_graph(lambda: torch.ones(3, device="cuda") * torch.ones(3, device="cuda").sum().item())
    assert torch.cuda.current_stream() == stream
    assert torch.ones(3, device="cuda").sum().item() == 3.0
