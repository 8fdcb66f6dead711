"""Draw the example pictures: a lake at noon, the same lake in the evening, and fruit on a table.

    python examples/pictures/render.py [start.jpg end.jpg portrait.jpg]

Everything is computed, so the pictures are free to use. They stand for photographs: many scales of detail,
soft light, a lens and film grain. Same numbers, same pictures; about ten minutes on one core.
"""

import sys
from pathlib import Path

import numpy as np
from atmosphere import Sky, sky_at
from film import develop, pixels
from fruit import radiance
from landscape import Terrain, build, march, shade
from noise import layered
from PIL import Image

Array = np.ndarray
FAR = 14_000.0
PICTURES = ("start.jpg", "end.jpg", "portrait.jpg")


def lake(terrain: Terrain, sky: Sky, origin: Array, direction: Array, spread: float) -> Array:
    """Radiance along each ray (n, 3): land, water with its mirror image, sky. `spread`: radians a pixel
    covers."""
    light = np.empty(direction.shape)
    t = march(terrain, origin, direction, FAR)
    with np.errstate(divide="ignore"):
        to_water = np.where(direction[:, 2] < 0, -origin[:, 2] / direction[:, 2], np.inf)
    water = to_water < t
    land = np.isfinite(t) & ~water
    air = ~(water | land)
    light[air] = sky.seen(origin[air], direction[air])
    point = origin[land] + direction[land] * t[land, None]
    light[land] = sky.through_air(shade(terrain, sky, point, spread * t[land]), direction[land], t[land])
    if water.any():
        point = origin[water] + direction[water] * to_water[water, None]
        light[water] = _water(terrain, sky, point, direction[water], to_water[water], spread)
    return light


def _water(terrain: Terrain, sky: Sky, point: Array, direction: Array, distance: Array, spread: float) -> Array:
    """Ripples tilt the mirror; where they are finer than a pixel, each sample takes one of them."""
    x, y = point[:, 0], point[:, 1]
    gust = np.clip(0.6 + 2.2 * layered(x / 260, y / 520, 301, 3), 0.15, 1.6)
    tilt = np.stack([layered(x / 0.9, y / 0.7, 311 + 20 * i, 5, 0.62) for i in range(2)], axis=1)
    tilt += 0.5 * np.stack([layered(x / 6, y / 4, 351 + 20 * i, 3) for i in range(2)], axis=1)
    rough = 0.055 * gust / (1 + distance / 2500)  # far off, the mean of many ripples
    normal = np.concatenate([rough[:, None] * tilt, np.ones((len(x), 1))], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    cosine = -(direction * normal).sum(1)
    mirrored = direction + 2 * cosine[:, None] * normal
    mirrored[:, 2] = np.abs(mirrored[:, 2]) + 1e-4
    mirrored = (mirrored / np.linalg.norm(mirrored, axis=1, keepdims=True)).astype(np.float32)
    start = point.astype(np.float32)
    start[:, 2] = 0.05
    t = march(terrain, start, mirrored, FAR, 200)
    seen = sky.seen(start, mirrored)
    land = np.isfinite(t)
    hit = start[land] + mirrored[land] * t[land, None]
    footprint = spread * (distance[land] + t[land]) + 1.0
    seen[land] = sky.through_air(shade(terrain, sky, hit, footprint), mirrored[land], t[land])
    fresnel = (0.02 + 0.98 * (1 - np.clip(cosine, 0, 1)) ** 5)[:, None]
    shallow = np.exp(np.minimum(terrain.sample(terrain.ground, x, y), 0) / 5)[:, None]
    body = np.array([0.010, 0.040, 0.045]) * (1 - shallow) + np.array([0.10, 0.11, 0.08]) * shallow
    body = body / np.pi * (sky.ambient + 0.6 * sky.sunlight * max(sky.sun[2], 0))
    return sky.through_air(seen * fresnel + body * (1 - fresnel), direction, distance)


def photograph_lake(terrain: Terrain, evening: bool, height: int, width: int, side: int) -> Array:
    """Two moments, the second a few steps further on. `side`: samples a pixel, each way."""
    if evening:
        sky, eye, yaw, exposure = sky_at(7.5, 112, 0.8, 0.22, 5200), (60.0, -120.0, 24.0), 2.0, 0.52
    else:
        sky, eye, yaw, exposure = sky_at(38, -112, 0.7, 0.05, 0), (0.0, -260.0, 19.0), 5.0, 0.26
    focal = 0.86  # of the picture's width: 60 degrees across
    light = np.zeros((height, width, 3))
    for dx, dy in pixels(side, seed=7):
        column, row = np.meshgrid((np.arange(width) + dx) / width - 0.5, (np.arange(height) + dy - height / 2) / width)
        ray = np.stack([column, np.full_like(column, focal), -row + 0.10], axis=-1).reshape(-1, 3)
        angle = np.radians(yaw)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        ray = ray @ turn
        ray = (ray / np.linalg.norm(ray, axis=1, keepdims=True)).astype(np.float32)
        origin = np.broadcast_to(np.array(eye, np.float32), ray.shape)
        light += lake(terrain, sky, origin, ray, 1 / (focal * width)).reshape(light.shape)
    return develop(exposure * light / side**2, seed=2 if evening else 1)


def photograph_fruit(height: int, width: int, side: int) -> Array:
    """Upright, with a wide-open lens focused on the nearest orange."""
    generator = np.random.default_rng(3)
    eye, aim, focal, aperture = np.array([3.0, -62.0, 31.0]), np.array([0.6, 8.0, 7.2]), 1.80, 0.75
    ahead = (aim - eye) / np.linalg.norm(aim - eye)
    right = np.cross(ahead, [0, 0, 1]) / np.linalg.norm(np.cross(ahead, [0, 0, 1]))
    up = np.cross(right, ahead)
    focus = np.array([-5.2, -1.0, 4.5]) @ ahead - eye @ ahead
    light = np.zeros((height, width, 3))
    for dx, dy in pixels(side, seed=9):
        u, v = np.meshgrid((np.arange(width) + dx - width / 2) / height, (np.arange(height) + dy) / height - 0.5)
        ray = focal * ahead + u[..., None] * right - v[..., None] * up
        spot = eye + (ray * (focus / focal)).reshape(-1, 3)
        radius, angle = aperture * np.sqrt(generator.random(u.size)), 2 * np.pi * generator.random(u.size)
        lens = (radius * np.cos(angle))[:, None] * right + (radius * np.sin(angle))[:, None] * up
        origin = eye + lens
        direction = (spot - origin) / np.linalg.norm(spot - origin, axis=1, keepdims=True)
        light += radiance(origin, direction, generator).reshape(light.shape)
    return develop(0.21 * light / side**2, seed=3)


def main(names: list[str]) -> None:
    terrain = build() if {"start.jpg", "end.jpg"} & set(names) else None
    for name in names:
        if name == "portrait.jpg":
            picture = photograph_fruit(960, 640, side=8)
        elif terrain is not None and name in ("start.jpg", "end.jpg"):
            picture = photograph_lake(terrain, name == "end.jpg", 600, 1040, side=3)
        else:
            raise SystemExit(f"there is no picture {name}; there are {', '.join(PICTURES)}")
        Image.fromarray(picture).save(Path(__file__).parent / name, quality=88, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PICTURES))
