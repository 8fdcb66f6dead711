"""Fruit on a wooden table in window light, by path tracing. Centimetres; x right, y away from the lens, z
up."""

from dataclasses import dataclass, field

import numpy as np
from noise import layered

Array = np.ndarray
TABLE, WALL, FRUIT = 0, 1, 2  # what a ray met; fruit counts on from here
WALL_AT = 62.0
ROOM_SIZE = 500.0
WINDOW_AT = -85.0
PANES_Y, PANES_Z, BAR = (-70.0, -22.0, 26.0), (18.0, 70.0, 118.0), 2.5
SUN = np.array([-0.80, -0.32, 0.46]) / np.linalg.norm([-0.80, -0.32, 0.46])
SUNLIGHT, SKYLIGHT = np.array([30.0, 25.5, 19.0]), np.array([1.9, 2.3, 2.9])
ROOM = np.array([0.16, 0.15, 0.14])  # light of a room that is not drawn
ASKEW = np.array([[0.36, 0.48, -0.80], [-0.80, 0.60, 0.0], [0.48, 0.64, 0.60]])  # a turn that hides noise's grid


@dataclass(frozen=True)
class Fruit:
    """An ellipsoid that rests on the table."""

    x: float
    y: float
    radii: tuple[float, float, float]
    colour: tuple[float, float, float]
    turn: float = 0.0
    """Radians about the vertical."""
    peel: float = 1.0
    """Strength of the bumps."""
    gloss: float = 0.12
    centre: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "centre", np.array([self.x, self.y, self.radii[2]]))

    def local(self, vectors: Array) -> Array:
        """Turned and scaled so that the fruit is the unit sphere."""
        c, s = np.cos(self.turn), np.sin(self.turn)
        x, y = c * vectors[:, 0] + s * vectors[:, 1], c * vectors[:, 1] - s * vectors[:, 0]
        return np.stack([x, y, vectors[:, 2]], axis=1) / np.array(self.radii)

    def outward(self, at: Array) -> Array:
        """Unit normals at points given by `local`."""
        slope = at / np.array(self.radii)
        c, s = np.cos(self.turn), np.sin(self.turn)
        normal = np.stack([c * slope[:, 0] - s * slope[:, 1], c * slope[:, 1] + s * slope[:, 0], slope[:, 2]], axis=1)
        return _unit(normal)


ORANGE, LEMON, LIME, PLUM = (0.80, 0.215, 0.008), (0.80, 0.50, 0.035), (0.14, 0.25, 0.02), (0.060, 0.014, 0.034)
FRUITS = (
    Fruit(-5.2, 2.0, (4.3, 4.3, 4.0), ORANGE),
    Fruit(4.4, 5.5, (4.0, 4.1, 3.9), ORANGE, turn=1.0),
    Fruit(-1.2, 12.0, (4.2, 4.2, 4.1), ORANGE, turn=2.0),
    Fruit(4.6, -4.6, (3.9, 2.9, 2.8), LEMON, turn=0.6, peel=0.8),
    Fruit(-9.8, 11.5, (2.9, 2.6, 2.5), LIME, turn=-0.5, peel=0.5, gloss=0.08),
    Fruit(10.6, 0.6, (2.5, 2.4, 2.3), PLUM, peel=0.05, gloss=0.22),
    Fruit(9.3, 13.5, (2.5, 2.4, 2.3), PLUM, turn=1.0, peel=0.05, gloss=0.22),
)


@dataclass(frozen=True)
class Hit:
    """What rays met: distance (inf: nothing), what, where, the surface's normal there. All (n, ...)."""

    distance: Array
    what: Array
    point: Array
    normal: Array


def trace(origin: Array, direction: Array) -> Hit:
    """The nearest surface of each ray, bumps included in its normal."""
    distance, what = _planes(origin, direction)
    for index, fruit in enumerate(FRUITS):
        t = _sphere(fruit.local(origin - fruit.centre), fruit.local(direction))
        nearer = t < distance
        distance = np.where(nearer, t, distance)
        what[nearer] = FRUIT + index
    point = origin + direction * np.where(np.isfinite(distance), distance, 0)[:, None]
    normal = np.zeros_like(point)
    normal[what == TABLE] = _table_normal(point[what == TABLE])
    normal[what == WALL] = (0, -1, 0)
    for index, fruit in enumerate(FRUITS):
        mine = what == FRUIT + index
        at = fruit.local(point[mine] - fruit.centre)
        normal[mine] = _unit(fruit.outward(at) + 0.16 * fruit.peel * _peel(at, index))
    return Hit(distance, what, point, normal)


