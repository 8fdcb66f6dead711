"""Sizes and frame counts, as literal numbers and over 500 aspects."""

import pytest

from engine.geometry import LatentShape, VideoShape, fit_area, frames_advice, is_legal_frames

AREA_480P = 480 * 832


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (17, 5), (77, 20), (81, 21), (161, 41)])
def test_latent_maps_frames_four_to_one_after_the_first(frames: int, latent: int) -> None:
    assert VideoShape(frames, 480, 832).latent() == LatentShape(latent, 60, 104)


def test_tokens_of_the_published_480p_video_are_32760() -> None:
    assert VideoShape(81, 480, 832).latent().tokens == 32_760


@pytest.mark.parametrize("frames", [0, 2, 3, 4, 6, 80, 82, -3])
def test_latent_refuses_frames_that_are_not_4k_plus_1(frames: int) -> None:
    assert not is_legal_frames(frames)
    with pytest.raises(ValueError, match=r"4k \+ 1"):
        VideoShape(frames, 480, 832).latent()


def test_latent_refuses_sides_off_the_vae_grid() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        VideoShape(81, 481, 832).latent()


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (80, "must be 4k + 1; the nearest are 77 and 81"),
        (82, "must be 4k + 1; the nearest are 81 and 85"),
        (0, "must be 4k + 1; the nearest are 1 and 5"),
    ],
)
def test_advice_names_the_two_nearest_legal_counts(frames: int, sentence: str) -> None:
    assert frames_advice(frames) == sentence


@pytest.mark.parametrize(
    ("aspect", "size"),
    [(832 / 480, (480, 832)), (480 / 832, (832, 480)), (1.0, (624, 624)), (4 / 3, (544, 720)), (16 / 9, (464, 832))],
)
def test_fit_area_of_common_aspects(aspect: float, size: tuple[int, int]) -> None:
    assert fit_area(aspect, AREA_480P) == size


def test_fit_area_keeps_area_grid_and_aspect_over_500_aspects() -> None:
    for i in range(500):
        aspect = 0.125 * 64 ** (i / 499)  # 1:8 to 8:1, evenly in the logarithm
        height, width = fit_area(aspect, AREA_480P)
        assert height % 16 == 0
        assert width % 16 == 0
        assert height >= 16
        assert width >= 16
        assert height * width <= AREA_480P
        exact_height = (AREA_480P / aspect) ** 0.5
        exact_width = (AREA_480P * aspect) ** 0.5
        assert abs(height - exact_height) <= 16
        assert abs(width - exact_width) <= 16
