"""The example pictures stand for photographs: they must decode, be small, and have a photograph's detail."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SIZES = {"start.jpg": (1040, 600), "end.jpg": (1040, 600), "portrait.jpg": (640, 960)}


def levels(name: str) -> np.ndarray:
    with Image.open(PICTURES / name) as picture:
        assert (picture.format, picture.mode, picture.getexif()) == ("JPEG", "RGB", {})
        return np.asarray(picture)


def entropy_bits(values: np.ndarray) -> float:
    """Shannon entropy of 8-bit values; 8 is noise, a drawing in flat colours has below 4."""
    share = np.bincount(values.ravel().astype(np.uint8), minlength=256) / values.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_example_picture_decodes_at_its_size(name, size):
    assert levels(name).shape == (size[1], size[0], 3)


def test_example_pictures_are_a_few_hundred_kilobytes_in_all():
    assert 200_000 < sum((PICTURES / name).stat().st_size for name in SIZES) < 900_000


@pytest.mark.parametrize("name", SIZES)
def test_example_picture_has_a_photographs_tones_and_detail(name):
    picture = levels(name)
    grey = picture.mean(axis=2)
    assert entropy_bits(grey) > 6.5
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20_000
    assert np.percentile(grey, 99) - np.percentile(grey, 1) > 120  # uses the range of the print
    # Detail at every scale: of photographs the amplitude falls about as 1 / frequency, of noise not at all
    window = np.outer(np.hanning(512), np.hanning(512))
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2((grey - grey.mean())[-512:, :512] * window)))
    v, u = np.indices(spectrum.shape) - 256
    rings = [np.log(spectrum[np.abs(np.hypot(u, v) - radius) < 1].mean()) for radius in (8, 16, 32, 64, 128)]
    slope = np.polyfit(np.log([8, 16, 32, 64, 128]), rings, 1)[0]
    assert -2.2 < slope < -0.6


def test_start_and_end_are_two_views_of_one_place():
    start, end = levels("start.jpg").astype(float), levels("end.jpg").astype(float)
    assert np.abs(start - end).mean() > 15
    ridge = [np.abs(np.diff(view.mean(axis=2), axis=0)).mean(axis=1) for view in (start, end)]
    assert np.corrcoef(*ridge)[0, 1] > 0.3  # sky, mountains, shore and water lie at the same heights


def test_render_is_deterministic(monkeypatch):
    monkeypatch.syspath_prepend(str(PICTURES))
    render = importlib.import_module("render")
    first, second = (render.photograph_fruit(24, 16, side=1) for _ in range(2))
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


def test_render_names_its_pictures_when_asked_for_another():
    done = subprocess.run(
        [sys.executable, str(PICTURES / "render.py"), "cat.jpg"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "there is no picture cat.jpg; there are start.jpg, end.jpg, portrait.jpg"
