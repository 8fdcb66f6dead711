"""The rearranged decoder: the stock decoder's function, whatever the chunk, with nothing kept between videos."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional

from engine import fast_decode
from engine.card import Card, Levers
from engine.fast_decode import CausalConv, FastDecoder, Past, StackedConv, channels
from engine.passes import TORCH
from engine.placing import _bf16_decoder
from engine.vae import decode_chunks, decode_end_single, denormalise
from tests.engine.svi_parts import noise, tiny_vae

# fp32, values in [-1, 1]: the bias is added after the sum instead of within, and sums are cut differently.
ROUNDING = 1e-5


def make_vae(base_dim: int) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def narrow() -> AutoencoderKLWan:
    """The published architecture with 8 channels in the place of 96: every stage is there."""
    return make_vae(8)


@pytest.fixture(scope="module")
def full() -> AutoencoderKLWan:
    return make_vae(96)


def decoded(decoder: FastDecoder, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decode_chunks(decoder, latents)), dim=2)


def psnr_db(wanted: torch.Tensor, made: torch.Tensor) -> float:
    return float(10 * torch.log10(4.0 / (wanted - made.float()).square().mean()))  # 2 from black to white


@pytest.mark.parametrize("latents_a_chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("latent_frames", [1, 2, 3, 6])
def test_decode_equals_stock_but_for_rounding(narrow, latent_frames, latents_a_chunk):
    latents = noise(latent_frames, height=3, width=5)
    decoder = FastDecoder(narrow, torch.float32, latents_a_chunk=latents_a_chunk)

    stock = narrow.decode(denormalise(narrow, latents)).sample

    assert (decoded(decoder, latents) - stock).abs().max() < ROUNDING
    assert stock.abs().max() > 0.1


def test_decode_of_the_full_architecture_equals_stock_but_for_rounding(full):
    latents = noise(4, height=2, width=2)
    stock = full.decode(denormalise(full, latents)).sample
    assert (decoded(FastDecoder(full, torch.float32, latents_a_chunk=2), latents) - stock).abs().max() < ROUNDING


def test_decode_of_a_twin_of_81_latent_frames_equals_stock_but_for_rounding():
    vae = tiny_vae()
    latents = noise(81, height=1, width=2)
    made = decoded(FastDecoder(vae, torch.float32), latents)
    assert made.shape == (1, 3, 321, 8, 16)
    assert (made - vae.decode(denormalise(vae, latents)).sample).abs().max() < ROUNDING


def test_bf16_decode_of_the_full_architecture_is_over_45_db_from_stock_fp32(full):
    latents = noise(2, height=2, width=2)
    stock = full.decode(denormalise(full, latents)).sample
    made = decoded(FastDecoder(full, torch.bfloat16), latents)
    assert made.dtype == torch.bfloat16
    assert 0.2 < stock.std() < 0.5  # as of a picture
    assert psnr_db(stock, made) > 45.0


@pytest.mark.parametrize(("latent_frames", "sizes"), [(1, [1]), (2, [1, 4]), (6, [1, 4, 4, 4, 4, 4])])
@pytest.mark.parametrize("latents_a_chunk", [1, 2, 4])
def test_decode_yields_a_latent_frame_at_a_time_whatever_it_computes_at_a_time(
    narrow, latent_frames, sizes, latents_a_chunk
):
    decoder = FastDecoder(narrow, torch.float32, latents_a_chunk=latents_a_chunk)
    chunks = list(decode_chunks(decoder, noise(latent_frames)))
    assert [chunk.shape[2] for chunk in chunks] == sizes


def test_end_single_decode_starts_the_last_latent_frame_anew(narrow):
    latents = noise(4)
    decoder = FastDecoder(narrow, torch.float32)
    made = torch.cat(list(decode_end_single(decoder, latents)), dim=2)
    stock = torch.cat(list(decode_end_single(narrow, latents)), dim=2)
    assert made.shape == stock.shape
    assert (made - stock).abs().max() < ROUNDING


def test_first_latent_frame_with_doubled_frames_would_be_wrong(narrow):
    """Were the first chunk run as the later ones, it would come out four frames long."""
    decoder = FastDecoder(narrow, torch.float32)
    latents = functional.linear(noise(1)[0].permute(1, 2, 3, 0), *decoder._enter)
    assert decoder._frames(latents, Past()).shape[2] == 1
    assert decoder._frames(latents, Past(has_begun=True)).shape[2] == 4


def test_chunks_without_what_was_kept_would_be_wrong(narrow, monkeypatch):
    latents = noise(5)
    right = decoded(FastDecoder(narrow, torch.float32), latents)
    monkeypatch.setattr(Past, "kept", lambda _past, _conv, x: x.new_zeros(2, *x.shape[1:]))
    assert (decoded(FastDecoder(narrow, torch.float32), latents) - right).abs().max() > 0.01


def test_two_videos_decoded_in_turns_do_not_touch_each_other(narrow):
    decoder = FastDecoder(narrow, torch.float32)
    latents = [noise(5, seed=1), noise(5, seed=2)]
    alone = [decoded(decoder, one) for one in latents]
    turns = list(zip(*(decode_chunks(decoder, one) for one in latents), strict=True))
    for wanted, chunks in zip(alone, zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(chunks, dim=2), wanted)


def test_decode_left_in_the_middle_leaves_nothing_behind(narrow):
    decoder = FastDecoder(narrow, torch.float32)
    wanted = decoded(decoder, noise(5))
    before = {name: id(value) for name, value in vars(decoder).items()}

    left = decode_chunks(decoder, noise(5, seed=1))
    next(left)
    next(left)
    left.close()

    assert {name: id(value) for name, value in vars(decoder).items()} == before
    assert torch.equal(decoded(decoder, noise(5)), wanted)


def test_decoder_has_weights_of_its_own():
    vae = make_vae(8)
    decoder = FastDecoder(vae, torch.float32)
    wanted = decoded(decoder, noise(2))
    for parameter in vae.parameters():
        parameter.zero_()
    assert torch.equal(decoded(decoder, noise(2)), wanted)


def test_making_a_bf16_decoder_leaves_the_vae_in_fp32(narrow):
    FastDecoder(narrow, torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}


def watch_layouts(monkeypatch, name: str, memory_format: torch.memory_format) -> list[tuple[bool, ...]]:
    """Whether input, weight and output of each call of a convolution lie channels last, from now on."""
    seen = []
    convolve = getattr(functional, name)

    def watched(x, weight, *args, **kwargs):
        out = convolve(x, weight, *args, **kwargs)
        seen.append(tuple(one.is_contiguous(memory_format=memory_format) for one in (x, weight, out)))
        return out

    monkeypatch.setattr(functional, name, watched)
    return seen


def test_every_convolution_over_frames_is_given_channels_last(narrow, monkeypatch):
    """What it writes is the library's choice: a CPU's writes channels first."""
    monkeypatch.setattr(fast_decode, "MOST_STACKED_CHANNELS", 0)
    seen = watch_layouts(monkeypatch, "conv3d", torch.channels_last_3d)
    decoded(FastDecoder(narrow, torch.float32, latents_a_chunk=1), noise(3, height=3, width=5))
    assert len(seen) == 30 + 32 + 32  # the first chunk leaves the two out that double the frames
    assert {layouts[:2] for layouts in seen} == {(True, True)}


def test_every_convolution_over_a_frame_is_given_channels_last(narrow, monkeypatch):
    seen = watch_layouts(monkeypatch, "conv2d", torch.channels_last)
    decoded(FastDecoder(narrow, torch.float32, latents_a_chunk=1), noise(3, height=3, width=5))
    assert [layouts[:2] for layouts in seen] == [(True, True)] * (9 + 3 * 27)  # upsampling, and stacked frames


def test_frames_stacked_in_channels_give_what_a_convolution_over_frames_gives(narrow, monkeypatch):
    latents = noise(4, height=3, width=5)
    stacked = decoded(FastDecoder(narrow, torch.float32), latents)
    monkeypatch.setattr(fast_decode, "MOST_STACKED_CHANNELS", 0)
    assert torch.allclose(stacked, decoded(FastDecoder(narrow, torch.float32), latents), atol=1e-5)


def test_frames_stacked_in_another_order_would_be_wrong(narrow):
    latents = noise(4, height=3, width=5)
    right = decoded(FastDecoder(narrow, torch.float32), latents)

    def turned(x: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, *places: torch.Tensor) -> None:
        TORCH.norm_silu(x, bias, gamma, *places)
        room = places[-1].unflatten(-1, (-1, x.shape[-1]))
        room.copy_(room.flip(-2))

    made = decoded(FastDecoder(narrow, torch.float32, replace(TORCH, norm_silu=turned)), latents)
    assert not torch.allclose(right, made, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latents_a_chunk", [1, 2, 3])
def test_frames_written_to_their_places_give_the_bits_of_frames_put_together(
    narrow, monkeypatch, dtype, latents_a_chunk
):
    latents = noise(4, height=3, width=5)
    made = decoded(FastDecoder(narrow, dtype, latents_a_chunk=latents_a_chunk), latents)

    class PutTogether(StackedConv):
        room = CausalConv.room

        def __call__(self, room: torch.Tensor, *, add_bias: bool) -> torch.Tensor:
            f = room.shape[0] - 2
            return super().__call__(torch.cat([room[i : i + f] for i in range(3)], dim=-1), add_bias=add_bias)

    monkeypatch.setattr(fast_decode, "StackedConv", PutTogether)
    assert torch.equal(made, decoded(FastDecoder(narrow, dtype, latents_a_chunk=latents_a_chunk), latents))


@pytest.fixture
def new_objects_alone() -> Iterator[None]:
    """`gc.get_objects` leaves out what is there already, weights among it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_alone")
