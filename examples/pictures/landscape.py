"""A lake between mountains: a height field, marched by rays, under a computed sky. Metres; x right, y
ahead, z up."""

from dataclasses import dataclass

import numpy as np
from atmosphere import Sky
from noise import eroded, layered, ridged, value_noise

Array = np.ndarray
SPACING = 2.0
SIZE = 4096
LEFT, NEAR = -4096.0, -1000.0  # the field's corner


def smoothstep(low: float, high: float, x: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Terrain:
    """Grids of SIZE x SIZE, indexed [y, x]: ground with trees, ground alone, how much forest."""

    surface: Array
    ground: Array
    forest: Array

    def sample(self, grid: Array, x: Array, y: Array) -> Array:
        """A grid's value at any place, bilinear, held at the borders."""
        u = np.clip((x - LEFT) / SPACING, 0, SIZE - 1.001)
        v = np.clip((y - NEAR) / SPACING, 0, SIZE - 1.001)
        column, row = u.astype(np.int32), v.astype(np.int32)
        u -= column
        v -= row
        flat, index = grid.ravel(), row * SIZE + column
        upper = flat[index] * (1 - u) + flat[index + 1] * u
        lower = flat[index + SIZE] * (1 - u) + flat[index + SIZE + 1] * u
        return upper * (1 - v) + lower * v


def build() -> Terrain:
    """The whole valley: about a minute."""
    line = np.arange(SIZE, dtype=np.float32) * SPACING
    x, y = np.meshgrid(LEFT + line, NEAR + line)
    warp_x = 260 * layered(x / 900, y / 900, 11, 4)
    warp_y = 260 * layered(x / 900, y / 900, 21, 4)
    wx, wy = x + warp_x, y + warp_y
    axis = 260 * np.sin(wy / 1500) + 90
    across = np.abs(wx - axis) / (620 + 0.10 * np.maximum(wy, 0))
    wall = smoothstep(0.55, 3.4, across)
    head = smoothstep(2300, 5600, wy + 0.12 * np.abs(wx))
    rise = np.maximum(wall * (0.75 + 0.25 * head), 0.95 * head)
    ground = -26 + 1500 * rise**1.15
    ground += (90 + 980 * rise) * eroded(wx / 1500, wy / 1500, 31, 11)
    ground += 720 * rise**1.5 * (ridged(wx / 1900, wy / 1900, 51, 8) - 0.55)
    ground -= 30 * (1 - smoothstep(0.2, 1.2, across)) * (1 - head)
    ground = ground.astype(np.float32)
    slope = np.hypot(*np.gradient(ground, SPACING))
    patches = layered(x / 330, y / 330, 71, 5)
    forest = smoothstep(1.05, 0.72, slope) * smoothstep(5, 12, ground)
    forest *= smoothstep(620, 380, ground + 330 * patches) * smoothstep(-0.32, -0.12, patches)
    return Terrain(ground + _trees(x, y, forest), ground, forest.astype(np.float32))


def _trees(x: Array, y: Array, forest: Array) -> Array:
    """Height of the canopy: a cone in most cells of a jittered grid."""
    cell = 8.5
    canopy = np.zeros(x.shape, np.float32)
    base_x, base_y = np.floor(x / cell), np.floor(y / cell)
    shift = np.random.default_rng(5).random((3, 256, 256), dtype=np.float32)
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            cx, cy = base_x + dx, base_y + dy
            i, j = cx.astype(np.int32) % 256, cy.astype(np.int32) % 256
            ox, oy, size = (plane[j, i] for plane in shift)
            distance = np.hypot(x - (cx + ox) * cell, y - (cy + oy) * cell)
            tall = (9 + 15 * size) * (size < forest * 1.25)
            np.maximum(canopy, tall * np.clip(1.1 - distance / (2.6 + 2.6 * size), 0, 1), out=canopy)
    return canopy * (forest > 0.02)


def march(terrain: Terrain, origin: Array, direction: Array, far: float, steps: int = 260) -> Array:
    """Distance along each ray to the surface; inf where it meets none within `far`. Arrays (n, 3)."""
    count = len(direction)
    hit = np.full(count, np.inf, np.float32)
    alive = np.arange(count)
    t = np.full(count, 2.0, np.float32)
    before = np.zeros(count, np.float32)
    for _ in range(steps):
        point = origin[alive] + direction[alive] * t[alive, None]
        gap = point[:, 2] - terrain.sample(terrain.surface, point[:, 0], point[:, 1])
        under = gap < 0.0004 * t[alive]
        hit[alive[under]] = t[alive[under]]
        leaving = (t[alive] > far) | ((point[:, 2] > 2700) & (direction[alive, 2] > 0))
        keep = ~(under | leaving)
        alive, gap = alive[keep], gap[keep]
        before[alive] = t[alive]
        t[alive] += np.maximum(0.42 * gap, 0.35 + 0.0009 * t[alive])
    hit[alive] = t[alive]  # still creeping along the ground: it would have met it
    return _refined(terrain, origin, direction, before, hit)


def _refined(terrain: Terrain, origin: Array, direction: Array, low: Array, hit: Array) -> Array:
    """Halve the last step a few times, so that ridges have no terraces."""
    found = np.flatnonzero(np.isfinite(hit))
    low, high = low[found], hit[found]
    for _ in range(7):
        middle = (low + high) / 2
        point = origin[found] + direction[found] * middle[:, None]
        inside = point[:, 2] < terrain.sample(terrain.surface, point[:, 0], point[:, 1])
        low, high = np.where(inside, low, middle), np.where(inside, middle, high)
    hit[found] = high
    return hit


def shade(terrain: Terrain, sky: Sky, point: Array, footprint: Array) -> Array:
    """Light that the ground or forest at `point` sends on, (n, 3). `footprint`: metres a pixel covers
    there."""
    x, y, z = point.T
    step = np.maximum(footprint, 1.2)
    surface = terrain.surface
    normal = np.stack(
        [
            terrain.sample(surface, x - step, y) - terrain.sample(surface, x + step, y),
            terrain.sample(surface, x, y - step) - terrain.sample(surface, x, y + step),
            2 * step,
        ],
        axis=1,
    )
    rough = np.stack([value_noise(x / 3.1, y / 3.1 + z / 4.7, 90 + i)[0] - 0.5 for i in range(2)], axis=1)
    normal[:, :2] += 0.9 * step[:, None] * rough * smoothstep(14, 2, footprint)[:, None]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    albedo = _albedo(terrain, point, normal)
    facing = np.clip(normal @ sky.sun, 0, 1)
    lit = np.zeros(len(point), np.float32)
    bright = np.flatnonzero(facing > 0)
    start = point[bright] + normal[bright] * 1.5 + np.array([0, 0, 0.4])
    toward = np.broadcast_to(sky.sun, start.shape).astype(np.float32)
    lit[bright] = ~np.isfinite(march(terrain, start, toward, 5000, 120))
    around = (terrain.sample(surface, x + 9, y) + terrain.sample(surface, x - 9, y)) / 2
    around = (around + (terrain.sample(surface, x, y + 9) + terrain.sample(surface, x, y - 9)) / 2) / 2
    open_sky = np.clip(0.5 + 0.5 * normal[:, 2] - 0.035 * (around - z), 0.12, 1)
    direct = sky.sunlight * (facing * lit)[:, None]
    back = 0.10 * sky.sunlight * np.clip(0.4 - normal @ sky.sun, 0, 1)[:, None]  # from sunlit slopes across
    return albedo / np.pi * (direct + back + sky.ambient * open_sky[:, None])


def _albedo(terrain: Terrain, point: Array, normal: Array) -> Array:
    x, y, z = point.T
    flat = normal[:, 2]
    broad, fine = layered(x / 140, y / 140, 111, 5), layered(x / 9, (y + z) / 9, 121, 4)
    strata = layered(z / 26 + broad, x / 900, 131, 4)
    rock = np.array([0.25, 0.225, 0.20]) * (1 + 0.75 * strata + 0.45 * fine)[:, None]
    meadow = np.array([0.105, 0.115, 0.042]) * (1 + 0.7 * broad + 0.5 * fine)[:, None]
    gravel = np.array([0.27, 0.25, 0.22]) * (1 + 0.8 * fine)[:, None]
    ground = terrain.sample(terrain.ground, x, y)
    tree = smoothstep(0.8, 2.5, terrain.sample(terrain.surface, x, y) - ground)
    kind = value_noise(x / 11, y / 11, 141)[0]
    needles = np.array([0.030, 0.048, 0.020]) * (0.6 + 0.9 * kind)[:, None]
    larch = np.array([0.17, 0.105, 0.022]) * (0.6 + 0.8 * value_noise(x / 7, y / 7, 142)[0])[:, None]
    needles += (larch - needles) * smoothstep(0.60, 0.72, kind + 0.5 * broad)[:, None]
    colour = rock + (meadow - rock) * (smoothstep(0.70, 0.86, flat + 0.2 * fine) * smoothstep(1000, 640, z))[:, None]
    colour += (gravel - colour) * smoothstep(5.5, 2.0, z + 4 * broad)[:, None]
    snow = smoothstep(0.48, 0.66, flat + 0.25 * fine) * smoothstep(760, 1020, z + 420 * broad + 60 * fine)
    colour += (np.array([0.80, 0.83, 0.88]) - colour) * snow[:, None]
    return np.clip(colour + (needles - colour) * tree[:, None], 0.004, 0.92)
