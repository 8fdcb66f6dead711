"""The memoised encode: equal to the stock one to the last bit, in a known number of stage runs."""

import gc

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from engine import memo_encode
from engine.memo_encode import MemoEncoder

# Runs of each stage out of 21 at 81 frames: first convolution, 11 blocks, middle, head.
START_ONLY_RUNS = (3, 4, 5, 5, 6, 7, 7, 9, 11, 12, 16, 20, 21, 21)
START_END_RUNS = (4, 5, 6, 6, 7, 8, 8, 10, 12, 13, 17, 21, 21, 21)


def make_vae(base_dim: int) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKLWan:
    """The published architecture with 8 channels in the place of 96: every stage is there."""
    return make_vae(8)


def make_pixels(frames: int, side: int, start_frames: int = 1, end: bool = False, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(1, 3, frames, side, side)
    pixels[:, :, :start_frames] = torch.randn(1, 3, start_frames, side, side, generator=generator).clamp(-1, 1)
    if end:
        pixels[:, :, -1] = torch.randn(1, 3, side, side, generator=generator).clamp(-1, 1)
    return pixels


def moments(output) -> torch.Tensor:
    return output.latent_dist.parameters


@pytest.mark.parametrize(
    ("frames", "start_frames", "end"),
    [
        (1, 1, False),
        (5, 1, True),
        (13, 1, True),
        (81, 1, False),
        (81, 1, True),
        (81, 6, True),
        (21, 21, False),
    ],
)
def test_encode_equals_stock(tiny, frames, start_frames, end):
    pixels = make_pixels(frames, 32, start_frames, end)
    memo = MemoEncoder(tiny, verify=False)
    assert torch.equal(moments(memo.encode(pixels)), moments(tiny.encode(pixels)))
    assert memo.last is not None
    assert memo.last.reason == ""


def test_encode_of_the_full_architecture_equals_stock_at_start_and_end():
    vae = make_vae(96)
    pixels = make_pixels(81, 16, end=True)
    memo = MemoEncoder(vae, verify=False)
    with FlopCounterMode(display=False) as stock_count:
        stock = moments(vae.encode(pixels))
    with FlopCounterMode(display=False) as memo_count:
        memoised = moments(memo.encode(pixels))
    assert torch.equal(memoised, stock)
    assert memo.last is not None
    assert memo.last.stage_runs == START_END_RUNS
    assert stock_count.get_total_flops() / memo_count.get_total_flops() > 2.7


@pytest.mark.soak
def test_encode_of_the_full_architecture_equals_stock_at_start_only():
    vae = make_vae(96)
    pixels = make_pixels(81, 64)
    memo = MemoEncoder(vae, verify=False)
    assert torch.equal(moments(memo.encode(pixels)), moments(vae.encode(pixels)))
    assert memo.last is not None
    assert memo.last.stage_runs == START_ONLY_RUNS


@pytest.mark.parametrize(("end", "runs"), [(False, START_ONLY_RUNS), (True, START_END_RUNS)])
def test_stage_runs_follow_the_schedule(tiny, end, runs):
    memo = MemoEncoder(tiny, verify=False)
    memo.encode(make_pixels(81, 32, end=end))
    assert memo.last == memo_encode.Encoded(21, runs, "")


def test_film_without_a_still_runs_every_stage(tiny):
    memo = MemoEncoder(tiny, verify=False)
    memo.encode(make_pixels(21, 16, start_frames=21))
    assert memo.last is not None
    assert memo.last.stage_runs == (6,) * 14


def test_grey_picture_rests_sooner_and_teaches_nothing_to_the_next(tiny):
    memo = MemoEncoder(tiny, verify=False)
    memo.encode(torch.zeros(1, 3, 81, 16, 16))
    assert memo.last is not None
    assert memo.last.stage_runs == (3, 3, 4, 4, 5, 6, 6, 8, 10, 11, 15, 19, 21, 21)
    pixels = make_pixels(81, 16)
    assert torch.equal(moments(memo.encode(pixels)), moments(tiny.encode(pixels)))
    assert memo.last.stage_runs == START_ONLY_RUNS


def test_resting_without_comparing_the_kept_frames_would_be_wrong(tiny, monkeypatch):
    monkeypatch.setattr(memo_encode, "_same", lambda _before, _after: True)
    pixels = make_pixels(81, 16)
    assert not torch.equal(moments(MemoEncoder(tiny, verify=False).encode(pixels)), moments(tiny.encode(pixels)))


def test_only_a_stage_that_will_run_on_it_again_holds_its_input(tiny):
    """At full size a chunk is 613 MB. By the end of a still film all have settled but the last two, and of those the
    head gets a new chunk each time."""
    _, stages = memo_encode._encode(tiny, list(memo_encode._chunks(make_pixels(81, 16))))
    held = [stage.given.frames is not None for stage in stages]
    assert held == [False] * 12 + [True, False]


def test_film_without_a_still_holds_no_inputs_between_stages(tiny):
    pixels = make_pixels(13, 16, start_frames=13)
    _, stages = memo_encode._encode(tiny, list(memo_encode._chunks(pixels)))
    assert [stage.given.frames is not None for stage in stages] == [True] + [False] * 13  # the first: a view of pixels


def test_settled_output_is_let_go_when_another_chunk_comes(tiny):
    """Of a still film with an end picture: nothing that a stage made of the still outlives the end."""
    still = list(memo_encode._chunks(make_pixels(81, 16)))
    _, stages = memo_encode._encode(tiny, still)
    made = [stage.made for stage in stages]
    end = memo_encode.Chunk(torch.ones(1, 3, 4, 16, 16), comes_again=True)
    for stage in stages:
        end = stage(end)
    assert all(chunk.frames is None for chunk in made if chunk is not None)
    assert sum(chunk is not None for chunk in made) == 12


def test_stock_encode_that_verifies_runs_beside_no_kept_frames(tiny, monkeypatch):
    stages_alive = []
    stock = tiny.encode

    def encode(pixels):
        stages_alive.append(sum(isinstance(thing, memo_encode.Stage) for thing in gc.get_objects()))
        return stock(pixels)

    monkeypatch.setattr(tiny, "encode", encode)
    gc.collect()
    MemoEncoder(tiny).encode(make_pixels(21, 16))
    assert stages_alive == [0]


def test_kept_frames_tell_whether_any_of_them_changed():
    kept = memo_encode.Kept(2)
    kept[0], kept[1] = torch.zeros(2), torch.zeros(2)
    kept.has_changed = False
    kept[0] = torch.zeros(2)
    assert not kept.has_changed
    kept[1] = torch.ones(2)
    kept[0] = torch.zeros(2)
    assert kept.has_changed


def test_verify_compares_each_pattern_once(tiny, monkeypatch):
    stock_encodes = []
    stock = tiny.encode
    monkeypatch.setattr(tiny, "encode", lambda pixels: stock_encodes.append(1) or stock(pixels))
    memo = MemoEncoder(tiny)
    for seed in (1, 2, 3):
        memo.encode(make_pixels(21, 16, seed=seed))
    assert len(stock_encodes) == 1
    memo.encode(make_pixels(21, 16, end=True))
    assert len(stock_encodes) == 2
    assert memo.notes == []


def test_unequal_result_falls_back_to_stock_and_says_so(caplog):
    """A first convolution that adds a new offset every time it runs: what a nondeterministic card would
    do."""
    vae = make_vae(8)
    calls = iter(range(10_000))
    vae.encoder.conv_in.register_forward_hook(lambda _module, _inputs, out: out + next(calls))
    memo = MemoEncoder(vae)
    first = memo.encode(make_pixels(21, 16))
    assert memo.last == memo_encode.Encoded(6, (), "not equal to the stock encode")
    assert len(memo.notes) == 1
    assert [record.getMessage() for record in caplog.records] == memo.notes
    before = next(calls)
    memo.encode(make_pixels(21, 16, seed=2))
    assert next(calls) - before == 1 + 6  # six chunks through the stock encoder, none through the memoised one
    assert memo.last == memo_encode.Encoded(6, (), "its memoised encode was not equal before")
    assert first.latent_dist.mode().shape == (1, 16, 6, 2, 2)


def test_tiling_uses_the_stock_encoder_with_a_reason():
    vae = make_vae(8)
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=16,
                      tile_sample_stride_width=16)  # fmt: skip
    pixels = make_pixels(5, 48)
    memo = MemoEncoder(vae)
    assert torch.equal(moments(memo.encode(pixels)), moments(vae.encode(pixels)))
    assert memo.last == memo_encode.Encoded(2, (), "tiling is on")


def test_batch_uses_the_stock_encoder_with_a_reason(tiny):
    memo = MemoEncoder(tiny)
    memo.encode(make_pixels(5, 16).repeat(2, 1, 1, 1, 1))
    assert memo.last == memo_encode.Encoded(2, (), "more than one video at a time")


def test_encode_leaves_the_vae_as_it_was(tiny):
    tiny.clear_cache()
    before = {name: repr(value) for name, value in vars(tiny).items() if not name.startswith("_modules")}
    MemoEncoder(tiny, verify=False).encode(make_pixels(21, 16))
    assert {name: repr(value) for name, value in vars(tiny).items() if not name.startswith("_modules")} == before
