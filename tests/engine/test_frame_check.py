"""What counts as a video: promised shape, and something to see."""

import numpy as np
import pytest
from diffusers import AutoencoderKLWan

from engine.frame_check import FrameCheck
from engine.geometry import VideoShape
from schemas.errors import BadOutput

SHAPE = VideoShape(5, 32, 48)


def noise(level: float = 40.0, mean: float = 128.0, shape: VideoShape = SHAPE, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.clip(generator.normal(mean, level, (*shape, 3)), 0, 255).round().astype(np.uint8)


def check(*chunks: np.ndarray, shape: VideoShape = SHAPE) -> None:
    watch = FrameCheck(shape)
    for chunk in chunks:
        watch.add(chunk)
    watch.finish()


def flat(*levels: int) -> np.ndarray:
    return np.stack([np.full((SHAPE.height, SHAPE.width, 3), level, np.uint8) for level in levels])


def starfield(stars: int) -> np.ndarray:
    video = np.zeros((*SHAPE, 3), np.uint8)
    for i in range(SHAPE.frames):
        video[i].reshape(-1, 3)[i : i + stars] = 255
    return video


@pytest.mark.parametrize(
    "chunk",
    [
        noise().astype(np.float32),
        noise().astype(np.int16),
        noise().tolist(),
        noise()[0],
        noise()[:0],
        noise()[..., :1],
        noise()[..., 0],
        noise()[:, :-1],
        noise()[:, :, :-1],
        noise().transpose(0, 3, 1, 2),
        np.concatenate([noise(), noise()], axis=-1)[..., :4],
    ],
    ids=["float", "int16", "list", "frame", "empty", "grey", "flat", "height", "width", "axes", "alpha"],
)
def test_check_refuses_another_type_or_shape(chunk):
    with pytest.raises(BadOutput):
        check(chunk)


@pytest.mark.parametrize(("counts", "words"), [((1, 3), "4 frames, not 5"), ((1, 4, 1), "6 frames or more, not 5")])
def test_check_refuses_another_count(counts, words):
    with pytest.raises(BadOutput, match=words):
        check(*[noise()[:1].repeat(count, axis=0) + np.uint8(i) for i, count in enumerate(counts)])


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (flat(0, 0, 0, 0, 0), "black"),
        (flat(1, 0, 1, 0, 1), "black"),
        (starfield(30), "black"),  # 30 of 1536 pixels, 2 % would be 31
        (flat(128, 128, 128, 128, 128), "one flat colour"),
        (flat(255, 255, 255, 255, 255), "one flat colour"),
        (flat(127, 128, 128, 127, 128), "one flat colour"),
        (noise(0.6), "one flat colour"),
        (noise()[:1].repeat(5, axis=0), "the same frame over and over"),
    ],
    ids=["black", "nearly", "stars", "grey", "white", "grey steps", "faint noise", "frozen"],
)
def test_check_refuses_a_video_that_shows_nothing(video, words):
    with pytest.raises(BadOutput, match=words):
        check(video[:1], video[1:])


@pytest.mark.parametrize(
    "video",
    [
        noise(),
        noise(1.5, 250),  # a white page with a decoder's noise
        noise(2.5, 2),  # a night sky
        (noise() > 128) * np.uint8(3),  # a darker one: nothing above level 3
        starfield(40),
        flat(0, 60, 120, 180, 240),  # a fade of flat colours
        np.concatenate([flat(0, 0, 0, 0), noise()[4:]]),  # black until the last frame
        np.concatenate([noise()[:1].repeat(4, axis=0), noise(seed=1)[4:]]),  # a held picture, then a cut
        np.concatenate([flat(0), noise()[1:]]),
    ],
    ids=["noise", "white page", "night", "dark night", "stars", "fade", "late", "held", "opens black"],
)
def test_check_accepts_a_dull_but_legal_video(video):
    check(video[:1], video[1:])


def test_check_accepts_one_changed_level_in_one_pixel_of_a_still():
    video = noise()[:1].repeat(5, axis=0)
    video[4, 31, 47, 2] ^= 1
    check(video)


def test_check_accepts_a_single_frame():
    """A picture is no frozen video."""
    check(noise()[:1], shape=SHAPE._replace(frames=1))


def test_check_does_not_hold_the_frames_of_the_caller():
    """A decoder may hand out views of one buffer; a changed buffer must not look frozen."""
    buffer = noise()[:1]
    watch = FrameCheck(SHAPE)
    for i in range(5):
        buffer[...] = noise(seed=i)[:1]
        watch.add(buffer)
    watch.finish()


@pytest.mark.parametrize("latent", [0.0, 2.0, -3.0])
def test_check_accepts_what_a_random_decoder_makes_of_a_constant_latent(latent):
    """The dullest input there is: a tiny VAE with random weights must not raise a false alarm."""
    import torch

    from engine.frames import to_uint8
    from engine.vae import decode_chunks

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    with torch.no_grad():
        check(
            *[to_uint8(chunk[0]) for chunk in decode_chunks(vae, torch.full((1, 16, 2, 4, 6), latent))],
            shape=VideoShape(5, 32, 48),
        )