def _planes(origin: Array, direction: Array) -> tuple[Array, Array]:
    with np.errstate(divide="ignore"):
        table = np.where(direction[:, 2] < 0, -origin[:, 2] / direction[:, 2], np.inf)
        wall = np.where(direction[:, 1] > 0, (WALL_AT - origin[:, 1]) / direction[:, 1], np.inf)
    nearest = np.minimum(table, wall)
    return np.where(nearest < ROOM_SIZE, nearest, np.inf), np.where(table < wall, TABLE, WALL)


def _sphere(origin: Array, direction: Array) -> Array:
    a, b = (direction**2).sum(1), (origin * direction).sum(1)
    under = b * b - a * ((origin**2).sum(1) - 1)
    t = (-b - np.sqrt(np.maximum(under, 0))) / a
    return np.where((under > 0) & (t > 1e-3), t, np.inf)


def _shadowed(origin: Array, direction: Array) -> Array:
    dark = np.zeros(len(origin), bool)
    for fruit in FRUITS:
        dark |= np.isfinite(_sphere(fruit.local(origin - fruit.centre), fruit.local(direction)))
    return dark


def _peel(at: Array, seed: int) -> Array:
    """Pores and a larger unevenness, as a tilt of the normal."""
    pores = [_solid(at * 19, 400 + 9 * seed + i, 2) for i in range(3)]
    uneven = [_solid(at * 2.6, 470 + 9 * seed + i, 1) for i in range(3)]
    return 1.1 * np.stack(pores, axis=1) + 0.5 * np.stack(uneven, axis=1)


def _solid(at: Array, seed: int, octaves: int) -> Array:
    """Noise in space from three planes of it. Mean near 0."""
    a, b, c = (at @ ASKEW).T
    return (layered(a, b, seed, octaves) + layered(b, c, seed + 31, octaves) + layered(c, a, seed + 62, octaves)) / 1.7


def _table_normal(point: Array) -> Array:
    x, y = point[:, 0], point[:, 1]
    grain = layered(x / 9, y / 0.35, 501, 3)
    across = np.abs((y / 13.0 + 0.37) % 1 - 0.5)  # 0.5 at the gap between two boards
    edge = np.clip((across - 0.488) / 0.012, 0, 1) * np.sign((y / 13.0 + 0.37) % 1 - 0.5)
    return _unit(np.stack([0.01 * grain, 0.05 * grain + 0.8 * edge, np.ones(len(x))], axis=1))


def _colour(hit: Hit) -> Array:
    """Albedo (n, 3)."""
    colour = np.empty_like(hit.point)
    x, y, z = hit.point.T
    table, wall = hit.what == TABLE, hit.what == WALL
    colour[table] = _wood(x[table], y[table])
    plaster = 0.56 * (1 + 0.10 * layered(x[wall] / 16, z[wall] / 16, 521, 5) + 0.05 * layered(x[wall], z[wall], 531, 3))
    colour[wall] = plaster[:, None] * np.array([0.92, 0.93, 0.90])
    for index, fruit in enumerate(FRUITS):
        mine = hit.what == FRUIT + index
        at = fruit.local(hit.point[mine] - fruit.centre)
        ripe = _solid(at * 1.3, 700 + index, 5) + 0.35 * _solid(at * 24, 720 + index, 2)
        tint = np.array(fruit.colour) * (1 + ripe[:, None] * np.array([0.22, 0.55, 0.8]))
        stem = np.clip(1 - np.hypot(at[:, 0] - 0.16, at[:, 1] + 0.30) / 0.11, 0, 1) * (at[:, 2] > 0)
        colour[mine] = tint + (np.array([0.13, 0.10, 0.03]) - tint) * np.clip(2.2 * stem, 0, 1)[:, None]
    return np.clip(colour, 0.003, 0.9)


def _wood(x: Array, y: Array) -> Array:
    board = np.floor(y / 13.0 + 0.37)
    x, y = x + 37 * board, y + 5.3 * board
    ring = 1.4 * layered(x / 30, y / 5, 601, 4) + y / 2.6
    ring = np.abs(2 * (ring % 1) - 1) ** 1.5
    fibre = layered(x / 5, y / 0.16, 611, 4)
    dark = np.clip(0.35 + 0.42 * ring + 0.35 * fibre + 0.12 * np.sin(board * 2.4), 0, 1)[:, None]
    gap = np.clip((np.abs(((y - 5.3 * board) / 13.0 + 0.37) % 1 - 0.5) - 0.492) / 0.004, 0, 1)[:, None]
    return (np.array([0.36, 0.21, 0.115]) * (1 - dark) + np.array([0.16, 0.078, 0.038]) * dark) * (1 - 0.85 * gap)


