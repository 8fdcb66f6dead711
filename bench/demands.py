"""What is asked of the worker on a card, held against what bench.acceptance has found."""

from collections.abc import Callable, Mapping
from statistics import StatisticsError
from typing import Any, NamedTuple

from bench.first import First
from bench.job_table import floor_percent, job_seconds, overhead
from bench.rows import rows
from bench.work import VAE_ENCODE, VAE_ENCODE_MEMOISED
from engine.profiles import PROFILES
from engine.residency import BLOCKS, OUTSIDE_BLOCKS_SHARE

Found = Mapping[str, Any]
"""Name of a program of bench.acceptance -> the figures that it has kept."""
Row = dict[str, Any]
Seen = tuple[str, bool | None]
"""A figure in words, and whether it is what is asked for; None: nothing is asked for."""

GB = 1e9
ENOUGH = 5  # jobs that a median is of
RESERVED_GIB = 44.0
SMALL_GB = 0.1  # pictures, latents and embeddings of a job are 0.04
TOLERANCE_MIB = 64
EXPERT_GB, ENCODER_GB = (
    PROFILES["wan22_i2v_svi"].component(name).size_bytes / GB for name in ("transformer", "text_encoder")
)


class Demand(NamedTuple):
    words: str
    see: Callable[[Found], Seen]


def table(found: Found) -> str:
    """A line for each demand; what has no figure says so."""
    return rows(["asked for", "seen", "reached"], [[demand.words, *_line(demand, found)] for demand in DEMANDS])


def _line(demand: Demand, found: Found) -> tuple[str, str]:
    try:
        seen, is_reached = demand.see(found)
    except (LookupError, StopIteration, StatisticsError):  # a program that did not run, or was cut
        return "no result", "–"
    except Exception as error:  # noqa: BLE001 what cannot be read must not keep the next program from running
        return f"not readable: {type(error).__name__}", "–"
    return seen, "–" if is_reached is None else "yes" if is_reached else "no"


def _arm(found: Found, program: str, what: str = "ours", layout: str | None = None) -> Row:
    """The program's row of that arm, with a timed job; of that layout, if one is named, else the first."""
    rows = (row for row in found[program] if row.get("what") == what and row.get("samples"))
    return next(row for row in rows if layout in (None, row["layout"]))


def _attention8(found: Found) -> Row:
    return next(row for row in found["attention8"] if row.get("samples") and row["attention"] == "attention8")


def _times(slow: Row, fast: Row, least: float) -> Seen:
    n = min(len(slow["samples"]), len(fast["samples"]))
    ratio = job_seconds(slow) / job_seconds(fast)
    return (
        f"{ratio:.2f}: {job_seconds(slow):.2f} s to {job_seconds(fast):.2f} s, n = {n}",
        ratio >= least and n >= ENOUGH,
    )


def _seconds(row: Row, most: float | None = None) -> Seen:
    spent, n = job_seconds(row), len(row["samples"])
    seen = f"{spent:.2f} s, n = {n}, {len(row['samples'][-1]['forwards_s'])} forwards"
    return seen, None if most is None else spent <= most and n >= ENOUGH


def _reserved(row: Row) -> Seen:
    peak = max(sample["memory"]["peak_reserved_gib"] for sample in row["samples"])
    return f"{peak:.1f} GiB", peak <= RESERVED_GIB


def _floor(found: Found) -> Seen:
    ceilings = next(cell["ceilings"] for cell in found["svi"] if "ceilings" in cell)
    share = floor_percent(_arm(found, "svi"), ceilings)
    return f"{share:.1f} %", share >= 83


def _moved(row: Row, least_gb: float, most_gb: float) -> Seen:
    moved = row["trace"][0]["bytes_to_device"] / GB
    return f"{moved:.2f} GB", least_gb - SMALL_GB <= moved <= most_gb + SMALL_GB


def _overhead(found: Found) -> Seen:
    row = _arm(found, "svi")
    spent = overhead(row)
    if spent is None:
        raise KeyError("whole")
    outside = 100 * spent.outside_s / spent.seconds
    seen = f"{spent.percent:.2f} %, {outside:.2f} of it outside the models, n = {len(row['trace'])}"
    return seen, spent.percent <= 2


def _first(found: Found, program: str, figure: str, more_s: float) -> Seen:
    job = First.of(found[program][figure])
    seen = f"{job.seconds / job.warm_s:.2f}: {job.seconds:.2f} s, a warm one {job.warm_s:.2f} s, n = {job.processes}"
    return f"{seen}; {job.since_start_s:.2f} s since the start", job.seconds <= 1.35 * job.warm_s + more_s


def _read(found: Found) -> Seen:
    cold = found["cold"]
    disk = cold["disk"]
    mine, dd = disk["bytes"] / disk["read_s"], cold["bytes"] / disk["dd_s"]
    return f"{100 * mine / dd:.0f} %: {mine / GB:.2f} of {dd / GB:.2f} GB/s", mine >= 0.8 * dd


def _swap(found: Found, name: str = "rolling swap") -> tuple[Row, Row]:
    """Its row, and what was asked of the program."""
    (asked,) = found["swap"]
    return {row["name"]: row for row in asked["swap"]}[name], asked


def _swap_ratio(found: Found) -> Seen:
    row, asked = _swap(found)
    return f"{row['ratio']:.3f}, {asked['blocks']} blocks", row["ratio"] <= 1.05


