"""Smooth random numbers over the plane: the raw material of every surface in these pictures."""

import numpy as np

Array = np.ndarray
PERIOD = 256


def value_noise(x: Array, y: Array, seed: int) -> tuple[Array, Array, Array]:
    """Value in [0, 1] and its two slopes, with one random number a unit square, smooth to the second
    order."""
    table = np.random.default_rng(seed).random((PERIOD, PERIOD), dtype=np.float32).ravel()
    column, row = np.floor(x), np.floor(y)
    u, v = (x - column).astype(np.float32), (y - row).astype(np.float32)
    left, top = column.astype(np.int32) % PERIOD, row.astype(np.int32) % PERIOD
    right, below = (left + 1) % PERIOD, (top + 1) % PERIOD
    a, b = table[top * PERIOD + left], table[top * PERIOD + right]
    c, d = table[below * PERIOD + left], table[below * PERIOD + right]
    su, sv = (u**3 * (u * (u * 6 - 15) + 10) for u in (u, v))
    du, dv = (30 * u**2 * (u * (u - 2) + 1) for u in (u, v))
    across, down, twist = b - a, c - a, a - b - c + d
    value = a + across * su + down * sv + twist * su * sv
    return value, du * (across + twist * sv), dv * (down + twist * su)


def layered(x: Array, y: Array, seed: int, octaves: int, gain: float = 0.5) -> Array:
    """Sum of ever finer noise, each octave turned against the last so that no grid shows. Mean near 0."""
    total = np.zeros(x.shape, np.float32)
    height = 1.0
    for octave in range(octaves):
        total += height * (value_noise(x, y, seed + octave)[0] - 0.5)
        height *= gain
        x, y = 2.03 * (0.8 * x - 0.6 * y) + 7.1, 2.03 * (0.6 * x + 0.8 * y) + 3.7
    return total


def eroded(x: Array, y: Array, seed: int, octaves: int) -> Array:
    """Layered noise that leaves steep places bare of finer detail, as running water does: ridges over
    smooth flanks."""
    total = np.zeros(x.shape, np.float32)
    slope_x, slope_y = np.zeros_like(total), np.zeros_like(total)
    height = 1.0
    for octave in range(octaves):
        value, dx, dy = value_noise(x, y, seed + octave)
        slope_x += dx
        slope_y += dy
        total += height * (value - 0.5) / (1 + 0.9 * (slope_x**2 + slope_y**2))
        height *= 0.5
        x, y = 2.03 * (0.8 * x - 0.6 * y) + 7.1, 2.03 * (0.6 * x + 0.8 * y) + 3.7
    return total


def ridged(x: Array, y: Array, seed: int, octaves: int) -> Array:
    """Layered noise folded at its middle: sharp crests. In [0, 2)."""
    total = np.zeros(x.shape, np.float32)
    height, weight = 1.0, np.ones(x.shape, np.float32)
    for octave in range(octaves):
        crest = (1 - np.abs(2 * value_noise(x, y, seed + octave)[0] - 1)) ** 2
        total += height * crest * weight
        weight = np.clip(crest * 1.6, 0, 1)
        height *= 0.5
        x, y = 2.03 * (0.8 * x - 0.6 * y) + 7.1, 2.03 * (0.6 * x + 0.8 * y) + 3.7
    return total
