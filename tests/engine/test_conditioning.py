from dataclasses import replace

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from engine.chain import Wish, plan
from engine.conditioning import LAYOUTS, Filling, Given, condition, known_mask, start_condition
from engine.vae import encode_norm
from schemas.errors import InvalidInput
from tests.engine.svi_parts import noise, pixels, tiny_vae

VAE = tiny_vae()
ANCHOR, START, END = pixels(1, seed=1), pixels(1, seed=2), pixels(1, seed=3)
MOTION = noise(1, seed=4)

FIVE = {
    "svi": "1111 0000",
    "svi_latent": "1111 1111",
    "svi_upstream": "1111 0001",
    "svi_pixel4": "1111 1111",
    "flf": "1111 0001",
    "kijai_end": "1111 0000 1111",
}
SEVENTEEN = {
    "svi": "1111 0000 0000 0000 0000",
    "svi_latent": "1111 0000 0000 0000 1111",
    "svi_upstream": "1111 0000 0000 0000 0001",
    "svi_pixel4": "1111 0000 0000 0000 1111",
    "flf": "1111 0000 0000 0000 0001",
    "kijai_end": "1111 0000 0000 0000 0000 1111",
}
SEVENTY_SEVEN = {
    "svi": "1111 " + "0000 " * 18 + "0000",
    "svi_latent": "1111 " + "0000 " * 18 + "1111",
    "svi_upstream": "1111 " + "0000 " * 18 + "0001",
    "svi_pixel4": "1111 " + "0000 " * 18 + "1111",
    "flf": "1111 " + "0000 " * 18 + "0001",
    "kijai_end": "1111 " + "0000 " * 19 + "1111",
}
EIGHTY_ONE = {
    "svi": "1111 " + "0000 " * 19 + "0000",
    "svi_latent": "1111 " + "0000 " * 19 + "1111",
    "svi_upstream": "1111 " + "0000 " * 19 + "0001",
    "svi_pixel4": "1111 " + "0000 " * 19 + "1111",
    "flf": "1111 " + "0000 " * 19 + "0001",
    "kijai_end": "1111 " + "0000 " * 20 + "1111",
}
ROWS = [
    (name, frames, row)
    for frames, rows in ((5, FIVE), (17, SEVENTEEN), (77, SEVENTY_SEVEN), (81, EIGHTY_ONE))
    for name, row in rows.items()
]
ONES = {"svi": 4, "svi_latent": 8, "svi_upstream": 5, "svi_pixel4": 8, "flf": 5, "kijai_end": 8}
LATENT_FRAMES = {5: 2, 17: 5, 77: 20, 81: 21}


def encode(video):
    return encode_norm(VAE, video)