def _swap_moved(found: Found) -> Seen:
    row, asked = _swap(found)
    experts = 2 * EXPERT_GB * (OUTSIDE_BLOCKS_SHARE + (1 - OUTSIDE_BLOCKS_SHARE) * asked["blocks"] / BLOCKS)
    return f"{row['moved_gb']:.1f} GB, two experts are {experts:.1f}", abs(row["moved_gb"] / experts - 1) < 0.02


def _vae(found: Found) -> Mapping[str, Row]:
    (asked,) = found["vae"]
    return {row["name"]: row for row in asked["vae"]}


def _encode(found: Found) -> Seen:
    says = _vae(found)["encode, memoised fp32"]["says"]
    ratio = VAE_ENCODE / VAE_ENCODE_MEMOISED
    return f"{says}; {ratio:.2f} times fewer", says.startswith("equal: True") and ratio >= 2.5


def _decode(found: Found) -> Seen:
    stock, ours = (_vae(found)[f"decode, {name}"]["seconds"] for name in ("stock bf16", "as a job: to bytes"))
    return f"{stock / ours:.2f}: {stock:.2f} s to {ours:.2f} s", stock / ours >= 1.6


def _modes(found: Found) -> Seen:
    loads = [f"{visit['mode']} {visit['load_s']:.2f} s" for visit in found["modes"]["visits"] if visit["is_return"]]
    problems = found["modes"]["problems"]
    return "; ".join([*loads, *problems]), bool(loads) and not problems


def _grown(found: Found) -> Seen:
    samples = _arm(found, "many")["samples"]
    grown = samples[-1]["memory"]["reserved_mib"] - samples[0]["memory"]["reserved_mib"]
    return f"{grown:+.0f} MiB after {len(samples)}", len(samples) >= 50 and abs(grown) <= TOLERANCE_MIB


DEMANDS = (
    Demand(
        "svi_endframe: 4.7 times as fast as plain, goal 5",
        lambda f: _times(_arm(f, "svi", "plain"), _arm(f, "svi"), 4.7),
    ),
    Demand("svi_endframe: 13.8 s, goal 13", lambda f: _seconds(_arm(f, "svi"), 13.8)),
    Demand(
        "the same frames by plain's arithmetic (flf), as fast",
        lambda f: _times(_arm(f, "svi", "plain"), _arm(f, "svi", layout="flf"), 4.7),
    ),
    Demand("the same: 13.8 s", lambda f: _seconds(_arm(f, "svi", layout="flf"), 13.8)),
    Demand("a forward: 83 % of the floor, goal 87", _floor),
    Demand("peak reserved: 44.0 GiB", lambda f: _reserved(_arm(f, "svi"))),
    Demand("all resident: no weight moves in a warm job", lambda f: _moved(_arm(f, "svi"), 0.0, 0.0)),
    Demand("neither card nor network: 2 % of a job", _overhead),
    Demand("first job, warm compile cache: 1.35 of a warm one", lambda f: _first(f, "cold", "warm_cache", 0.0)),
    Demand("first job, files in memory: 1.35 of a warm one", lambda f: _first(f, "restarted", "restarted", 0.0)),
    Demand("first job, cold compile cache: 1.35 of a warm one + 5 s", lambda f: _first(f, "cold", "cold_cache", 5.0)),
    Demand(
        "first job, cold compile cache, files in memory: 1.35 of a warm one + 5 s",
        lambda f: _first(f, "restarted", "cold_cache_in_memory", 5.0),
    ),
    Demand("first job, waited for: 1.35 of a warm one", lambda f: _first(f, "cold", "waited", 0.0)),
    Demand("first job, warmed up before it: 1.35 of a warm one", lambda f: _first(f, "cold", "warmed_up", 0.0)),
    Demand("weights read: 80 % of dd", _read),
    Demand("exact track: 3 times as fast as plain", lambda f: _times(_arm(f, "svi", "plain"), _arm(f, "exact"), 3.0)),
    Demand("exact track, peak reserved: 44.0 GiB", lambda f: _reserved(_arm(f, "exact"))),
    Demand(
        f"exact track: two experts ({2 * EXPERT_GB:.1f} GB) move in a job, the encoder ({ENCODER_GB:.1f}) may",
        lambda f: _moved(_arm(f, "exact"), 2 * EXPERT_GB, 2 * EXPERT_GB + ENCODER_GB),
    ),
    Demand("with 8-bit scores: 13 s", lambda f: _seconds(_attention8(f), 13.0)),
    Demand("rolling swap: 1.05 of both experts resident", _swap_ratio),
    Demand("rolling swap: equal to it", lambda f: (str(_swap(f)[0]["equal"]), _swap(f)[0]["equal"])),
    Demand("rolling swap: two experts move", _swap_moved),
    Demand(
        "SDXL: 1.8 times as fast as worker-sdxl's way", lambda f: _times(_arm(f, "sdxl", "plain"), _arm(f, "sdxl"), 1.8)
    ),
    Demand("modes: back from host memory, the same pixels, nothing left", _modes),
    Demand("video in 4 distilled forwards", lambda f: _seconds(_arm(f, "lightning"))),
    Demand("memoised encode: equal, 2.5 times fewer operations", _encode),
    Demand("decode: 1.6 times as fast as stock bf16", _decode),
    Demand("tests that need a card", lambda f: (f["tests"]["said"], f["tests"]["exit_code"] == 0)),
    Demand("50 jobs: no growth on the card", _grown),
)
