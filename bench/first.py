"""First jobs of several processes as one figure."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple


class First(NamedTuple):
    """Medians over the processes; `warm_s`: of all their warm jobs."""

    processes: int
    seconds: float
    lowest_s: float
    highest_s: float
    since_start_s: float
    warm_s: float

    @classmethod
    def of(cls, jobs: Sequence[Mapping[str, Any]]) -> "First":
        """`jobs`: what bench.cold keeps of each process."""

        def middle(name: str) -> float:
            return median(job[name] for job in jobs)

        spent = [job["first_s"] for job in jobs]
        warm_s = median(one for job in jobs for one in job["warm_s"])
        return cls(len(jobs), middle("first_s"), min(spent), max(spent), middle("since_start_s"), warm_s)
