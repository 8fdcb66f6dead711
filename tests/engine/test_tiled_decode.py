"""Decoding in tiles: the shares add up, a local decoder is not changed at all, and Wan's own but for its attention."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from engine.fast_decode import FastDecoder
from engine.passes import TORCH
from engine.profiles import PROFILES
from engine.settings import Settings
from engine.tiled_decode import Tiling, _shares, decode_tiled, stepped, steps
from engine.vae import decode_chunks, decode_end_single
from engine.weights import locate
from schemas.errors import Cancelled

SMALL = Tiling(side=12, overlap=4)


def enlarge(latents: torch.Tensor) -> list[torch.Tensor]:
    """A decoder that looks at one latent at a time."""
    return [functional.interpolate(latents, scale_factor=8, mode="nearest")]


@pytest.mark.parametrize("tiling", [Tiling(), SMALL, Tiling(side=64, overlap=16)])
def test_tiles_cover_every_length_and_their_shares_add_up(tiling: Tiling) -> None:
    for length in range(2, 161):
        spans = tiling.spans(length)
        total = torch.zeros(8 * length)
        for i, (start, end) in enumerate(spans):
            assert end - start <= max(tiling.side, 2)
            total[8 * start : 8 * end] += _shares(spans, i, 8)
        torch.testing.assert_close(total, torch.ones(8 * length), rtol=0, atol=1e-6)


def test_480p_is_twelve_tiles_of_no_more_than_256_pixels() -> None:
    assert Tiling().spans(60) == [(0, 26), (17, 43), (34, 60)]
    assert Tiling().spans(104) == [(0, 32), (24, 56), (48, 80), (72, 104)]


def test_decoder_that_looks_at_one_latent_is_not_changed() -> None:
    latents = torch.randn(1, 16, 40, 27, generator=torch.Generator().manual_seed(0))
    (tiled,) = decode_tiled(enlarge, latents, SMALL)
    torch.testing.assert_close(tiled, enlarge(latents)[0], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def vae(twins):
    return locate(PROFILES["wan21_i2v_480p"], Settings(weights_dir=twins)).parts().load("vae")


@pytest.mark.parametrize("decode", [decode_chunks, decode_end_single])
@pytest.mark.parametrize("is_fast", [False, True])
@torch.inference_mode()
def test_wan_in_tiles_gives_the_same_chunks_within_four_levels_of_255(vae, decode, is_fast: bool) -> None:
    vae = FastDecoder(vae, torch.float32, TORCH) if is_fast else vae
    latents = torch.randn(1, 16, 3, 16, 26, generator=torch.Generator().manual_seed(0))
    whole = list(decode(vae, latents))
    tiled = list(decode_tiled(partial(decode, vae), latents, SMALL))
    assert [chunk.shape for chunk in tiled] == [chunk.shape for chunk in whole]
    difference = max((a - b).abs().max().item() for a, b in zip(tiled, whole, strict=True))
    assert 0 < difference < 4 / 127.5  # 2.8 levels seen: tiles see no further than their edge


@torch.inference_mode()
def test_without_mixing_seams_would_show(vae, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_it(spans: list, i: int, scale: int) -> torch.Tensor:
        return torch.ones(scale * (spans[i][1] - spans[i][0]))

    monkeypatch.setattr("engine.tiled_decode._shares", all_of_it)
    latents = torch.randn(1, 16, 1, 16, 26, generator=torch.Generator().manual_seed(0))
    (whole,) = decode_chunks(vae, latents)
    (tiled,) = decode_tiled(partial(decode_chunks, vae), latents, SMALL)
    assert (tiled - whole).abs().max() > 0.1


@torch.inference_mode()
def test_no_tile_is_larger_than_the_memory_it_is_for(vae) -> None:
    seen = []

    def decode(tile: torch.Tensor):
        seen.append(tuple(tile.shape[-2:]))
        return decode_chunks(vae, tile)

    list(decode_tiled(decode, torch.zeros(1, 16, 1, 40, 40)))
    assert len(seen) == 4
    assert max(max(sides) for sides in seen) <= 32


@pytest.mark.parametrize("in_tiles", [False, True])
@torch.inference_mode()
def test_each_chunk_that_was_computed_is_a_step(vae, in_tiles: bool) -> None:
    latents, done = torch.zeros(1, 16, 3, 40, 27), []
    chunks = stepped(partial(decode_chunks, vae), latents, in_tiles, lambda: done.append(1))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    assert len(done) == steps(latents, in_tiles) == (6 if in_tiles else 3)


def test_step_that_raises_ends_the_tiles_before_the_first_chunk_is_handed_out() -> None:
    """A cancel, long before any frame of a clip in tiles is there."""
    decoded = []

    def cancel() -> None:
        raise Cancelled("the job was cancelled")

    def decode(tile: torch.Tensor) -> list[torch.Tensor]:
        decoded.append(1)
        return enlarge(tile)

    with pytest.raises(Cancelled):
        next(stepped(decode, torch.zeros(1, 16, 1, 60, 104), True, cancel))
    assert len(decoded) == 1
