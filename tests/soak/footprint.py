"""What a process holds, seen from outside."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""glibc's settings, as the image has them: without them its own habits hide a leak. See the Dockerfile."""


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes, the rest in numbers; `files` are those in its temporary folder."""

    resident: int
    descriptors: int
    threads: int
    children: int
    files: int

    def __str__(self) -> str:
        return (
            f"{self.resident / 2**20:.1f} MiB, {self.descriptors} descriptors, {self.threads} threads, "
            f"{self.children} children, {self.files} files"
        )


def footprint(pid: int, temporary: Path) -> Footprint:
    process = Path(f"/proc/{pid}")
    tasks = list((process / "task").iterdir())
    children = []
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            children += (task / "children").read_text().split()
    return Footprint(
        resident=int((process / "statm").read_text().split()[1]) * PAGE_BYTES,
        descriptors=len(list((process / "fd").iterdir())),
        threads=len(tasks),
        children=len(children),
        files=len(list(temporary.iterdir())),
    )


def of_a_round(seen: Iterable[Footprint]) -> Footprint:
    """Of each the least, which is what stays: models, work folders and a lookup's thread come and go."""
    return Footprint(*(min(values) for values in zip(*map(astuple, seen), strict=True)))