def zeros(video):
    """An encoder for tests of the mask alone."""
    return torch.zeros(1, 16, (video.shape[2] - 1) // 4 + 1, 2, 2)


def given(name, **changes):
    return replace(Given(ANCHOR, START, END if LAYOUTS[name].needs_end else None), **changes)


def printed(y, row=0, column=0):
    """The mask of one position as text: T groups of 4 sub-frames."""
    groups = y[0, :4, :, row, column].T
    return " ".join("".join(str(int(value)) for value in group) for group in groups)


@pytest.mark.parametrize(("name", "frames", "row"), ROWS)
def test_row_01_mask_of_every_layout(name, frames, row):
    latent_frames = LATENT_FRAMES[frames] + (name == "kijai_end")

    y = condition(name, latent_frames, given(name), zeros)

    assert y.shape == (1, 20, latent_frames, 2, 2)
    assert {printed(y, h, w) for h in (0, 1) for w in (0, 1)} == {row}
    assert int(y[0, :4, :, 0, 0].sum()) == ONES[name]


@pytest.mark.parametrize(
    ("latent_frames", "shape"), [(2, (4, 2)), (5, (4, 5)), (20, (4, 20)), (21, (4, 21)), (22, (4, 22))]
)
def test_row_01_mask_shape(latent_frames, shape):
    assert known_mask(latent_frames).shape == shape


def test_mask_of_a_pixel4_continuation_knows_four_start_frames():
    y = condition("svi_pixel4", 5, given("svi_pixel4", start=pixels(4)), zeros)

    assert printed(y) == "1111 1110 0000 0000 1111"
    assert int(y[0, :4, :, 0, 0].sum()) == 11


def test_mask_of_flf_with_several_start_frames():
    y = condition("flf", 4, given("flf", start=pixels(6)), zeros)

    assert printed(y) == "1111 1111 1000 0001"


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("frames", [6, 80, 4, 0, -3])
def test_row_02_illegal_frames_are_refused_before_any_work(name, frames):
    with pytest.raises(InvalidInput, match="video_length: must be 4k"):
        plan(Wish(frames, ("",), 0, name))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_no_layout_hands_a_vae_an_illegal_number_of_frames(name):
    seen = []

    def recording(video):
        seen.append(video.shape[2])
        return zeros(video)

    for frames in range(5, 82, 4):
        for policy in ("exact", "window"):
            (clip,) = plan(Wish(frames, ("",), 0, name, policy))
            condition(name, clip.latent_frames, given(name), recording)

    assert [count for count in seen if (count - 1) % 4] == []


def recipe(name):
    """Straight-line y for 17 frames, written out layout by layout."""
    a, e = encode(ANCHOR), encode(END)
    nothing = torch.zeros(1, 16, 3, 2, 2)
    grey = torch.zeros(1, 3, 15, 16, 16)
    latents = {
        "svi": lambda: torch.cat([a, torch.zeros(1, 16, 4, 2, 2)], 2),
        "svi_latent": lambda: torch.cat([a, nothing, e], 2),
        "svi_upstream": lambda: torch.cat([a, nothing, e], 2),
        "svi_pixel4": lambda: encode(torch.cat([START, grey[:, :, :12], END, END, END, END], 2)),
        "flf": lambda: encode(torch.cat([START, grey, END], 2)),
        "kijai_end": lambda: torch.cat([encode(torch.cat([START, torch.zeros(1, 3, 16, 16, 16)], 2)), e], 2),
    }[name]()
    bits = [int(bit) for bit in SEVENTEEN[name].replace(" ", "")]
    mask = torch.zeros(1, 4, len(bits) // 4, 2, 2)
    for i, bit in enumerate(bits):
        mask[:, i % 4, i // 4] = bit
    return torch.cat([mask, latents], 1)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_row_03_y_equals_a_straight_line_recipe(name):
    y = condition(name, 6 if name == "kijai_end" else 5, given(name), encode)

    assert y.dtype == torch.float32
    assert torch.equal(y, recipe(name))


@pytest.mark.parametrize("frames", [5, 17, 33])
def test_row_04_flf_equals_stock_prepare_latents(frames):
    pipeline = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=VAE, scheduler=None, transformer=None)
    _, stock = pipeline.prepare_latents(
        START[:, :, 0],
        1,
        16,
        16,
        16,
        frames,
        torch.float32,
        torch.device("cpu"),
        latents=noise((frames - 1) // 4 + 1),
        last_image=END[:, :, 0],
    )

    y = condition("flf", (frames - 1) // 4 + 1, given("flf"), encode)

    assert torch.equal(y, stock)


@pytest.mark.parametrize("frames", [5, 17])
def test_start_condition_equals_the_stock_pipelines(frames):
    pipeline = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=VAE, scheduler=None, transformer=None)
    _, stock = pipeline.prepare_latents(
        START[:, :, 0], 1, 16, 16, 16, frames, torch.float32, torch.device("cpu"), latents=noise((frames - 1) // 4 + 1)
    )

    y = start_condition(START, frames, encode)

    assert torch.equal(y, stock)
    assert printed(y) == " ".join(["1111"] + ["0000"] * ((frames - 1) // 4))


@pytest.mark.parametrize("name", ["svi", "svi_latent", "svi_upstream"])
def test_row_05_middle_latents_are_zero_not_encoded_grey(name):
    y = condition(name, 5, given(name), encode)

    grey = encode(torch.zeros(1, 3, 17, 16, 16))
    assert y[:, 4:, 1:4].abs().max() == 0.0
    assert grey[:, :, 1:4].abs().max() > 0.1


@pytest.mark.parametrize("name", ["svi", "svi_latent", "svi_upstream"])
def test_row_06_latent_layouts_see_the_anchor_only(name):
    y = condition(name, 5, given(name), encode)

    assert torch.equal(condition(name, 5, given(name, start=pixels(1, seed=9)), encode), y)
    assert not torch.equal(condition(name, 5, given(name, anchor=pixels(1, seed=9)), encode), y)


@pytest.mark.parametrize("name", ["flf", "svi_pixel4", "kijai_end"])
def test_row_06_pixel_layouts_see_the_start_only(name):
    y = condition(name, 5, given(name), encode)

    assert torch.equal(condition(name, 5, given(name, anchor=pixels(1, seed=9)), encode), y)
    assert not torch.equal(condition(name, 5, given(name, start=pixels(1, seed=9)), encode), y)


def test_flf_differs_from_start_only_in_the_last_latent():
    ended = condition("flf", 5, given("flf"), encode)[:, 4:]
    start_only = encode(torch.cat([START, torch.zeros(1, 3, 16, 16, 16)], dim=2))

    assert torch.equal(ended[:, :, :4], start_only[:, :, :4])
    assert not torch.equal(ended[:, :, 4], start_only[:, :, 4])


@pytest.mark.parametrize("name", ["svi", "svi_latent", "svi_upstream"])
def test_row_18_motion_latent_enters_bit_for_bit_and_stays_unknown(name):
    y = condition(name, 5, given(name, motion=MOTION), encode)

    assert torch.equal(y[:, 4:, 1:2], MOTION)
    assert printed(y)[5:9] == "0000"
    assert y[:, 4:, 2:4].abs().max() == 0.0


def test_several_motion_latents_keep_their_order():
    motion = noise(3, seed=5)
    y = condition("svi_latent", 6, given("svi_latent", motion=motion), encode)

    assert torch.equal(y[:, 4:, 1:4], motion)


@pytest.mark.parametrize("kind", ["anchor", "noise"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_filling_changes_the_latents_and_never_the_mask(name, kind):
    latent_frames = 6 if name == "kijai_end" else 5
    filling = Filling(kind, torch.Generator().manual_seed(7))

    filled = condition(name, latent_frames, given(name), encode, filling)
    plain = condition(name, latent_frames, given(name), encode)

    assert torch.equal(filled[:, :4], plain[:, :4])
    assert not torch.equal(filled[:, 4:], plain[:, 4:])


def test_anchor_filling_repeats_the_anchor_latent():
    y = condition("svi_latent", 5, given("svi_latent"), encode, Filling("anchor"))

    assert torch.equal(y[:, 4:, :4], encode(ANCHOR).expand(-1, -1, 4, -1, -1))
    assert torch.equal(y[:, 4:, 4:], encode(END))


def test_noise_filling_is_the_generators_and_stays_within_the_pixel_range():
    seen = []

    def recording(video):
        seen.append(video)
        return zeros(video)

    for _ in range(2):
        filling = Filling("noise", torch.Generator().manual_seed(7))
        condition("flf", 5, given("flf"), recording, filling)

    assert torch.equal(seen[0], seen[1])
    assert seen[0].abs().max() == 1.0


@pytest.mark.parametrize("name", ["svi_latent", "svi_upstream", "svi_pixel4", "flf", "kijai_end"])
def test_condition_refuses_an_end_layout_without_end(name):
    with pytest.raises(ValueError, match=f"layout {name} needs an end picture"):
        condition(name, 5, given(name, end=None), zeros)


def test_condition_refuses_an_end_in_the_layout_without_one():
    with pytest.raises(ValueError, match="layout svi takes no end picture"):
        condition("svi", 5, given("svi", end=END), zeros)


@pytest.mark.parametrize("name", ["svi_pixel4", "flf", "kijai_end"])
def test_condition_refuses_motion_in_pixel_layouts(name):
    with pytest.raises(ValueError, match=f"layout {name} takes no motion latents"):
        condition(name, 5, given(name, motion=MOTION), zeros)


@pytest.mark.parametrize(
    ("name", "latent_frames", "changes"),
    [
        ("svi_latent", 2, {"motion": MOTION}),
        ("svi", 1, {"motion": MOTION}),
        ("flf", 2, {"start": pixels(6)}),
        ("svi_pixel4", 2, {"start": pixels(2)}),
        ("flf", 1, {}),
    ],
)
def test_condition_refuses_more_than_the_clip_holds(name, latent_frames, changes):
    with pytest.raises(ValueError, match=r"cannot hold|do not fit"):
        condition(name, latent_frames, given(name, **changes), zeros)
