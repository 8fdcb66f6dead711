"""A placed profile leaves the card as one and comes back as one, in every plan; the CPU stands for the card."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from engine import passes, placing
from engine.arrival import Arrival
from engine.artefacts import Artefacts
from engine.card import Card
from engine.compiling import CompiledBlocks, graph_count
from engine.experts import RollingExperts
from engine.fast_decode import FastDecoder
from engine.loading import Loader
from engine.packing import layout
from engine.passes import TORCH, Passes
from engine.placing import Placed
from engine.profiles import PROFILES
from engine.progress import Progress
from engine.residency import GIB, plan
from engine.settings import Settings
from engine.umt5_passes import OnePassNorm
from engine.vae import decode_chunks
from engine.weights import locate
from tests.engine.disk import Disk, readers
from tests.engine.twin_models import EXPERTS, assert_equal, by_the_library, file_of, forward, tensors

CPU = Card("cpu", 2**40)
PLANS = [(None, "bf16"), (200.0, "bf16"), (44.5, "bf16"), (24.0, "bf16"), (44.5, "fp8")]


@pytest.fixture
def parts(twins: Path) -> Any:
    return locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=twins)).parts()


@pytest.fixture
def placed(parts: Any) -> Any:
    """Places the twin as a plan for a card of that size says; None: as on a CPU, without a plan."""
    all_: list[Placed] = []

    def act(card_gib: float | None, precision: str = "bf16") -> Placed:
        made = None if card_gib is None else plan(parts.profile, int(card_gib * GIB), precision=precision)
        loader = Loader(parts, precision, "cpu", Arrival("cpu", lanes=1, chunk_bytes=4096))
        all_.append(placing._placed(loader, made, CPU, EXPERTS))
        return all_[-1]

    yield act
    for each in all_:
        each.unload()
    assert readers() == []


@torch.inference_mode()
def job(made: Placed) -> list[torch.Tensor]:
    """All that a job asks of the models: both experts, the text encoder, an encode, a decode."""
    with made.attended(Progress()):
        with made.encoders["text_encoder"]() as encoder:
            out = [encoder(torch.tensor([[5, 9, 2, 1]])).last_hidden_state.clone()]
        for expert, then in (("high", "low"), ("low", "high")):
            with made.experts.use(expert, 1, then) as model:
                out.append(forward(model))
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand((1, 3, 5, 32, 32), generator=generator)
        out.append(made.vae.encode(pixels).latent_dist.mode())
        latents = torch.randn((1, made.vae.config.z_dim, 2, 4, 4), generator=generator)
        return [*out, *decode_chunks(made.decoder, latents)]


def is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("card_gib", "precision"), PLANS)
def test_job_after_a_return_is_the_job_before_it(
    card_gib: float | None, precision: str, placed: Callable[..., Placed], disk: Disk
) -> None:
    made = placed(card_gib, precision)
    expected = job(made)
    assert made.is_whole
    reads = len(disk.reads)
    for _ in range(2):
        made.park()
        made.bring_back()
        assert is_same(job(made), expected)
    assert len(disk.reads) == reads
    assert readers() == []


@pytest.mark.parametrize(("card_gib", "precision"), PLANS)
def test_parking_gives_back_all_that_is_on_the_card(
    card_gib: float | None, precision: str, placed: Callable[..., Placed]
) -> None:
    made = placed(card_gib, precision)
    job(made)
    for _ in range(2):
        on_card = [each for model in made.standing._modules for each in tensors(model).values()]
        if isinstance(made.experts, RollingExperts):
            on_card += made.experts._card
        if isinstance(made.decoder, FastDecoder):
            on_card += [made.decoder._last_gamma, *made.decoder._enter]
        storages = [StorageWeakRef(each.untyped_storage()) for each in on_card]
        del on_card
        made.park()
        assert all(storage.expired() for storage in storages)
        made.bring_back()
        job(made)


def test_what_stands_is_copied_and_what_swaps_or_visits_is_not(placed: Callable[..., Placed], twins: Path) -> None:
    sizes = {name: sum(piece.size_bytes for piece in layout(by_the_library(name, twins)))
             for name in ("vae", "text_encoder", "transformer")}  # fmt: skip
    everything = sizes["vae"] + sizes["text_encoder"] + 2 * sizes["transformer"]
    for card_gib, stands in ((200.0, everything), (24.0, sizes["vae"])):
        made = placed(card_gib)
        job(made)
        assert made.needed_bytes == stands
        moved = made.bytes_moved
        assert (made.park(), made.bring_back(), made.park(), made.bring_back()) == (stands, stands, 0, stands)
        assert made.bytes_moved == moved
        assert made.held_bytes == everything


def test_expert_that_is_used_while_it_is_parked_fails(placed: Callable[..., Placed]) -> None:
    made = placed(44.5)
    expected = job(made)
    made.park()
    with pytest.raises(IndexError), made.experts.use("high", 1) as model:
        forward(model)
    made.bring_back()
    assert is_same(job(made), expected)


@pytest.mark.parametrize("card_gib", [200.0, 44.5])
def test_compiled_blocks_of_both_experts_keep_their_one_graph(
    card_gib: float, placed: Callable[..., Placed], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = placed(card_gib)

    class Warm(Artefacts):
        def load(self) -> bool:
            return True

    is_rolling = isinstance(made.experts, RollingExperts)
    models = [made.experts.model] if is_rolling else list(made.experts._models.values())
    blocks = CompiledBlocks(models, Warm(tmp_path, "test"), backend="eager", patience_s=120.0)
    expected = job(made)
    eager = blocks.account.eager_forwards
    for _ in range(2):
        made.park()
        made.bring_back()
        assert is_same(job(made), expected)
    assert (graph_count(), blocks.notes, blocks.account.eager_forwards) == (1, [], eager)
    blocks.remove()


def test_weights_that_are_still_coming_are_not_whole(placed: Callable[..., Placed], disk: Disk, twins: Path) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.held = lambda path, _: path == low
    disk.gate.clear()
    for card_gib in (200.0, 44.5):
        made = placed(card_gib)
        with made.experts.use("high") as model:
            forward(model)
        assert not made.is_whole
    disk.gate.set()


@pytest.mark.parametrize("card_gib", [200.0, 44.5])
def test_fault_in_the_middle_of_a_return_leaves_only_unloading_and_a_load_anew_is_right(
    card_gib: float, placed: Callable[..., Placed], monkeypatch: pytest.MonkeyPatch, twins: Path
) -> None:
    made = placed(card_gib)
    expected = job(made)
    made.park()
    with monkeypatch.context() as patch:
        calls: list[int] = []
        empty_like = torch.empty_like

        def full(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(len(calls))
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return empty_like(*args, **kwargs)

        patch.setattr(torch, "empty_like", full)
        with pytest.raises(torch.OutOfMemoryError):
            made.bring_back()
    made.unload()
    assert {each.device.type for each in tensors(made.vae).values()} == {"meta"}
    again = placed(card_gib)
    assert is_same(job(again), expected)
    assert_equal(again.vae, by_the_library("vae", twins))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_text_encoder_has_passes_of_its_own_in_8_bits_alone(precision: str, placed: Callable[..., Placed]) -> None:
    with placed(200.0, precision).encoders["text_encoder"]() as encoder:
        assert any(isinstance(module, OnePassNorm) for module in encoder.modules()) is (precision == "fp8")


def test_passes_are_chosen_beside_the_forwards_and_not_by_the_load(
    placed: Callable[..., Placed], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, go, calls = replace(TORCH), threading.Event(), list[str]()

    def slow(device: str, _channels: set[int]) -> tuple[Passes, tuple[str, ...]]:
        calls.append(device)
        assert go.wait(10)
        return kernels, ()

    monkeypatch.setattr(passes, "choose", slow)
    made = placed(44.5, "fp8")
    assert calls == []
    with made.attended(Progress()):
        made.forwards_begin()
        threading.Timer(0.1, go.set).start()
    assert "passes" not in [thread.name for thread in threading.enumerate()]  # no thread outlives a job
    assert made.decoder.passes is kernels
    made.park()
    assert made.decoder is None
    made.bring_back()
    assert made.decoder.passes is kernels
    assert calls == ["cpu"]
