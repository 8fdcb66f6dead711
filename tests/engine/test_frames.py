"""Float pixels to bytes."""

import numpy as np
import pytest
import torch

from engine.frames import AHEAD, from_uint8, image_to_uint8, stream_uint8, to_uint8
from schemas.errors import BadOutput


def test_every_level_becomes_the_pixel_that_diffusers_makes_of_it():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    wanted = 2.0 * torch.from_numpy(levels.astype(np.float32) / 255.0) - 1.0
    assert torch.equal(from_uint8(levels), wanted.permute(3, 0, 1, 2)[None])


def test_pixels_have_colour_first_and_keep_frame_height_width():
    levels = np.random.default_rng(1).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    pixels = from_uint8(levels)
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((1, 3, 2, 4, 5), torch.float32, True)
    assert np.array_equal(to_uint8(pixels[0]), levels)


def test_to_uint8_moves_colour_last_and_keeps_frame_height_width():
    frames = torch.arange(3 * 2 * 4 * 5).reshape(3, 2, 4, 5) / 60 - 1
    levels = to_uint8(frames)
    assert levels.shape == (2, 4, 5, 3)
    assert levels[1, 2, 3].tolist() == [
        70,
        155,
        240,
    ]  # elements 33, 73, 113 of 60ths, minus 1, times 127.5, plus 127.5


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (-1.0, 0),
        (1.0, 255),
        (-1.5, 0),
        (7.0, 255),
        (0.0, 128),
        (-0.9922, 1),
        (-0.9961, 0),
        (0.9961, 255),
        (0.9960, 254),
    ],
)
def test_to_uint8_rounds_to_the_nearest_level_and_clamps(value, level):
    assert to_uint8(torch.full((3, 1, 1, 1), value)).ravel().tolist() == [level] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_uint8_computes_in_fp32_whatever_comes(dtype):
    values = torch.linspace(-1, 1, 3 * 400).reshape(3, 1, 20, 20).to(dtype)
    exact = np.rint(values.double().numpy() * 127.5 + 127.5).astype(np.uint8)
    assert np.abs(to_uint8(values).transpose(3, 0, 1, 2).astype(int) - exact).max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_to_uint8_refuses_one_pixel_that_is_no_number(dtype, poison):
    frames = torch.zeros(3, 2, 4, 4, dtype=dtype)
    frames[1, 1, 2, 3] = poison
    with pytest.raises(BadOutput):
        to_uint8(frames)


def test_numpy_alone_would_have_made_nan_black():
    with np.errstate(invalid="ignore"):
        assert (np.full(4, np.nan, np.float32) * 255).astype(np.uint8).tolist() == [0, 0, 0, 0]


def test_to_uint8_leaves_its_input_alone():
    frames = torch.zeros(3, 1, 2, 2)
    to_uint8(frames)
    assert torch.equal(frames, torch.zeros(3, 1, 2, 2))


def test_image_to_uint8_gives_height_width_colour():
    image = torch.stack([torch.full((2, 4), value) for value in (-1.0, 0.0, 1.0)])[None]  # (1, 3, 2, 4)
    picture = image_to_uint8(image)
    assert picture.shape == (2, 4, 3)
    assert picture[1, 3].tolist() == [0, 128, 255]
    with pytest.raises(BadOutput):
        image_to_uint8(image * torch.nan)


def grey(level: int) -> torch.Tensor:
    return torch.full((3, 1, 2, 2), level / 127.5 - 1)


def test_stream_uint8_is_to_uint8_of_each_chunk_in_order():
    chunks = [torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(7)]
    for streamed, chunk in zip(stream_uint8(iter(chunks)), chunks, strict=True):
        assert np.array_equal(streamed, to_uint8(chunk))


def test_stream_uint8_yields_the_chunks_before_one_that_is_no_number_and_then_refuses():
    stream = stream_uint8([grey(1), grey(2), grey(3) * torch.nan, grey(4)])
    assert [next(stream)[0, 0, 0, 0] for _ in range(2)] == [1, 2]
    with pytest.raises(BadOutput):
        next(stream)


def test_stream_uint8_computes_on_a_cpu_only_what_is_taken():
    taken = []
    stream = stream_uint8(taken.append(i) or grey(i) for i in range(5))
    next(stream)
    assert taken == [0]


def test_stream_uint8_of_nothing_is_nothing():
    assert list(stream_uint8([])) == []


@pytest.mark.gpu
def test_stream_uint8_from_a_card_is_ahead_and_equal():
    chunks = [torch.rand(3, 4, 64, 64, device="cuda") * 2 - 1 for _ in range(9)]
    taken = []
    stream = stream_uint8(taken.append(1) or chunk for chunk in chunks)
    first = next(stream)
    assert len(taken) == AHEAD + 1
    for streamed, chunk in zip([first, *stream], chunks, strict=True):
        assert np.array_equal(streamed, to_uint8(chunk.cpu()))
