"""Daylight from the physics of air: Rayleigh and Mie scattering, integrated once into a table. Lengths in
metres."""

from dataclasses import dataclass

import numpy as np
from noise import layered

Array = np.ndarray
EARTH, TOP = 6_360_000.0, 6_420_000.0
RAYLEIGH, RAYLEIGH_HEIGHT = np.array([5.8e-6, 13.5e-6, 33.1e-6]), 8000.0
MIE_HEIGHT = 1200.0
SUN = 20.0  # radiance that the exposure is made for; only ratios matter
CLOUD_BASE = 2900.0


@dataclass(frozen=True)
class Sky:
    """One moment of a day. Directions are unit vectors (n, 3)."""

    sun: Array
    sunlight: Array
    """On a surface that faces the sun."""
    ambient: Array
    """On a level surface, from the sky alone."""
    haze: float
    table: Array
    """Radiance by elevation and by angle from the sun's azimuth, (64, 96, 3)."""
    cover: float
    drift: float
    """Metres that the clouds have moved."""

    def radiance(self, direction: Array) -> Array:
        """Clear sky."""
        rows, columns = self.table.shape[:2]
        elevation = np.arcsin(np.clip(direction[:, 2], 0, 1)) / (np.pi / 2)
        turn = np.arctan2(direction[:, 0], direction[:, 1]) - np.arctan2(self.sun[0], self.sun[1])
        azimuth = np.abs((turn + np.pi) % (2 * np.pi) - np.pi) / np.pi
        v, u = np.sqrt(elevation) * (rows - 1.001), azimuth * (columns - 1.001)
        row, column = v.astype(int), u.astype(int)
        v, u = (v - row)[:, None], (u - column)[:, None]
        upper = self.table[row, column] * (1 - u) + self.table[row, column + 1] * u
        lower = self.table[row + 1, column] * (1 - u) + self.table[row + 1, column + 1] * u
        return upper * (1 - v) + lower * v

    def seen(self, origin: Array, direction: Array) -> Array:
        """Sky with sun and clouds."""
        light = self.radiance(direction)
        cosine = np.clip(direction @ self.sun, -1, 1)
        light = light + self.sunlight * (120 * np.exp((cosine - 1) * 9e4))[:, None]
        return self._clouded(light, origin, direction, cosine)

    def _clouded(self, light: Array, origin: Array, direction: Array, cosine: Array) -> Array:
        up = np.maximum(direction[:, 2], 0.015)
        distance = (CLOUD_BASE - origin[:, 2]) / up
        x = origin[:, 0] + direction[:, 0] * distance + self.drift
        y = origin[:, 1] + direction[:, 1] * distance
        toward = 420 * self.sun[:2] / np.linalg.norm(self.sun[:2])
        density = self._density(x, y)
        shadow = np.exp(-1.5 * self._density(x + toward[0], y + toward[1]) - 0.5 * density)
        forward = 0.10 + 0.55 * ((1 + cosine) / 2) ** 6 + 0.5 * np.maximum(cosine, 0) ** 60
        body = self.sunlight * (shadow * forward)[:, None] + self.ambient * 0.30
        veil = np.exp(-distance / 38_000)
        body = body * veil[:, None] + self.radiance(direction) * (1 - veil)[:, None]
        opaque = (1 - np.exp(-2.6 * density)) * np.clip((direction[:, 2] - 0.012) / 0.05, 0, 1)
        return light + (body - light) * opaque[:, None]

    def _density(self, x: Array, y: Array) -> Array:
        broad = layered(x / 5200, y / 3400, 211, 3)
        fine = layered(x / 1500 + broad, y / 1100, 221, 7, 0.56)
        return np.clip(1.7 * (0.75 * broad + fine) + self.cover, 0, 1.6) ** 1.3

    def through_air(self, light: Array, direction: Array, distance: Array) -> Array:
        """What arrives over `distance`: dimmed, and filled with the light of the air between."""
        clear = np.exp(-(RAYLEIGH * 1.1 + self.haze * 1.1e-5) * distance[:, None])
        level = direction.copy()
        level[:, 2] = 0.02
        return light * clear + self.radiance(level / np.linalg.norm(level, axis=1, keepdims=True)) * (1 - clear)


