"""From light to a photograph: where a pixel looks, the lens, the film, the print."""

from collections.abc import Iterator

import numpy as np

Array = np.ndarray


def pixels(side: int, seed: int) -> Iterator[tuple[float, float]]:
    """Offsets of side x side samples in a pixel, jittered."""
    generator = np.random.default_rng(seed)
    for row in range(side):
        for column in range(side):
            dx, dy = generator.random(2)
            yield (column + dx) / side, (row + dy) / side


def develop(light: Array, seed: int) -> Array:
    """Linear light (height, width, 3), 1 is white, to uint8: glow, vignette, film curve, grain."""
    light = np.maximum(light, 0)
    glow = _blurred(np.minimum(light, 6), 12)
    light = 0.94 * light + 0.06 * glow
    height, width = light.shape[:2]
    v, u = np.mgrid[0:height, 0:width]
    radius = np.hypot((u - width / 2), (v - height / 2)) / np.hypot(width / 2, height / 2)
    light = light * (1 / (1 + 0.35 * radius**2) ** 2)[..., None]
    a, b, c, d, e = 2.51, 0.03, 2.43, 0.59, 0.14  # a common rational fit of film's S-curve
    print_ = np.clip(light * (a * light + b) / (light * (c * light + d) + e), 0, 1) ** (1 / 2.2)
    generator = np.random.default_rng(seed)
    grain = _blurred(generator.normal(0, 1, (height, width, 1)), 1)
    tint = _blurred(generator.normal(0, 1, (height, width, 3)), 1)
    middle = 0.35 + 2.2 * print_ * (1 - print_)
    return (255 * np.clip(print_ + 0.016 * middle * (grain + 0.35 * tint), 0, 1) + 0.5).astype(np.uint8)


def _blurred(picture: Array, radius: int) -> Array:
    """Three box blurs each way, which is nearly a Gaussian."""
    for axis in (0, 1):
        for _ in range(3):
            padded = np.pad(picture, [(radius + 1, radius) if i == axis else (0, 0) for i in range(3)], mode="edge")
            total = padded.cumsum(axis)
            length = picture.shape[axis]
            lower = np.take(total, np.arange(length), axis)
            upper = np.take(total, np.arange(length) + 2 * radius + 1, axis)
            picture = (upper - lower) / (2 * radius + 1)
    return picture