def test_as_much_is_alive_around_a_stacked_convolution_as_the_estimate_says(narrow, monkeypatch):
    """Counted where a convolution or a norm begins; what a convolution will make is added."""
    counts = []
    last = 8 * 64 * 64 * 8 * 4  # bytes of the last activation: frames, height, width, channels

    def count(made: int) -> None:
        storages = [one.untyped_storage() for one in gc.get_objects() if torch.is_tensor(one)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}.values()
        counts.append((made + sum(size for size in sizes if size > last / 2)) / last)  # frames kept are smaller

    convolve = functional.conv2d

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        count(made=x.nbytes // x.shape[1] * weight.shape[0])
        return convolve(x, weight, *rest, **more)

    def norm_silu(x: torch.Tensor, *rest: torch.Tensor | None) -> None:
        count(made=0)
        TORCH.norm_silu(x, *rest)

    decoder = FastDecoder(narrow, torch.float32, replace(TORCH, norm_silu=norm_silu), latents_a_chunk=2)
    monkeypatch.setattr(functional, "conv2d", conv2d)
    for _ in decoder.decode(noise(5, height=8, width=8)):
        pass
    assert max(counts) == fast_decode.WIDEST


@pytest.mark.gpu
def test_convolutions_on_the_card_write_channels_last(full, monkeypatch):
    over_frames = watch_layouts(monkeypatch, "conv3d", torch.channels_last_3d)
    over_a_frame = watch_layouts(monkeypatch, "conv2d", torch.channels_last)
    decoder = FastDecoder(full.to("cuda"), torch.bfloat16)
    decoded(decoder, noise(3, height=8, width=8).cuda())
    full.to("cpu")
    assert set(over_frames) == {(True, True, True)}
    assert set(over_a_frame) == {(True, True, True)}


@pytest.mark.parametrize(
    ("height", "width", "dtype", "latents"),
    [
        (480, 832, torch.bfloat16, 2),
        (480, 832, torch.float32, 1),
        (720, 1280, torch.bfloat16, 1),
        (16, 16, torch.bfloat16, 2),
        (2160, 3840, torch.float32, 1),
    ],
)
def test_decoder_computes_as_many_latent_frames_at_a_time_as_its_memory_holds(full, height, width, dtype, latents):
    decoder = FastDecoder(full, dtype)
    assert decoder._latents_that_fit(torch.empty(21, height // 8, width // 8, 16, device="meta")) == latents


def test_placed_decoder_is_bf16_beside_the_vae(narrow):
    make, passes = _bf16_decoder(narrow, Card("cpu", 0))
    decoder = make()
    assert isinstance(decoder, FastDecoder)
    assert decoder.dtype == torch.bfloat16
    assert passes.chosen() is TORCH


def test_placed_decoder_takes_no_kernels_where_compiling_is_off(narrow):
    make, passes = _bf16_decoder(narrow, Card("cpu", 0, levers=Levers(compile=False)))
    assert passes is None
    assert make().passes is TORCH


def test_channels_counts_what_the_passes_run_on(full):
    assert channels(full) == {96, 192, 384}


def test_last_convolution_writes_channels_in_eights(narrow):
    decoder = FastDecoder(narrow, torch.float32)
    assert decoder._last.weight.shape[0] == fast_decode.WRITTEN_CHANNELS
    assert not decoder._last.weight[3:].any()


def test_other_decoders_are_refused():
    residual = AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2,
        is_residual=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"not a decoder of the Wan2\.1 VAE"):
        FastDecoder(residual, torch.float32, TORCH)