def sky_at(elevation: float, azimuth: float, haze: float, cover: float, drift: float) -> Sky:
    """The sky for a sun at `elevation` and `azimuth` (degrees; 0 is straight ahead, 90 to the right)."""
    e, a = np.radians(elevation), np.radians(azimuth)
    sun = np.array([np.cos(e) * np.sin(a), np.cos(e) * np.cos(a), np.sin(e)])
    rows, columns = 64, 96
    up = (np.linspace(0, 1, rows) ** 2) * np.pi / 2
    turn = np.linspace(0, np.pi, columns)
    up, turn = np.meshgrid(up, turn, indexing="ij")
    direction = np.stack([np.cos(up) * np.sin(turn), np.cos(up) * np.cos(turn), np.sin(up)], -1).reshape(-1, 3)
    table = _scattered(direction, np.array([0, np.cos(e), np.sin(e)]), haze).reshape(rows, columns, 3)
    weight = (np.cos(up) * np.sin(up) * up.clip(0.01) ** 0.5)[..., None]
    ambient = np.pi * (table * weight).sum((0, 1)) / weight.sum()
    sunlight = SUN * np.exp(-_depth(np.array([[0, 0, EARTH + 10]]), sun[None], haze))[0]
    return Sky(sun, sunlight, ambient, haze, table, cover, drift)


def _depth(start: Array, direction: Array, haze: float, steps: int = 12) -> Array:
    """Optical depth (n, 3) from `start` to the top of the air."""
    length = _to_top(start, direction)
    t = (np.arange(steps) + 0.5) / steps
    height = np.linalg.norm(start[:, None] + direction[:, None] * (t[:, None] * length[:, None, None]), axis=2) - EARTH
    air = np.exp(-np.maximum(height, 0) / RAYLEIGH_HEIGHT).mean(1) * length
    dust = np.exp(-np.maximum(height, 0) / MIE_HEIGHT).mean(1) * length
    return RAYLEIGH * air[:, None] + haze * 2.3e-5 * dust[:, None]


def _to_top(start: Array, direction: Array) -> Array:
    along = (start * direction).sum(1)
    return -along + np.sqrt(along**2 - (start**2).sum(1) + TOP**2)


def _scattered(direction: Array, sun: Array, haze: float, steps: int = 32) -> Array:
    """Light scattered once into each direction, plus a share for what is scattered again."""
    start = np.zeros_like(direction)
    start[:, 2] = EARTH + 10
    length = _to_top(start, direction)
    cosine = direction @ sun
    rayleigh_phase = 3 / (16 * np.pi) * (1 + cosine**2)
    g = 0.78
    mie_phase = (1 - g * g) / (4 * np.pi * (1 + g * g - 2 * g * cosine) ** 1.5)
    total, depth = np.zeros((len(direction), 3)), np.zeros((len(direction), 3))
    toward = np.broadcast_to(sun, direction.shape)
    for i in range(steps):  # steps grow with height: most of the air is near
        near, far = (i / steps) ** 2 * length, ((i + 1) / steps) ** 2 * length
        point = start + direction * ((near + far) / 2)[:, None]
        height = np.maximum(np.linalg.norm(point, axis=1) - EARTH, 0)
        air = np.exp(-height / RAYLEIGH_HEIGHT) * (far - near)
        dust = np.exp(-height / MIE_HEIGHT) * (far - near)
        depth += RAYLEIGH * air[:, None] + haze * 2.3e-5 * dust[:, None]
        arriving = np.exp(-_depth(point, toward, haze) - depth)
        again = 0.045 * np.exp(-0.6 * depth)  # a flat guess at the second scattering; without it dusk is black
        total += (arriving * rayleigh_phase[:, None] + again) * RAYLEIGH * air[:, None]
        total += (arriving * mie_phase[:, None] + again) * haze * 2.1e-5 * dust[:, None]
    return SUN * total