def _direct(point: Array, normal: Array, generator: np.random.Generator) -> Array:
    """Light that arrives from sun and sky through the window, one random ray each: irradiance (n, 3)."""
    sun, lit = _sun(point, normal, generator)
    light = SUNLIGHT * ((normal * sun).sum(1) * lit)[:, None]
    low, high = np.array([PANES_Y[0], PANES_Z[0]]), np.array([PANES_Y[-1], PANES_Z[-1]])
    spot = np.concatenate([np.full((len(point), 1), WINDOW_AT), generator.uniform(low, high, (len(point), 2))], axis=1)
    start = point + normal * 0.01
    toward = spot - start
    square = (toward**2).sum(1)
    toward /= np.sqrt(square)[:, None]
    facing = np.maximum((normal * toward).sum(1), 0) * np.abs(toward[:, 0]) * np.prod(high - low) / square
    lit = (facing > 0) & _is_open(spot)
    lit[lit] = ~_shadowed(start[lit], toward[lit])
    return light + SKYLIGHT * (facing * lit)[:, None]


def _sun(point: Array, normal: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """A direction to somewhere on the sun, and whether it is seen from there, past bars and fruit."""
    start = point + normal * 0.01
    sun = _unit(SUN + generator.normal(0, 0.008, point.shape))
    reach = (WINDOW_AT - start[:, 0]) / sun[:, 0]
    lit = ((normal * sun).sum(1) > 0) & _is_open(start + sun * reach[:, None])
    lit[lit] = ~_shadowed(start[lit], sun[lit])
    return sun, lit


def _is_open(spot: Array) -> Array:
    """Whether a point of the window's plane is glass, not frame or bar."""
    inside = np.ones(len(spot), bool)
    for value, lines in ((spot[:, 1], PANES_Y), (spot[:, 2], PANES_Z)):
        inside &= (value > lines[0]) & (value < lines[-1])
        inside &= np.abs(value - lines[1]) > BAR
    return inside


def _plain(origin: Array, direction: Array, generator: np.random.Generator) -> Array:
    """Light along rays, with only direct light and the room's where they end."""
    hit = trace(origin, direction)
    light = _colour(hit) / np.pi * (_direct(hit.point, hit.normal, generator) + np.pi * ROOM)
    to_window = (WINDOW_AT - origin[:, 0]) / np.where(direction[:, 0] < -1e-6, direction[:, 0], -1e-6)
    through = (to_window > 0) & (to_window < hit.distance) & (direction[:, 0] < 0)
    through &= _is_open(origin + direction * to_window[:, None])
    light[through] = SKYLIGHT
    return np.where((np.isfinite(hit.distance) | through)[:, None], light, ROOM)


def radiance(origin: Array, direction: Array, generator: np.random.Generator) -> Array:
    """Light along rays (n, 3): direct, bounced once, and mirrored in peel and varnish."""
    hit = trace(origin, direction)
    normal = np.where(((hit.normal * direction).sum(1) > 0)[:, None], -hit.normal, hit.normal)
    start = hit.point + normal * 0.01
    scattered = _unit(normal + _unit(generator.normal(0, 1, normal.shape)))
    bounced = np.minimum(_plain(start, scattered, generator), 4)  # rare bright rays would be specks
    matt = _colour(hit) * (_direct(hit.point, normal, generator) / np.pi + bounced)

    gloss = np.full(len(normal), 0.20)
    gloss[hit.what == WALL] = 0.8
    for index, fruit in enumerate(FRUITS):
        gloss[hit.what == FRUIT + index] = fruit.gloss
    facet = _unit(normal + gloss[:, None] * 0.6 * generator.normal(0, 1, normal.shape))
    cosine = np.clip(-(direction * facet).sum(1), 0, 1)
    mirrored = _unit(direction + 2 * cosine[:, None] * facet)
    coat = (hit.what != WALL) / (1 + 3 * gloss)
    fresnel = (0.04 + 0.96 * (1 - cosine) ** 5) * coat
    shine = np.minimum(_plain(start, mirrored, generator), 4)
    light = matt * (1 - fresnel)[:, None] + fresnel[:, None] * shine
    sun, lit = _sun(hit.point, normal, generator)
    sharp = 2 / gloss**2
    half = np.clip((_unit(sun - direction) * normal).sum(1), 0, 1) ** sharp * (sharp + 8) / (8 * np.pi)
    return light + SUNLIGHT * (0.04 * coat * half * lit)[:, None]


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
